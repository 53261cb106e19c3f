"""Olive pass (for the package olive-ai): the optimizer as a step of an ``olive run`` workflow.

Olive finds passes in a package configuration, and one given with ``--package-config`` replaces its own. `package_config` returns the
configuration of the installed Olive with this pass added; ``onnx-magr olive-config`` prints it.

Needs the extra ``olive``; nothing else imports this module.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import operator
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_type_hints

import magr_onnx
from magr_onnx.config.invocation import Invocation
from magr_onnx.config.options import KEYS, OPTIONS, RUN, Options
from magr_onnx.config.recipe import Recipe
from magr_onnx.config.schema import unknown
from magr_onnx.core.option_spec import OptionSpec
from magr_onnx.core.quantizers import QUANTIZERS
from magr_onnx.errors import DependencyError, MagrError, ModelError, OptionError, install, raise_all
from magr_onnx.model_io.writing import file_digest
from magr_onnx.report.data import Report
from magr_onnx.workflow import directory
from magr_onnx.workflow.optimize import optimize
from magr_onnx.workflow.request import resolve

try:
    from olive.common.config_utils import ParamCategory, validate_config
    from olive.constants import QuantAlgorithm
    from olive.data.config import DataConfig
    from olive.hardware.accelerator import AcceleratorSpec
    from olive.model import CompositeModelHandler, ONNXModelHandler
    from olive.model.utils import resolve_onnx_path
    from olive.package_config import OlivePackageConfig
    from olive.passes import Pass
    from olive.passes.pass_config import PassConfigParam
    from olive.search.search_parameter import Categorical
except ImportError as error:
    if isinstance(error, ModuleNotFoundError) and error.name == "olive":
        raise DependencyError(f"Olive is not installed; {install('olive')}") from error
    raise DependencyError(f"Olive is installed, and fails to import: {error}; install what it lacks, or another version of it") from error

logger = logging.getLogger(__name__)

NAME = "OnnxMagr"
ENTRY: Mapping[str, Any] = {
    "module_path": f"{__name__}.{NAME}",
    "supported_providers": ["*"],
    "supported_accelerators": ["*"],
    "supported_precisions": ["int4", "int8", "uint4", "uint8"],
    "supported_algorithms": sorted(algorithm.value for algorithm in QuantAlgorithm if algorithm.value in QUANTIZERS),
    "supported_quantization_encodings": ["qdq", "qop"],
    "dataset": "dataset_optional",
}
ATTRIBUTE = "onnx_magr"
SUFFIX = ".magr.json"
_UNUSED = ("model", "output", "models", "overwrite", "resume")  # options that Olive sets otherwise, or that do not apply
_TYPES = {"path": str | Path, "paths": list[str] | str, "patterns": list[str] | str, "size": int | str}


def package_config() -> dict[str, Any]:
    """Return the package configuration of the installed Olive with this pass added, for JSON or ``olive.workflows.run``."""
    config: dict[str, Any] = json.loads(Path(OlivePackageConfig.get_default_config_path()).read_text(encoding="utf-8"))
    return {**config, "passes": {**config["passes"], NAME: dict(ENTRY)}}


class OnnxMagr(Pass):  # type: ignore[misc]
    """Olive pass that quantizes linear layers, convolutions and tables of an ONNX model; see `magr_onnx.optimize`.

    Its parameters are the keys of a recipe (`magr_onnx.config.recipe`), except those that Olive sets itself (model, output), and:

    Attributes:
        recipe: A recipe file; other parameters override it.
        layer: Options of single layers, a list of tables as in a recipe: ``[{"match": "*head*", "bits": 8}]``.
        data_config: Calibration data from one of Olive's data configurations, instead of ``calibration``.
        calibration: A path, as in a recipe; for a composite model a folder with ``COMPONENT.npz`` or a folder ``COMPONENT`` for
            each component.
        fingerprint: Set by the pass: a hash of this package's version and of all files, since Olive's cache compares only parameters.

    With a search strategy, Olive searches over options given as lists of values. Errors of this package are raised as ValueError, which
    Olive passes on. The report is written beside the model (``NAME.magr.json``, an additional file), and summarized in its
    ``model_attributes`` under ``onnx_magr``.
    """

    @classmethod
    def _default_config(cls, accelerator_spec: AcceleratorSpec) -> dict[str, PassConfigParam]:
        single = Categorical([None])  # one choice: nothing is searched unless a list is given
        options = {
            name: PassConfigParam(type_=_type(option), search_defaults=single, description=option.text) for name, option in OPTIONS.items()
        }
        run = {
            name: PassConfigParam(
                type_=_TYPES.get(option.kind, option.types[0]),
                category=ParamCategory.PATH if option.kind == "path" else ParamCategory.NONE,
                description=option.text,
            )
            for name, option in RUN.items()
            if name not in _UNUSED
        }
        return {
            **options,
            **run,
            "recipe": PassConfigParam(
                type_=str | Path, category=ParamCategory.PATH, description="A recipe file; other options override it."
            ),
            "layer": PassConfigParam(type_=list[dict[str, Any]], description="Options of single layers, as tables with match and options."),
            "data_config": PassConfigParam(type_=DataConfig | dict, description="Calibration data, as one of Olive's data configurations."),
            "fingerprint": PassConfigParam(type_=str, description="Set by the pass; of data and version, for Olive's cache."),
        }

    @classmethod
    def get_config_params(cls, accelerator_spec: AcceleratorSpec, config: Any = None, disable_search: bool = False) -> Any:
        """Return Olive's parameters, after refusing unknown ones, which Olive would ignore.

        Raises:
            ValueError: A parameter is unknown.
        """
        parameters = cls.default_config(accelerator_spec)
        if unknown_names := [name for name in config or {} if name not in parameters]:
            raise ValueError(f"{NAME}: {'; '.join(unknown(name, parameters) for name in unknown_names)}")
        return super().get_config_params(accelerator_spec, config, disable_search)

    @classmethod
    def generate_config(cls, accelerator_spec: AcceleratorSpec, config: Any = None, point: Any = None, disable_search: bool = False) -> Any:
        """Return Olive's configuration with the fingerprint.

        Raises:
            ValueError: Without a search, if values are incompatible; before any pass of the workflow runs.
        """
        generated = super().generate_config(accelerator_spec, config, point, disable_search)
        with _as_value_errors():
            if disable_search:
                _check(generated)
            generated.fingerprint = _fingerprint(generated)
        return generated

    @classmethod
    def validate_config(cls, config: Any, accelerator_spec: AcceleratorSpec) -> bool:
        """Whether the values are compatible; a search skips those that are not, and the log says why."""
        try:
            _check(config)
        except MagrError as error:
            logger.error("%s: %s", NAME, error)
            return False
        return True

    def run(self, model: Any, output_model_path: str) -> Any:
        """Run as Olive does, and keep the reports of all components of a composite model with it.

        Raises:
            ValueError: `magr_onnx.optimize` raised an error, whose message it has.
        """
        with _as_value_errors():
            result = super().run(model, output_model_path)
        if isinstance(result, CompositeModelHandler):
            attributes = dict(result.model_attributes or {})
            files = set(attributes.get("additional_files") or ())
            for name, component in result.get_model_components():
                report = Path(component.model_path).parent / component.model_attributes[ATTRIBUTE]["report"]
                files.add(str(report.replace(Path(result.model_path) / f"{name}{SUFFIX}")))
                component.model_attributes[ATTRIBUTE]["report"] = f"{name}{SUFFIX}"
                component.model_attributes["additional_files"].remove(str(report))
            result.model_attributes = {**attributes, "additional_files": sorted(files)}
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
        recipe = _recipe_of(config)
        calibration, validation = _data(model, config, recipe, Path(output_model_path).stem)
        result = optimize(source, recipe=recipe, calibration=calibration, output=output, validation_data=validation)
        report = output.with_name(f"{source.stem}{SUFFIX}")
        result.report.save(report)
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
def _as_value_errors() -> Iterator[None]:
    """Raise errors of this package as ValueError: Olive only logs others, and continues."""
    try:
        yield
    except MagrError as error:
        raise ValueError(f"{NAME}: {error}") from error


def _name(source: Path, fingerprint: str) -> str:
    """Name the result differently from any file in the working directory, which Olive 0.13 would mistake for it."""
    return source.name if not Path(source.name).exists() else f"{source.stem}-{fingerprint}.onnx"


def _type(option: OptionSpec) -> Any:
    """Return the type of an option in Olive."""
    kind = get_type_hints(Options).get(option.name) or functools.reduce(operator.or_, option.types)
    return kind if option.none_word is None else kind | Literal[option.none_word]


def _recipe_of(config: Any) -> Recipe:
    """Merge the parameters of a configuration with its recipe.

    Raises:
        RecipeError: The recipe is invalid; the message has all problems.
    """
    values = {name: value for name, value in config.model_dump().items() if value is not None and (name in KEYS or name == "layer")}
    recipe = Recipe.from_dict(values)
    return recipe if config.recipe is None else recipe.over(Recipe.load(config.recipe))


def _check(config: Any) -> None:
    """Check that parameters are compatible, and raise one error for all problems."""
    recipe = _recipe_of(config)
    problems = []
    if config.data_config is not None and config.calibration is not None:
        problems.append("give data_config or calibration, not both")
    problems += [f"{path} does not exist" for path in recipe.reads if not path.exists()]
    arguments: dict[str, Any] = {"recipe": recipe, "model": "model.onnx", "output": "output.onnx"}  # Olive names them later
    if config.data_config is not None:
        arguments["calibration"] = config.data_config
    try:
        resolve(arguments, Invocation(NAME))
    except MagrError as error:
        problems += error.problems
    raise_all(OptionError, problems)


def _data(model: Any, config: Any, recipe: Recipe, component: str) -> tuple[Any, Any]:
    """Open the calibration and the held-out data; in a folder with data per component, those of this component."""
    paths = [recipe.values.get(name) for name in ("calibration", "validation")]
    data, validation = (None if path is None else directory.file_of(Path(path), component) or path for path in paths)
    if config.data_config is not None:
        container = validate_config(config.data_config, DataConfig).to_data_container()
        data = container.create_calibration_dataloader(model_path=model.model_path, io_config=model.io_config)
    return data, validation


def _summary(report: Report, name: str) -> dict[str, Any]:
    """Summarize a report without its rows; ``report`` is the file name of the full one."""
    values = report.to_dict()
    summary = {key: values[key] for key in ("pipeline", "calibration", "bytes_before", "bytes_after", "verified", "versions", "notes")}
    return {"report": name, "converted": len(report.layers), "skipped": len(report.skipped), **summary}


def _fingerprint(config: Any) -> str:
    """Hash this package's version, the recipe, and every file that a configuration refers to."""
    digest = hashlib.sha256(magr_onnx.__version__.encode())
    recipe = _recipe_of(config)  # reads the recipe first, with clearer errors
    if config.recipe is not None:
        digest.update(Path(config.recipe).read_bytes())
    for path in recipe.reads:
        for file in sorted(p for p in (path.rglob("*") if path.is_dir() else [path]) if p.is_file()):
            digest.update(f"{file}:{file_digest(file)}".encode())
    return digest.hexdigest()[:16]
