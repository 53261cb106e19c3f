"""Feeds that mean what a model's inputs are, in other types or under another name: made to fit, where nothing is lost or guessed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from magr_onnx.runtime.ort.session import Batch, InputInfo

UNNAMED = "arr_0"  # what numpy.savez calls an array that is given without a name


def fitted(batch: Batch, inputs: Sequence[InputInfo], notes: dict[str, None]) -> Batch:
    """Return a feed with the names and types of a model's inputs as far as that is clear; what is not stays as it is.

    A single array that was saved without a name is that of a model's single input. Floats become floats of another width; integers and
    booleans become others that hold all values. Integers do not become floats: those of an image are scaled first, and only its owner knows
    how.

    Args:
        batch: Arrays by name.
        inputs: The model's inputs.
        notes: What was changed, in sentences for the report, is added to these keys.
    """
    named = dict(batch)
    if len(inputs) == 1 and named.keys() == {UNNAMED}:
        named = {inputs[0].name: named[UNNAMED]}
    for info in inputs:
        array = named.get(info.name)
        if array is not None and array.dtype != info.dtype and (other := _in_type(array, info.dtype)) is not None:
            named[info.name] = other
            notes[f"{info.name}: {array.dtype} became {info.dtype}, as the model expects"] = None
    return named


def remedy(array: npt.NDArray[Any], dtype: np.dtype[Any]) -> str:
    """Say how an array that does not fit an input's type is made to, as the end of a message."""
    if array.dtype.kind in "iu" and dtype.kind == "f":
        return f"; give floats, scaled as the model was trained with: array.astype(np.{dtype})"
    if array.dtype.kind == "f" and dtype.kind in "iu":
        return f"; give whole numbers: array.astype(np.{dtype})"
    return ""


def _in_type(array: npt.NDArray[Any], dtype: np.dtype[Any]) -> npt.NDArray[Any] | None:
    """Convert an array to a type that holds its values; None where there is doubt."""
    of, to = array.dtype.kind, dtype.kind
    if of in "fb" and to == "f":
        with np.errstate(over="ignore"):  # what becomes infinite is reported with all that is
            return array.astype(dtype)
    if of in "iub" and to in "iu":
        least, most = np.iinfo(dtype).min, np.iinfo(dtype).max
        return array.astype(dtype) if not array.size or (int(array.min()) >= least and int(array.max()) <= most) else None
    if of in "iu" and to == "b":
        return array.astype(bool) if np.isin(array, (0, 1)).all() else None
    return None
