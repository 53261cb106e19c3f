"""Batches of inputs for calibration and validation, their sources, and work on them batch by batch.

A source is one of: a ``.npz`` of stacked inputs (first axis: samples) or a dict of such arrays, a ``.npy`` or an array for a model of one
input, a folder of ``.npz`` files (one batch each, shapes may vary), a folder of ONNX ``test_data_set_*`` folders, an onnxruntime
``CalibrationDataReader``, or any iterable of dicts of arrays. Types and names that are not the model's are made to fit where that is clear
(`magr_onnx.runtime.data.fitting`).
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx import numpy_helper
from onnx.external_data_helper import uses_external_data

from magr_onnx.core.lazy import Lazy
from magr_onnx.core.types import Array
from magr_onnx.errors import CalibrationError, raise_all
from magr_onnx.passes.graph.kv_cache import PREFIX
from magr_onnx.runtime.data import fixed_batch
from magr_onnx.runtime.data.fitting import UNNAMED, fitted, remedy
from magr_onnx.runtime.data.hold_out import HELD_OUT
from magr_onnx.runtime.ort.session import Batch, InputInfo, Session


@runtime_checkable
class DataReader(Protocol):
    """Structural type of onnxruntime's ``CalibrationDataReader``: ``get_next`` returns a dict, or None at the end."""

    def get_next(self) -> dict[str, Any] | None: ...


MAX_PROBLEMS = 10  # different ones in a message
ENOUGH, KEPT_BACK = 256, 16  # samples from which one batch in so many is kept back from calibration
Source = str | os.PathLike[str] | DataReader | Batch | Iterable[Batch] | Lazy
Steps = Callable[[int, int], None]  # progress: called with steps done and steps in total, first with none done
Shapes = Mapping[str, tuple[int, ...]]  # of the arrays of a batch, by name
SAVE_CALL = "numpy.savez('inputs.npz', input_ids=ids, ...), an array for each input of the model"


@dataclass(frozen=True, slots=True, eq=False)
class Batches:
    """Batches that can be read any number of times.

    Attributes:
        count: Number of batches.
        description: Name of the source, for messages.
        read: Returns a new iterator over the batches.
        label: Name of a batch, by its position, for messages.
        notes: Notes for the report.
        samples: Number of samples they were made of; None if unknown.
        weights: Factors of the sums over each batch, where samples are repeated to fill it; empty if all are 1.
        shapes: Shapes of every batch, once `check_batches` has read them; else empty.
        sizes: Numbers of samples of every batch, where each has samples of its own; else empty.
        starts: Position in the source of the first sample of every batch; empty where batches are in the order of the source.
    """

    count: int
    description: str
    read: Callable[[], Iterator[Batch]]
    label: Callable[[int], str]
    notes: tuple[str, ...] = ()
    samples: int | None = None
    weights: tuple[float, ...] = ()
    shapes: tuple[Shapes, ...] = ()
    sizes: tuple[float, ...] = ()
    starts: tuple[int, ...] = ()

    def __iter__(self) -> Iterator[Batch]:
        return self.read()

    def __len__(self) -> int:
        return self.count

    def weight(self, index: int) -> float:
        """Return the factor of sums over the batch at a position."""
        return self.weights[index] if self.weights else 1.0

    @property
    def labels(self) -> tuple[str, ...]:
        """Return the names of all batches."""
        return tuple(map(self.label, range(self.count)))

    def limit(self, count: int) -> Batches:
        """Select at most ``count`` batches, evenly spaced."""
        if count >= self.count:
            return self
        return self.select(sorted({round(i * (self.count - 1) / max(count - 1, 1)) for i in range(count)}))

    def select(self, positions: Sequence[int]) -> Batches:
        """Select the batches at some positions, in rising order. How many samples they are made of is known where their sizes are."""
        selected, stop = set(positions), max(positions, default=-1) + 1

        def read() -> Iterator[Batch]:
            return (batch for i, batch in enumerate(itertools.islice(self.read(), stop)) if i in selected)

        sizes = tuple(self.sizes[i] for i in positions) if self.sizes else ()
        return replace(
            self,
            count=len(positions),
            read=read,
            label=lambda i: self.label(positions[i]),
            samples=round(sum(sizes)) if sizes else None,
            weights=tuple(self.weights[i] for i in positions) if self.weights else (),
            shapes=tuple(self.shapes[i] for i in positions) if self.shapes else (),
            sizes=sizes,
            starts=tuple(self.starts[i] for i in positions) if self.starts else (),
        )


