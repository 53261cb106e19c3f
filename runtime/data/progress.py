"""Work that goes through data batch by batch, and its progress."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import onnx_ir as ir

from magr_onnx.core.types import Array
from magr_onnx.runtime.data.sources import Batches
from magr_onnx.runtime.ort.session import Batch, Session

Steps = Callable[[int, int], None]
"""Called with steps done and steps in total, first with none done."""


def with_progress(data: Batches, progress: Steps | None) -> Iterator[tuple[int, Batch]]:
    """Yield batches with their numbers, and report progress before the first and after each."""
    report = progress or (lambda done, total: None)
    report(0, len(data))
    for index, batch in enumerate(data):
        yield index, batch
        report(index + 1, len(data))


def run_batches(model: ir.Model, data: Batches, provider: str, progress: Steps | None = None) -> Iterator[tuple[int, float, list[Array]]]:
    """Run a model on all batches; yield the number of each, the factor of sums over it, and the outputs."""
    with Session(model, provider) as session:
        for index, batch in with_progress(data, progress):
            yield index, data.weight(index), session.run(batch)


def part_of(progress: Steps | None, index: int, count: int) -> Steps | None:
    """The progress of part ``index`` of ``count`` parts with equally many steps."""
    return None if progress is None else lambda done, total: progress(index * total + done, count * total)
