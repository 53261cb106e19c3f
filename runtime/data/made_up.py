"""Inputs of the declared types, made up where there are no data."""

from __future__ import annotations

import contextlib
import itertools
import math
import string
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from magr_onnx.errors import CalibrationError, RuntimeFailure
from magr_onnx.passes.graph.nodes import operand
from magr_onnx.runtime.data import decoders
from magr_onnx.runtime.ort.session import Batch, InputInfo, Session, inputs_of

# Sizes tried in turn for a dynamic axis of samples and for other dynamic axes.
BROADCAST_SAFE = ((4, 4), (1, 8), (2, 16))  # never 1 for the latter, which some operators broadcast
AS_SERVED = ((1, 8), (1, 64), (1, 256), (4, 4), (2, 16), (1, 512), (1, 16000))  # one sample first, as most models are run

_RESHAPING = ("Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")  # of indices
_LETTERS = np.array(list(string.ascii_lowercase), object)
_LARGEST = 1 << 24  # elements of an input; a declared shape may ask for any number
_IMAGE = 64  # least size of the dynamic axes of an image, of which networks halve both several times


def random_inputs(
    inputs: Sequence[InputInfo],
    sizes: Sequence[tuple[int, int]] = BROADCAST_SAFE,
    ends: Mapping[str, int] | None = None,
    seed: int = 0,
) -> list[Batch]:
    """Draw inputs of the declared types; one batch per guess at the dynamic sizes.

    Floats are normal; integers are 0 or 1, or below the end that ``ends`` has for the input; text is of one letter, which tables may have.
    """
    guesses = [{i.name: _shape(i, samples, others) for i in inputs} for samples, others in sizes]
    feasible = [shapes for shapes in guesses if all(math.prod(shape) <= _LARGEST for shape in shapes.values())]
    return [{i.name: _random(i, shapes[i.name], (ends or {}).get(i.name, 2), seed) for i in inputs} for shapes in feasible]


def _shape(info: InputInfo, samples: int, others: int) -> list[int]:
    state = len(info.shape) == 3 and (info.shape[0] or 1) > 1  # of recurrent layers: layers, samples, units
    of_samples = 1 if state else info.axis
    dynamic = [axis for axis, d in enumerate(info.shape) if d is None and axis != of_samples]
    if len(info.shape) == 4 and len(dynamic) == 2 and info.dtype.kind != "b":
        others = max(others, _IMAGE)
    return [d if d is not None else samples if axis == of_samples else others for axis, d in enumerate(info.shape)]


def _random(info: InputInfo, shape: Sequence[int], end: int, seed: int) -> npt.NDArray[Any]:
    rng = np.random.default_rng(seed)
    if info.dtype.kind == "f":
        return rng.standard_normal(shape).astype(info.dtype)
    if info.dtype.kind in "iub":
        largest = 1 if info.dtype.kind == "b" else np.iinfo(info.dtype).max
        return rng.integers(0, min(max(end - 1, 0), largest), shape, endpoint=True).astype(info.dtype)
    return np.asarray(rng.choice(_LETTERS, shape), object)


def feeds_for(model: ir.Model, mask: str | None, seed: int = 0) -> Iterator[Batch]:
    """Yield feeds that the model may run with, for each guess at its dynamic sizes; a decoder's past is empty.

    Integers that index a table of the model have any of its rows, and are 0 or 1 in the last guesses.

    Args:
        model: The model.
        mask: The input that marks rows to count, which is set to 1 throughout.
        seed: Of the random numbers.
    """
    decoder = None
    with contextlib.suppress(CalibrationError):
        decoder = decoders.recognise(model)
    inputs, rows = inputs_of(model) if decoder is None else [decoder.tokens], _table_rows(model)
    guesses = [random_inputs(inputs, AS_SERVED, ends, seed) for ends in ([rows, {}] if rows else [{}])]
    for batch in itertools.chain(*guesses):
        if decoder is not None:
            yield decoder.start(batch[decoder.tokens.name])
        else:
            yield {name: np.ones_like(array) if name == mask else array for name, array in batch.items()}


def first_that_runs(model: ir.Model, mask: str | None, session: Session) -> Iterator[Batch]:
    """Yield feeds of the first guess at the dynamic sizes that a session runs with, endlessly, each of other random numbers.

    Raises:
        RuntimeFailure: It runs with none.
    """
    failures = []
    for guess, batch in enumerate(feeds_for(model, mask)):
        try:
            session.run(batch)
        except RuntimeFailure as error:
            failures.append(str(error))
        else:
            yield batch
            for seed in itertools.count(1):
                yield next(itertools.islice(feeds_for(model, mask, seed), guess, None))
    raise RuntimeFailure(f"it does not run on made-up inputs: {failures[0] if failures else 'they would be too large'}")


def uniform(batch: Batch, mask: str | None, seed: int) -> Batch:
    """Return a feed of the same shapes whose floats are between 0 and 1; all else, and what marks rows, stays."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.random(array.shape).astype(array.dtype) if array.dtype.kind == "f" and name != mask else array
        for name, array in batch.items()
    }


def _table_rows(model: ir.Model) -> dict[str, int]:
    """Return the number of rows of the constant tables that inputs of a model index, by input; the least of several."""
    rows: dict[str, int] = {}
    for node in model.graph:
        table, axis = operand(node, 0), node.attributes.get_int("axis", 0)
        if node.op_type != "Gather" or axis != 0 or table is None or not table.is_initializer():
            continue
        index = node.inputs[1]
        while index is not None and (maker := index.producer()) is not None and maker.op_type in _RESHAPING:
            index = maker.inputs[0]
        if index is not None and index.is_graph_input() and table.shape is not None and table.shape.rank() == 2:
            name, size = str(index.name), int(table.shape.numpy()[0])
            rows[name] = min(rows.get(name, size), size)
    return rows