def keep_back(data: Batches) -> tuple[Batches, Batches | None]:
    """Split off one batch in `KEPT_BACK` to compare models on; None, and all of the data, of fewer than `ENOUGH` samples."""
    if sum(data.sizes) < ENOUGH or len(data) < KEPT_BACK:
        return data, None
    parts: tuple[list[int], list[int]] = ([], [])
    for position in range(len(data)):
        parts[position % KEPT_BACK == KEPT_BACK // 2].append(position)
    return data.select(parts[0]), data.select(parts[1])


def with_progress(data: Batches, progress: Steps | None) -> Iterator[tuple[int, Batch]]:
    """Yield batches with their numbers, and report progress before the first and after each."""
    report = progress or (lambda done, total: None)
    report(0, len(data))
    for index, batch in enumerate(data):
        yield index, batch
        report(index + 1, len(data))


def run_batches(
    model: ir.Model, data: Batches, provider: str, progress: Steps | None = None, fuses: bool = True
) -> Iterator[tuple[int, float, list[Array]]]:
    """Run a model on all batches; yield the number of each, the factor of sums over it, and the outputs. ``fuses``: see `Session`."""
    with Session(model, provider, fuses=fuses) as session:
        for index, batch in with_progress(data, progress):
            yield index, data.weight(index), session.run(batch)


def part_of(progress: Steps | None, index: int, count: int) -> Steps | None:
    """The progress of part ``index`` of ``count`` parts with equally many steps."""
    return None if progress is None else lambda done, total: progress(index * total + done, count * total)


def shapes_of(batch: Batch) -> Shapes:
    """Return the shapes of the arrays of a batch, by name."""
    return {name: np.shape(array) for name, array in batch.items()}


def open_data(source: Source, inputs: Sequence[InputInfo], batch_size: int = 16) -> Batches:
    """Open a source and check its batches against the model's inputs.

    Args:
        source: See the module's description.
        inputs: The model's inputs.
        batch_size: Samples per batch of stacked inputs; ignored where the model fixes its batch dimension (`fixed_batch`).

    Raises:
        CalibrationError: There is no data, or names, types or shapes do not fit the model; all problems are listed.
    """
    return check_batches(open_source(source, inputs, batch_size), inputs)


def open_source(source: Source, inputs: Sequence[InputInfo], batch_size: int = 16) -> Batches:
    """Open a source without checking its batches; see `open_data`.

    Raises:
        CalibrationError: The source does not exist or cannot be read.
    """
    if isinstance(source, Lazy):
        source = source.make()
    if isinstance(source, Batches):
        return source
    if isinstance(source, str | os.PathLike):
        return _open_path(Path(source), inputs, batch_size)
    if isinstance(source, DataReader):
        return in_memory([_as_arrays(b, f"batch {i}") for i, b in enumerate(iter(source.get_next, None))], "the calibration data reader")
    if isinstance(source, Mapping):
        return _stacked("the given arrays", _as_arrays(source, "the given dict"), inputs, batch_size)
    if isinstance(source, np.ndarray):
        return _stacked("the given array", {UNNAMED: source}, inputs, batch_size)
    if isinstance(source, Iterable):
        return in_memory([_as_arrays(b, f"batch {i}") for i, b in enumerate(source)], "the given batches")
    raise CalibrationError(f"calibration data cannot be a {type(source).__name__}; give a path, a data reader or batches")


def check_batches(batches: Batches, inputs: Sequence[InputInfo]) -> Batches:
    """Split or fill batches of the wrong number of samples, and check that all fit, in one pass over them; see `open_data`."""
    changes: dict[str, None] = {}
    batches = replace(batches, read=partial(_fitted, batches, inputs, changes))
    if len(batches) == 0:
        raise CalibrationError(f"{batches.description}: no data; give at least one batch with {'; '.join(map(str, inputs))}")
    parts: list[tuple[int, fixed_batch.Group]] = []
    shapes: list[Shapes] = []
    sizes: list[float] = []
    offenders: dict[str, list[int]] = {}  # positions of the batches with a problem
    starts: list[int] = []
    begun = 0  # samples before the batch of the source
    for i, group, batch in _filled(batches, inputs):
        if parts and i != parts[-1][0]:
            begun = round(sum(sizes))
        parts.append((i, group))
        starts.append((batches.starts[i] if batches.starts else begun) + group.start)
        shapes.append(shapes_of(batch))
        sizes.append(batches.weight(i) * group.count)
        for problem in check_batch(batch, inputs):
            offenders.setdefault(problem, []).append(i)
        if len(offenders) >= MAX_PROBLEMS:
            break
    problems = [f"{batches.label(at[0])}{f' and {len(at) - 1} more' * (len(at) > 1)}: {p}" for p, at in offenders.items()]
    raise_all(CalibrationError, [*problems, *["... and perhaps more"] * (len(offenders) >= MAX_PROBLEMS)])
    batches = replace(batches, notes=(*batches.notes, *changes))
    checked = replace(batches, shapes=tuple(shapes), starts=tuple(starts))
    if batches.samples is None or batches.sizes:
        checked = replace(checked, samples=round(sum(sizes)), sizes=tuple(sizes))
    groups = [group for _, group in parts]
    if len(groups) == len(batches) and all(group.repeats == 1 for group in groups):
        return checked
    return replace(
        checked,
        count=len(parts),
        read=lambda: (batch for _, _, batch in _filled(batches, inputs)),
        label=lambda i: batches.label(parts[i][0]),
        notes=(*batches.notes, *fixed_batch.notes_of(groups)),
        weights=tuple(batches.weight(i) * group.weight for i, group in parts),
    )


def _fitted(batches: Batches, inputs: Sequence[InputInfo], changes: dict[str, None]) -> Iterator[Batch]:
    return (fitted(batch, inputs, changes) for batch in batches)


def _filled(batches: Batches, inputs: Sequence[InputInfo]) -> Iterator[tuple[int, fixed_batch.Group, Batch]]:
    """Split or fill batches to the batch size that the model fixes: the position of the source batch, a group of its samples, and those."""
    for i, batch in enumerate(batches):
        groups = fixed_batch.groups_of(batch, inputs)
        for group in groups:
            yield i, group, batch if len(groups) == group.repeats == 1 else group.part(batch)


def check_batch(batch: Batch, inputs: Sequence[InputInfo]) -> list[str]:
    """List the problems of a batch that does not fit the model's inputs."""
    declared, described = {i.name: i for i in inputs}, "; ".join(map(str, inputs))
    problems = []
    missing, extra = sorted(declared.keys() - batch.keys()), sorted(batch.keys() - declared.keys())
    if missing or extra:
        advice = f"; rename {extra[0]} to {missing[0]}" if len(missing) == len(extra) == 1 else ""
        advice = advice if missing else f"; leave out {', '.join(extra)}: save, or give, the arrays of the inputs alone"
        problems.append(f"has arrays {', '.join(sorted(batch)) or 'none'}; the model's inputs are {described}{advice}")
    for name in sorted(declared.keys() & batch.keys()):
        array, info = batch[name], declared[name]
        if (array.dtype != info.dtype and not (array.dtype.kind == "U" and info.dtype == object)) or not info.fits(array.shape):
            what = remedy(array, info.dtype)
            problems.append(f"{name} is {array.dtype} {array.shape}; the model expects {info}{what}")
        elif array.size == 0 and not name.startswith(PREFIX):  # the past is empty before the first token
            problems.append(f"{name} is empty, shape {array.shape}")
        elif array.dtype.kind == "f" and not np.isfinite(array).all():
            problems.append(f"{name} holds NaN or infinite values")
    return problems


def _as_arrays(batch: Batch, where: str) -> Batch:
    if not hasattr(batch, "keys"):
        raise CalibrationError(f"{where} is a {type(batch).__name__}; expected a dict of input name to array")
    try:
        return {k: np.asarray(batch[k]) for k in batch}
    except ValueError as error:
        raise CalibrationError(f"{where} has an entry that is not an array: {error}") from error


def in_memory(batches: Sequence[Any], description: str, groups: Sequence[fixed_batch.Group] = ()) -> Batches:
    """Return batches read from a list, each of a group of samples."""
    weights = tuple(group.weight for group in groups) if any(group.repeats > 1 for group in groups) else ()
    notes = fixed_batch.notes_of(groups)
    return Batches(len(batches), description, lambda: iter(batches), lambda i: f"{description}, batch {i}", notes, weights=weights)


_NPY, _ZIP = b"\x93NUMPY", b"PK"


def _load_npy(path: Path) -> npt.NDArray[Any]:
    try:
        return np.asarray(np.load(path, allow_pickle=False))
    except (OSError, ValueError, EOFError) as error:
        raise CalibrationError(f"{path} is not a readable .npy file: {error}") from error


def load_npz(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Load all arrays of a ``.npz`` file; pickled objects are never loaded.

    Raises:
        CalibrationError: The file is not a readable ``.npz``.
    """
    try:
        with path.open("rb") as file:
            if (first := file.read(len(_NPY))) != _NPY and not first.startswith(_ZIP):  # numpy treats any other file as pickled objects
                raise CalibrationError(f"{path} is not an .npz file by its first bytes; {SAVE_CALL}, writes one")
            file.seek(0)
            loaded = np.load(file, allow_pickle=False)
            if not isinstance(loaded, np.lib.npyio.NpzFile):
                raise CalibrationError(f"{path} holds a single array; save named inputs with numpy.savez")
            archive = loaded.zip
            assert archive is not None
            unpacked = sum(member.file_size for member in archive.infolist())
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 1 << 62
            if unpacked > memory // 2:
                raise CalibrationError(f"{path} unpacks to {unpacked} bytes, more than half of this machine's memory; cut it into a folder")
            arrays = {name: loaded[name] for name in loaded.files}
    except CalibrationError:
        raise
    except Exception as error:  # numpy's readers raise arbitrary exceptions on malformed bytes
        objects = "it holds Python objects, which are never loaded; text is saved as array.astype(str)"
        reason = objects if "pickle" in str(error) else str(error)
        raise CalibrationError(f"{path} is not a readable .npz file: {reason}; write it with {SAVE_CALL}") from error
    if invalid := [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]:
        raise CalibrationError(f"{path}: {', '.join(invalid)} are not arrays; save named inputs with numpy.savez")
    return arrays


def _open_path(path: Path, inputs: Sequence[InputInfo], batch_size: int) -> Batches:
    if path.is_dir():
        files = sorted(path.glob("*.npz"))
        if files:
            return Batches(len(files), str(path), lambda: map(load_npz, files), lambda i: str(files[i]))
        folders = [path] if _is_test_data(path) else sorted(p for p in path.glob("test_data_set*") if _is_test_data(p))
        if folders:
            return Batches(len(folders), str(path), lambda: (_load_test_data(p, inputs) for p in folders), lambda i: str(folders[i]))
        raise CalibrationError(f"{path}: no .npz files and no test_data_set folders in it")
    if not path.exists():
        raise CalibrationError(f"calibration data {path} does not exist")
    if path.suffix == ".txt":
        raise CalibrationError(f"{path}: text is not read here; give an .npz")
    if path.suffix == ".npy":
        return _stacked(str(path), {UNNAMED: _load_npy(path)}, inputs, batch_size)
    if path.suffix != ".npz":
        raise CalibrationError(
            f"{path}: expected a .npz or .npy file, text, a folder of .npz files, or a folder of ONNX test_data_set folders"
        )
    return _stacked(str(path), load_npz(path), inputs, batch_size)


def _stacked(description: str, arrays: Batch, inputs: Sequence[InputInfo], batch_size: int) -> Batches:
    """Split stacked inputs into batches along their axes of samples, of the size the model fixes, if any.

    Inputs of rank 0 are shared by all; so are those that have the one shape that the model takes, where the others have more samples.
    Arrays that cannot be split and fit the model are one feed.
    """
    changes: dict[str, None] = {}
    arrays = fitted(arrays, inputs, changes)
    return replace(split := _split(description, arrays, inputs, batch_size), notes=(*split.notes, *changes))


def _split(description: str, arrays: Batch, inputs: Sequence[InputInfo], batch_size: int) -> Batches:
    declared = {i.name: i for i in inputs}
    axes = {name: declared[name].axis if name in declared else 0 for name in arrays}
    counts = {name: a.shape[axes[name]] for name, a in arrays.items() if a.ndim > axes[name]}
    if len(set(counts.values())) > 1:
        shared = {name for name in counts if name in declared and declared[name].shape == arrays[name].shape}
        counts = {name: count for name, count in counts.items() if name not in shared} or counts
    if not counts:
        return in_memory([arrays] if arrays else [], description)
    if len(set(counts.values())) > 1:
        sizes = ", ".join(f"{n} {c}" for n, c in counts.items())
        if check_batch(arrays, inputs):
            raise CalibrationError(
                f"{description}: inputs have different numbers of samples ({sizes}); give a folder of .npz files, each a feed of the model "
                "as it stands, or a list of dicts of arrays"
            )
        note = (
            f"{description} is one feed, since its arrays have different sizes along the axis of samples ({sizes}); a folder holds several"
        )
        return replace(in_memory([arrays], description), notes=(note,))
    axes = {name: axes[name] for name in counts}
    samples, size = next(iter(counts.values())), fixed_batch.fixed_size([i for i in inputs if i.name in axes])
    groups = fixed_batch.groups(samples, size or batch_size, size is not None, HELD_OUT if size else 2 * HELD_OUT)
    batches = in_memory([group.part(arrays, axes) for group in groups], description, groups)
    label, starts = (lambda i: f"{description}, samples from {groups[i].start}"), tuple(group.start for group in groups)
    return replace(batches, label=label, starts=starts)


def _is_test_data(path: Path) -> bool:
    return path.is_dir() and any(path.glob("input_*.pb"))


def _load_test_data(path: Path, inputs: Sequence[InputInfo]) -> Batch:
    """Load ``input_<i>.pb`` files, named by their tensors, else by the order of the model's inputs."""
    batch: dict[str, npt.NDArray[Any]] = {}
    names = [i.name for i in inputs]
    for file in path.glob("input_*.pb"):
        try:
            tensor = onnx.load_tensor(file)
            if uses_external_data(tensor):
                raise ValueError("its data lies in another file")
            array = numpy_helper.to_array(tensor)
        except Exception as error:
            raise CalibrationError(f"{file} is not a serialized ONNX tensor: {error}") from error
        match = re.fullmatch(r"input_(\d+)", file.stem)
        index = int(match[1]) if match else len(names)
        batch[tensor.name if tensor.name in names else names[index] if index < len(names) else file.stem] = array
    return batch
