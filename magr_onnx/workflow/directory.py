"""Folders of models as exporters leave them: models optimized, all else carried along, in place at once or not at all.

What `optimum-cli export onnx`, onnxruntime-genai's model builder and others write is a folder: one or several ``.onnx`` files, their
external data, and the configuration and the tokenizer that whoever loads the folder reads beside them. Here every model keeps its name,
so the result loads wherever the source did.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import onnx_ir as ir

from magr_onnx.config import selection
from magr_onnx.config.arguments import DEFAULTS, FOLDER_DEFAULTS, OMITTED, FolderArguments, FolderSource, explicit, over_preset, over_recipe
from magr_onnx.config.invocation import Invocation, plain, python_call, without_defaults
from magr_onnx.config.selection import LayerNames, Patterns
from magr_onnx.errors import CalibrationError, MagrError, ModelError, OptionError, OutputError, do_all, raise_all, translate_resource_errors
from magr_onnx.model_io import atomic, copy_directory, files
from magr_onnx.model_io.writing import output_errors
from magr_onnx.passes.layers.selection import Selection, matches
from magr_onnx.report import html
from magr_onnx.report.data import COLUMNS, Report, megabytes, wrapped
from magr_onnx.report.serialization import json_text
from magr_onnx.runtime.data import decoders
from magr_onnx.runtime.data.sources import Source
from magr_onnx.runtime.data.text import Reading, is_text
from magr_onnx.workflow.optimize import run
from magr_onnx.workflow.request import OptimizeRequest, reading_of, resolve


@dataclass(frozen=True, slots=True)
class OptimizedFolder:
    """What `optimize_folder` did.

    Attributes:
        source: The folder read.
        output: The folder written.
        reports: One for every optimized model, by its path in the folder.
        carried: Files that are byte for byte those of the source.
        kept: Files and links of the folder that was replaced, which the result has still.
    """

    source: str
    output: str
    reports: dict[str, Report]
    carried: tuple[str, ...]
    kept: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        reports = {name: report.to_dict() for name, report in self.reports.items()}
        others = {"carried": list(self.carried), "kept": list(self.kept)}
        return {"source": self.source, "output": self.output, "models": reports, **others}

    def to_json(self) -> str:
        return json_text(self.to_dict())

    def files(self, path: Path) -> dict[Path, Report | OptimizedFolder]:
        """What to write where, asked for a report at ``path``: of one model its own; of several all at ``path``, and each beside it."""
        if len(self.reports) == 1:
            return {path: next(iter(self.reports.values()))}
        return dict(zip(_report_files(path, list(self.reports)), (self, *self.reports.values()), strict=True))

    def save(self, path: Path) -> None:
        """Write `files`, as pages or JSON; see `Report.save`. The page of several models has links to theirs."""
        targets = self.files(path)

        def write(file: Path, one: Report | OptimizedFolder) -> None:
            if isinstance(one, Report):
                one.save(file)
            elif file.suffix.lower() in html.PAGES:
                pages = [other.name for other in targets if other != file]
                html.write(html.index(self.source, dict(zip(pages, self.reports.items(), strict=True))), file)
            else:
                html.write(one.to_json() + "\n", file)

        do_all([partial(write, *item) for item in targets.items()])

    def to_text(self, most: int | None = None, width: int = COLUMNS) -> str:
        """The report, of one model, with ``most`` layers; a line a model and their notes, of several (see `Report.to_text`)."""
        lists = {"carried": self.carried, "kept": self.kept}
        carried = [line for word, f in lists.items() if f for line in wrapped(f"{word:12} {len(f)} files: {', '.join(f)}", width=width)]
        if len(self.reports) == 1:
            return "\n".join([next(iter(self.reports.values())).to_text(most, width), "", *carried])
        lines = [f"folder       {self.source}", f"output       {self.output}", *carried, ""]
        lines.append(f"{'model':36} {'layers':>6} {'skipped':>7} {'before':>12} {'after':>12}")
        for name, report in self.reports.items():
            sizes = f"{megabytes(report.bytes_before):>12} {megabytes(report.bytes_after):>12}"
            lines.append(f"{name[-36:]:36} {len(report.layers):6d} {len(report.skipped):7d} {sizes}")
        for name, report in self.reports.items():
            lines += ["", name, *(line for note in report.notes for line in wrapped(f"  {note}", 4, width))] if report.notes else []
        return "\n".join(lines)


def optimize_folder(
    folder: str | os.PathLike[str] | None = OMITTED, calibration: FolderSource | None = OMITTED, **arguments: Unpack[FolderArguments]
) -> OptimizedFolder:
    """Optimize the models of a folder into a new folder, which has everything else as it is.

    The new folder appears when all of it is there; a run that fails leaves nothing. What links in the source point to is copied.

    Args:
        folder: Has ``.onnx`` files, perhaps in folders of their own. None, or left out, the ``model`` of the recipe.
        calibration: For a single model, any source of `magr_onnx.optimize`. For several, text for all, a dict by model
            (``"encoder_model"``; None for data-free), or a folder with ``encoder_model.npz``, ``encoder_model.txt``,
            ``encoder_model.jsonl`` or a folder ``encoder_model/`` for each. None works data-free. Left out, the recipe's.
        **arguments: See `magr_onnx.FolderArguments`. ``output`` is the folder to write; it must not exist, be empty, or
            see ``overwrite``. ``resume`` gets a job directory for each model in it: its path in the folder, with dots. A pattern of layers
            (``include``, ``exclude``, ``layers``) must match something in one of the models; a recipe is one for the folder.

    Returns:
        A report for every model, what was carried along, and what was kept.

    Raises:
        MagrError: One of its subclasses, as `magr_onnx.optimize`; for all models at once wherever the trouble can be known before.
    """
    if "model" in arguments:
        raise OptionError("model is for optimize; the folder is the first argument here")
    call = explicit(folder=folder, calibration=calibration, **arguments)
    command = python_call("magr_onnx.optimize_folder", call, FOLDER_DEFAULTS)
    return run_folder({"model": call.pop("folder", None), **call}, Invocation(command))


@translate_resource_errors()
def run_folder(arguments: Mapping[str, Any], invocation: Invocation) -> OptimizedFolder:
    """Optimize a folder, which is the ``model`` of the explicit arguments; see `optimize_folder`."""
    merged, notes = over_recipe(arguments)
    values = {**FOLDER_DEFAULTS, **merged}
    if values["model"] is None or values["output"] is None:
        raise OptionError("give a folder of models and an output, or name both in the recipe")
    invocation = replace(invocation, options=plain(without_defaults(over_preset(merged)[0], FOLDER_DEFAULTS)))
    source, out = Path(values["model"]), Path(values["output"])
    names = _names(source, values["models"])
    raise_all(OutputError, _check_output(source, out, names, values["overwrite"]))
    arguments_of, external = _read(source, names, values)
    carried = copy_directory.carried_files(source, copy_directory.all_files(source), names, external)
    place = out.resolve()  # a link stays one, and what it points to is replaced
    shared = {name: value for name, value in merged.items() if name in DEFAULTS or name not in FOLDER_DEFAULTS}
    requests: dict[str, OptimizeRequest] = {}
    for name, arguments_of_one in arguments_of.items():  # before any is carried out: what is wrong with one comes before work on others
        request = resolve({**shared, **arguments_of_one, "model": source / name, "output": out / name}, invocation)
        requests[name] = replace(request, notes=(*request.notes, *notes))
    reports: dict[str, Report] = {}
    with contextlib.ExitStack() as stack:
        with output_errors(f"cannot write {out}"):
            before = {path: seen for path, seen in copy_directory.preserved(place, names).items() if path not in carried}
            staging = stack.enter_context(atomic.staging_directory(place))
            part = staging / place.name
            part.mkdir()
            raise_all(OutputError, [f"{out}: {text}" for text in copy_directory.conflicts(before, [*carried, *map(Path, names)])])
            for path in carried:  # before the first result, whose data files take names that are free
                copy_directory.copy(source / path, part / path)
            copy_directory.update(place, part, {}, before)
            for name in names:
                (part / name).parent.mkdir(parents=True, exist_ok=True)
        for name, request in requests.items():
            report = run(replace(request, output=part / name)).report
            reports[name] = replace(report, output=str(out / name))
        with output_errors(f"cannot write {out}"):
            now = copy_directory.preserved(place, names).items()  # others may have written there meanwhile
            kept = {path: seen for path, seen in now if path in before or not os.path.lexists(part / path)}
            copy_directory.update(place, part, before, kept)
            copy_directory.keep_permissions(part, place, names)
            _put(part, place, staging)
    files = [path for path, seen in kept.items() if not copy_directory.is_folder(seen)]
    return OptimizedFolder(str(source), str(out), reports, *(tuple(p.as_posix() for p in paths) for paths in (carried, files)))


def _names(folder: Path, patterns: Sequence[str]) -> list[str]:
    """The paths in the folder of the models to optimize."""
    if not folder.is_dir():
        raise ModelError(f"{folder} is not a folder")
    paths = [p.as_posix() for p in copy_directory.all_files(folder) if p.suffix == ".onnx"]
    if not paths:
        raise ModelError(f"{folder}: no .onnx files in it; export a model first, for example with optimum-cli export onnx")
    if not patterns:
        return paths
    matches = {pattern: _matching(paths, pattern) for pattern in patterns}
    raise_all(ModelError, [f"{folder}: no model matches {p!r}; there are {', '.join(paths)}" for p in matches if not matches[p]])
    return [name for name in paths if any(name in matching for matching in matches.values())]


def _matching(names: Sequence[str], pattern: str) -> list[str]:
    """What a pattern stands for: the model that has it for a name, or all it matches."""
    exact = [name for name in names if pattern in (name, _stem(name))]
    return exact or [name for name in names if matches((name, _stem(name)), [pattern])]


def _check_output(folder: Path, out: Path, names: Sequence[str], overwrite: bool) -> list[str]:
    """What stands against writing the folder."""
    a, b = folder.resolve(), out.resolve()
    long = [text for name in names for text in files.check_length(out / name)]
    if problems := files.check_name(b) or atomic.why_not_writable(f"output {out}", out) or long:
        return problems
    if a == b or a in b.parents or b in a.parents:
        return [f"output folder {out} and source {folder} must not be, or hold, each other; choose another folder"]
    if out.exists() and not out.is_dir():
        return [f"output {out} is a file; the result of a folder is a folder"]
    if not b.parent.is_dir():
        return [f"{out.parent} does not exist; create it first"]
    if not out.is_dir() or not any(out.iterdir()):
        return []
    if not overwrite:
        return [f"output folder {out} exists and is not empty; choose another, remove it, or ask to overwrite it (--overwrite)"]
    missing = [name for name in names if not (out / name).is_file()]
    return [f"output folder {out} is not replaced: it is no earlier result, there is no {', '.join(missing)} in it"] * bool(missing)


def _read(folder: Path, names: Sequence[str], values: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], set[Path]]:
    """All models and their data opened once, so that no long work is done for a folder of which one cannot be.

    Returns:
        The arguments of `magr_onnx.optimize` that are for one model only, by its path in the folder: its data, its job directory and the
        patterns that match something in it. And the files that models read their data from.
    """
    patterns = Patterns(Selection(values["include"], values["exclude"]), values["layers"])
    sources = {key: _by_model(values[key], names, key.removesuffix("_data")) for key in ("calibration", "validation_data")}
    labels, resume = _labels(names), values["resume"]
    arguments: dict[str, dict[str, Any]] = {}
    external: set[Path] = set()
    model_problems, data_problems = [], []
    layers: dict[str, LayerNames] = {}
    for name in names:
        try:
            loaded = files.load(folder / name, values["keep_overridable"])
        except MagrError as error:
            model_problems.append(str(error))
            continue
        try:
            beside = (folder / name).parent
            reading = reading_of(values, (beside, folder))
            data = {key: _opened(each[name], loaded.model, values["batch_size"], reading) for key, each in sources.items()}
            job = None if resume is None else Path(resume) / labels[name]
            arguments[name], external = {**data, "resume": job}, external | loaded.external
            if patterns != Patterns():
                layers[name] = selection.names_as_loaded(loaded.model, patterns.selection, values["requantize"])
        except MagrError as error:
            data_problems.append(f"{name}: {error}")
    raise_all(ModelError, model_problems)
    raise_all(CalibrationError, data_problems)
    shared = selection.share(layers, patterns)
    for name in arguments:
        matching = shared.get(name, patterns)
        arguments[name] |= {"include": matching.selection.include, "exclude": matching.selection.exclude, "layers": matching.tables}
    return arguments, external


def _opened(source: Source | None, model: ir.Model, batch_size: int, reading: Reading) -> Source | None:
    """The source, once it is known to fit; text as batches."""
    if not isinstance(source, str | os.PathLike):
        return source
    path = Path(source)
    if not is_text(path):
        decoders.open_for(model, path, batch_size, runnable=None)
        return path
    return decoders.encode_text(model, path, batch_size, reading)


def _by_model(source: FolderSource | None, names: Sequence[str], what: str) -> dict[str, Source | None]:
    """The source of every model among those given.

    Raises:
        CalibrationError: A model has none, or a source belongs to no model.
    """
    if source is None:
        return dict.fromkeys(names)
    if isinstance(source, Mapping):
        known = {name: name for name in names} | {_stem(name): name for name in names}
        problems = [
            f"{what} data for {key!r}, and no such model is optimized; there are {', '.join(names)}" for key in source if key not in known
        ]
        named: dict[str, Source | None] = {known[key]: source for key, source in source.items() if key in known}
        problems += [f"no {what} data for {name}; give some, or None for data-free" for name in names if name not in named]
        raise_all(CalibrationError, problems)
        return named
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        beside: dict[str, Source | None] = {name: file_of(path, _stem(name)) for name in names}
        if any(beside.values()):
            missing = [
                f"{path} has no {_stem(name)}.npz, {_stem(name)}.txt, {_stem(name)}.jsonl or folder {_stem(name)}; add one, or leave "
                f"{name} out (--models)"
                for name in names
                if beside[name] is None
            ]
            raise_all(CalibrationError, missing)
            return beside
    if len(names) == 1 or is_text(source):
        return dict.fromkeys(names, source)
    raise CalibrationError(
        f"{what} data of one model for {len(names)}: {', '.join(names)}; give a folder with {_stem(names[0])}.npz and so on, or choose one "
        "model (--models)"
    )


def taken_by(folder: Path, output: Path) -> set[Path]:
    """The files of a folder, and those they will be in the output."""
    return {base / path for path in copy_directory.all_files(folder) for base in (folder, output)}


def check_reports(folder: Path, models: Sequence[str], paths: Sequence[Path], taken: Collection[Path]) -> None:
    """See that all reports of a folder can be written for ``paths`` (`OptimizedFolder.files`), and be none of the files of the run.

    Raises:
        MagrError: As `magr_onnx.report.html.check`; the source has no such models.
    """
    names = _names(folder, models)
    every = [file for path in paths for file in (_report_files(path, names) if len(names) > 1 else [path])]
    twice = sorted({file for file in every if every.count(file) > 1})
    raise_all(OutputError, [f"two reports would be {file}; choose other names" for file in twice])
    html.check(every, taken)


def _report_files(path: Path, names: Sequence[str]) -> list[Path]:
    """Where the report of a folder of several models goes, and those of the models."""
    return [path, *(path.with_name(f"{path.stem}.{label}{path.suffix}") for label in _labels(names).values())]


def _stem(name: str) -> str:
    return name.removesuffix(".onnx")


def _labels(names: Iterable[str]) -> dict[str, str]:
    """What to call each in the name of a file: its path with dots, and a number where another is called that."""
    labels: dict[str, str] = {}
    for name in names:
        flat = label = _stem(name).replace("/", ".")
        more = 2
        while label in labels.values():
            label, more = f"{flat}.{more}", more + 1
        labels[name] = label
    return labels


def file_of(folder: Path, stem: str) -> Path | None:
    """What a folder has for a model of that name."""
    candidates = [folder / f"{stem}{suffix}" for suffix in (".npz", ".txt", ".jsonl", "")]
    return next((p for p in candidates if p.exists()), None)


def _put(part: Path, out: Path, work: Path) -> None:
    """Rename the finished folder into place, and what was there out of it."""
    old = work / "old"
    there = out.exists()
    if there:
        os.replace(out, old)
    try:
        atomic.replace(part, out)
    except BaseException:
        if there:
            os.replace(old, out)
        raise
