"""A pass for Olive (the package olive-ai): this package's optimizer as a step of an ``olive run`` workflow.

Olive finds passes in a package configuration, and one given with ``--package-config`` replaces its own. `package_config` is the installed
Olive's own with this pass added, so that all its other passes stay known; ``onnx-magr olive-config`` prints it. It is made from what is
installed, not shipped, so it cannot go out of date.

Needs the extra ``olive``; nothing else imports this module.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_type_hints

import magr_onnx
from magr_onnx import folders
from magr_onnx.errors import CalibrationError, MagrError, ModelError, OptionError, raise_all
from magr_onnx.optimizer import optimize
from magr_onnx.options import Options, build_pipeline
from magr_onnx.passes import pipeline
from magr_onnx.report import Report
from magr_onnx.writing import file_digest

try:
    from olive.common.config_utils import ParamCategory, validate_config
    from olive.data.config import DataConfig
    from olive.hardware.accelerator import AcceleratorSpec
    from olive.model import CompositeModelHandler, ONNXModelHandler
    from olive.model.utils import resolve_onnx_path
    from olive.package_config import OlivePackageConfig
    from olive.passes import Pass
    from olive.passes.pass_config import PassConfigParam
    from olive.search.search_parameter import Categorical
except ImportError as error:
    raise OptionError(f"Olive is not installed ({error}); pip install 'onnx-magr[olive]'") from error

logger = logging.getLogger(__name__)

NAME = "OnnxMagr"
ENTRY: Mapping[str, Any] = {
    "module_path": f"{__name__}.{NAME}",
    "supported_providers": ["*"],
    "supported_accelerators": ["*"],
    "supported_precisions": ["int4", "int8", "uint4", "uint8"],
    "supported_algorithms": ["gptq", "hqq", "rtn"],
    "supported_quantization_encodings": ["qdq", "qop"],
    "dataset": "dataset_optional",
}
ATTRIBUTE = "onnx_magr"
SUFFIX = ".magr.json"
_WORDS = {"block_size": "channel", "conv_bits": "none"}  # what stands for None, which Olive takes for a parameter that is not given


def package_config() -> dict[str, Any]:
    """The installed Olive's own package configuration with this pass in it, ready for JSON, or for ``olive.workflows.run``."""
    own: dict[str, Any] = json.loads(Path(OlivePackageConfig.get_default_config_path()).read_text(encoding="utf-8"))
    return {**own, "passes": {**own["passes"], NAME: dict(ENTRY)}}


