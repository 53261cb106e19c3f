"""What the other samples of a batch do to a sample, where layer inputs are rounded with a range that is found at run time.

Such a range is that of the whole batch: a sample of large values makes the steps coarse for all others.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from magr_onnx.core.types import Array
from magr_onnx.errors import RuntimeFailure
from magr_onnx.model_io.legacy import read
from magr_onnx.runtime.ort.session import Batch, InputInfo, Model, Session, as_floats, inputs_of

DYNAMIC = ("DynamicQuantizeLinear", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM")
MOST = 64  # samples
SHOWN_DB = 1.0  # from which an effect is noted


def batch_effect(float_model: Model, quantized_model: Model, batches: Iterable[Batch], provider: str = "cpu") -> list[str]:
    """Describe outputs of which samples lose more than `SHOWN_DB` by being run together; none where no range is found at run time.

    Args:
        float_model: The reference.
        quantized_model: The model to run on batches, and on their samples one at a time, `MOST` of each.
        batches: Of several samples each; the one that costs a sample most is described.
        provider: Where to run both.

    Raises:
        RuntimeFailure: A model does not load, or does not run on a batch.
    """
    model = quantized_model if isinstance(quantized_model, ir.Model) else read(Path(quantized_model))
    if not any(node.op_type in DYNAMIC for node in model.graph.all_nodes()):
        return []
    infos, worst = inputs_of(model), dict[str, tuple[float, str]]()
    with Session(float_model, provider) as reference, Session(quantized_model, provider) as session:
        names = [name for name in reference.outputs if name in session.outputs]
        for batch in batches:
            samples = samples_of(batch, infos)
            if len(samples) > 1:
                together = {name: np.concatenate([s[name] for s in samples], a) for name, a in _axes(batch, infos).items()}
                feeds = [dict(batch) | together, *samples]
                try:
                    expected, *found = [reference.run(feeds[0], names), *(session.run(feed, names) for feed in feeds)]
                except RuntimeFailure:  # of shapes that it does not take
                    continue
                for name, y, *others in zip(names, map(as_floats, expected), *(map(as_floats, outputs) for outputs in found), strict=True):
                    effect = None if y is None else _described(name, y, *others)
                    worst[name] = max(worst.get(name, (SHOWN_DB, "")), effect or (SHOWN_DB, ""))
    return [text for _, text in worst.values() if text]


def _axes(batch: Batch, infos: Sequence[InputInfo]) -> dict[str, int]:
    """Return the axes of samples of the inputs whose size may differ there."""
    return {i.name: i.axis for i in infos if np.ndim(batch[i.name]) > i.axis and (not i.ranked or i.shape[i.axis] is None)}


def samples_of(batch: Batch, infos: Sequence[InputInfo]) -> list[Batch]:
    """Cut a batch into feeds of one sample each; none where its inputs have different numbers of samples."""
    axes = _axes(batch, infos)
    counts = {batch[name].shape[axis] for name, axis in axes.items()}
    count = min(MOST, *counts, MOST) if len(counts) == 1 else 0
    return [{n: np.take(array, [i], axes[n]) if n in axes else array for n, array in batch.items()} for i in range(count)]


def _described(name: str, y: Array, together: Array | None, *alone: Array | None) -> tuple[float, str] | None:
    """Describe the effect on one output, after the loss in dB; None where it has no rows for samples."""
    parts = [part for part in alone if part is not None]
    if together is None or together.shape != y.shape or {part.shape for part in parts} != {(1, *y.shape[1:])} or len(parts) != len(y):
        return None
    exact = np.reshape(y, (len(y), -1)).astype(np.float64)
    errors = [np.square(np.reshape(v, exact.shape) - exact).sum(axis=1) for v in (together, np.concatenate(parts))]
    with np.errstate(all="ignore"):
        batch_db, alone_db = (10 * np.log10(np.square(exact).sum() / error.sum()) for error in errors)
        losses = np.nan_to_num(10 * np.log10(errors[0] / errors[1]), posinf=np.inf, neginf=-np.inf)
    worst = int(losses.argmax())
    return float(losses[worst]), (
        f"{name} depends on what else is in a batch: SQNR {batch_db:.1f} dB for {len(y)} samples together, {alone_db:.1f} dB one by one; "
        f"the sample that loses most, sample {worst}, loses {losses[worst]:.1f} dB, since ranges of inputs are those of the batch "
        "(--row-ranges gives every row of dynamic-int8 its own)"
    )