class OnnxMagr(Pass):  # type: ignore[misc]
    """Quantizes linear layers, convolutions and tables of an ONNX model; see `magr_onnx.optimize`.

    Its parameters are all of `magr_onnx.Options`, and:

    Attributes:
        pipeline: Passes as text, instead of options.
        data_config: Calibration data from one of Olive's data configurations.
        calibration: Calibration data from a path, in any form that `magr_onnx.optimize` takes; for a composite model a folder with
            ``COMPONENT.npz`` or a folder ``COMPONENT`` for each component.
        validation: Held-out inputs in the same forms, to compare the model before and after on.
        include, exclude, requantize, custom_ops, mask, batch_size, provider, max_memory, external_data, shard_size: As there.
        fingerprint: Set by the pass: of this package's version and the bytes behind the paths above, so that Olive's cache, which goes by
            parameters, gives no result of another version or of other data.

    Where a search strategy is set, Olive searches over options that are given as lists of values.
    An error of this package reaches Olive as a ValueError, which it raises.
    The report is beside the model (``NAME.magr.json``, carried along as an additional file) and in short in its ``model_attributes``,
    under ``onnx_magr``.
    """

    @classmethod
    def _default_config(cls, accelerator_spec: AcceleratorSpec) -> dict[str, PassConfigParam]:
        texts = _descriptions()
        params = {
            name: PassConfigParam(
                type_=_type(name, kind),
                default_value=None,
                search_defaults=Categorical([None]),  # one choice: nothing is searched over unless a list is given
                description=texts.get(name, name),
            )
            for name, kind in get_type_hints(Options).items()
        }
        path = {"type_": str | Path, "category": ParamCategory.PATH}
        return params | {
            "pipeline": PassConfigParam(type_=str, description="Passes as text, instead of options."),
            "data_config": PassConfigParam(type_=DataConfig | dict, description="Calibration data, as one of Olive's data configurations."),
            "calibration": PassConfigParam(**path, description="Calibration data: .npz, folder of .npz; not together with data_config."),
            "validation": PassConfigParam(**path, description="Held-out inputs to compare the model before and after on."),
            "include": PassConfigParam(type_=list[str], description="Shell patterns of layers to convert; default: all."),
            "exclude": PassConfigParam(type_=list[str], description="Patterns of layers to leave alone."),
            "requantize": PassConfigParam(type_=bool, default_value=False, description="Take quantized weights for floats."),
            "custom_ops": PassConfigParam(type_=list[str], description="Shared libraries with custom operators of the model."),
            "mask": PassConfigParam(type_=str, default_value="auto", description="Input that marks rows to count; auto, or none."),
            "batch_size": PassConfigParam(type_=int, default_value=16, description="Samples a batch when an .npz is cut up."),
            "provider": PassConfigParam(type_=str, default_value="cpu", description="Where calibration runs: cpu, cuda, or a full name."),
            "max_memory": PassConfigParam(type_=int | str, description="Bytes, or text such as '3 GB'."),
            "external_data": PassConfigParam(type_=bool, default_value=False, description="Write tensors beside the model in any case."),
            "shard_size": PassConfigParam(type_=int | str, description="Most bytes of a data file."),
            "fingerprint": PassConfigParam(type_=str, description="Set by the pass; of data and version, for Olive's cache."),
        }

    @classmethod
    def get_config_params(cls, accelerator_spec: AcceleratorSpec, config: Any = None, disable_search: bool = False) -> Any:
        """Olive's, which would leave out parameters that it does not know.

        Raises:
            ValueError: Parameters there are none of.
        """
        known = cls.default_config(accelerator_spec)
        if unknown := [name for name in config or {} if name not in known]:
            raise ValueError(f"{NAME}: unknown parameters {', '.join(unknown)}; there are {', '.join(known)}")
        return super().get_config_params(accelerator_spec, config, disable_search)

    @classmethod
    def generate_config(cls, accelerator_spec: AcceleratorSpec, config: Any = None, point: Any = None, disable_search: bool = False) -> Any:
        """Olive's, with the fingerprint.

        Raises:
            ValueError: Without a search, where values do not go together: before any pass of the workflow runs.
        """
        made = super().generate_config(accelerator_spec, config, point, disable_search)
        if disable_search:
            with _raised():
                _check(made)
        made.fingerprint = _fingerprint(made)
        return made

    @classmethod
    def validate_config(cls, config: Any, accelerator_spec: AcceleratorSpec) -> bool:
        """Whether the values go together; a search leaves out those that do not, and the log says why."""
        try:
            _check(config)
        except MagrError as error:
            logger.error("%s: %s", NAME, error)
            return False
        return True

    def run(self, model: Any, output_model_path: str) -> Any:
        """Olive's, with the reports of all components among the files that Olive keeps with a composite model.

        Raises:
            ValueError: What `magr_onnx.optimize` raises, with its message.
        """
        with _raised():
            result = super().run(model, output_model_path)
        if isinstance(result, CompositeModelHandler):
            attributes = dict(result.model_attributes or {})
            kept = set(attributes.get("additional_files") or ())
            for name, component in result.get_model_components():
                made = Path(component.model_path).parent / component.model_attributes[ATTRIBUTE]["report"]
                kept.add(str(made.replace(Path(result.model_path) / f"{name}{SUFFIX}")))
                component.model_attributes[ATTRIBUTE]["report"] = f"{name}{SUFFIX}"
                component.model_attributes["additional_files"].remove(str(made))
            result.model_attributes = {**attributes, "additional_files": sorted(kept)}
        return result

    def _run_for_config(self, model: Any, config: Any, output_model_path: str) -> Any:
        if not isinstance(model, ONNXModelHandler):
            raise ModelError(f"{NAME} takes ONNX models and this is a {type(model).__name__}; put OnnxConversion before it")
        if model.external_initializers_path or model.constant_inputs_path:
            raise ModelError(
                f"{model.model_path} keeps weights in files that Olive feeds it; put {NAME} before the pass that took them out"
            )
        if model.onnx_file_name and Path(model.onnx_file_name).is_absolute():
            raise ModelError(
                f"Olive takes {model.onnx_file_name}, in the working directory, for the result of the pass before {NAME}, which has the "
                "same name; run olive from a folder without such a file"
            )
        source = Path(model.model_path)
        output = Path(resolve_onnx_path(output_model_path, _name(source, config.fingerprint)))
        component = Path(output_model_path).stem
        values = config.model_dump()
        shared = ("include", "exclude", "requantize", "custom_ops", "mask", "batch_size", "provider", "max_memory", "external_data")
        result = optimize(
            source,
            _calibration(model, config, component),
            output=output,
            validation_data=_of_component(config.validation, component),
            pipeline_text=config.pipeline,
            shard_size=config.shard_size,
            **{name: values[name] for name in shared if values[name] is not None},
            **_options(values),
        )
        report = output.with_name(f"{source.stem}{SUFFIX}")
        report.write_text(result.report.to_json() + "\n", encoding="utf-8")
        attributes = {**(model.model_attributes or {}), ATTRIBUTE: _summary(result.report, report.name)}
        attributes["additional_files"] = sorted({*attributes.get("additional_files", []), str(report)})
        return ONNXModelHandler(
            model_path=str(output.parent),
            onnx_file_name=output.name,
            inference_settings=model.inference_settings,
            use_ort_extensions=model.use_ort_extensions,
            model_attributes=attributes,
        )


@contextlib.contextmanager
def _raised() -> Iterator[None]:
    """Errors of this package as Olive's errors of users: of all others it only says in its log that there was one, and goes on."""
    try:
        yield
    except MagrError as error:
        raise ValueError(f"{NAME}: {error}") from error


def _name(source: Path, fingerprint: str) -> str:
    """A name for the result that no file in the working directory has: Olive 0.13 would take that file for it."""
    return source.name if not Path(source.name).exists() else f"{source.stem}-{fingerprint}.onnx"


def _type(name: str, kind: Any) -> Any:
    """What Olive may be given for an option."""
    return kind | Literal[_WORDS[name]] if name in _WORDS else kind


def _options(values: Mapping[str, Any]) -> Options:
    """The options that were given."""
    given = {name: values[name] for name in Options.__annotations__ if values[name] is not None}
    return {name: None if value == _WORDS.get(name) else value for name, value in given.items()}  # type: ignore[return-value]


def _check(config: Any) -> None:
    """Raise one error for all that does not go together."""
    values = config.model_dump()
    options = _options(values)
    problems = []
    if config.pipeline is not None and options:
        problems.append(f"give a pipeline or options, not both (options: {', '.join(options)})")
    if config.data_config is not None and config.calibration is not None:
        problems.append("give data_config or calibration, not both")
    problems += [
        f"{name}: {path} does not exist" for name in ("calibration", "validation") if (path := values[name]) and not Path(path).exists()
    ]
    try:
        if config.pipeline is None:
            build_pipeline(**options)
        else:
            pipeline.check(pipeline.parse(config.pipeline), config.provider)
    except OptionError as error:
        problems.append(str(error))
    raise_all(OptionError, problems)


def _calibration(model: Any, config: Any, component: str) -> Any:
    if config.data_config is None:
        return _of_component(config.calibration, component)
    container = validate_config(config.data_config, DataConfig).to_data_container()
    reader = container.create_calibration_dataloader(model_path=model.model_path, io_config=model.io_config)
    if not hasattr(reader, "get_next"):
        raise CalibrationError(f"data_config {config.data_config} gives no calibration data; see Olive's data containers")
    return reader


def _of_component(path: str | Path | None, component: str) -> str | Path | None:
    """What a folder has for a component of a composite model; else the path itself."""
    return path if path is None else folders.file_of(Path(path), component) or path


def _summary(report: Report, name: str) -> dict[str, Any]:
    """The report without its rows; ``report`` is the file that has all, beside the model."""
    found = report.to_dict()
    short = {key: found[key] for key in ("pipeline", "calibration", "bytes_before", "bytes_after", "verified", "versions", "notes")}
    return {"report": name, "converted": len(report.layers), "skipped": len(report.skipped), **short}


def _fingerprint(config: Any) -> str:
    """A hash of this package's version and of every file behind the paths of a configuration."""
    found = hashlib.sha256(magr_onnx.__version__.encode())
    for path in (config.calibration, config.validation, *(config.custom_ops or ())):
        root = None if path is None else Path(path)
        for file in [] if root is None else sorted(p for p in (root.rglob("*") if root.is_dir() else [root]) if p.is_file()):
            found.update(f"{file}:{file_digest(file)}".encode())
    return found.hexdigest()[:16]


def _descriptions() -> dict[str, str]:
    """What the docstring of `Options` says of each of them, on one line."""
    found = re.findall(r"^ {4}(\w+): (.*?)(?=^ {4}\w|\Z)", inspect.getdoc(Options) or "", re.M | re.S)
    return {name: " ".join(text.split()) for name, text in found}
