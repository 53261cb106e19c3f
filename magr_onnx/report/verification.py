"""Result of `magr_onnx.verify`, as data, as JSON and as text."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Literal

from magr_onnx.core.overflow.proof import Claim
from magr_onnx.report.data import by_reason, skip_lines, wrapped
from magr_onnx.report.reasons import Skip
from magr_onnx.report.serialization import plain

Verdict = Literal["proved", "overflows"]
ROWS = 20  # layers of the table; the JSON has all


@dataclass(frozen=True, slots=True)
class WitnessRow:
    """An input that a register cannot hold: the fields of `magr_onnx.core.overflow.proof.Witness`, and what this machine made of it.

    Attributes:
        held: The wrapped or clipped value in the register.
        operator: The operator run on this machine; empty if none was.
        computed: Its result.
        exact_here: Whether that is the true dot product.
        detail: The reason if nothing was run.
    """

    claim: str
    column: int
    rows: tuple[int, ...]
    x: tuple[int, ...]
    x_zero: int
    exact: int
    held: int
    dot: int
    simulated: int
    operator: str
    computed: int | None
    exact_here: bool | None
    detail: str


@dataclass(frozen=True, slots=True)
class LayerVerdict:
    """Verdict on one integer dot product.

    Attributes:
        name: Node name; a function's nodes are ``function/node``.
        op: Operator, and the form it has in the graph.
        weight: Name of the weight.
        k: Terms of the dot product.
        n: Outputs.
        x_type: Type of the activation codes.
        w_type: Type of the weight codes.
        x_range: Range of the activation codes as the kernel multiplies them.
        accumulator: The registers, in words.
        order: Assumed order of K, where it differs from the graph's.
        inner: The sum of a tile.
        outer: The sum of the tiles, with the integer bias.
        result: The operator's own result, with zero points; None where it is formed in floats.
        verdict: Whether all of them fit.
        witness: An input for which one does not.
    """

    name: str
    op: str
    weight: str
    k: int
    n: int
    x_type: str
    w_type: str
    x_range: tuple[int, int]
    accumulator: str
    order: str
    inner: Claim
    outer: Claim
    result: Claim | None
    verdict: Verdict
    witness: WitnessRow | None

    @property
    def headroom(self) -> float:
        """Return the headroom of the tightest register, in bits."""
        claims = (self.inner, self.outer, self.result)
        return min((c.headroom for c in claims if c is not None and c.headroom is not None), default=float("inf"))


@dataclass(frozen=True, slots=True)
class Verification:
    """Result of `magr_onnx.verify`.

    Attributes:
        source: Path of the model, or a description.
        against: The target or the accumulator, in words.
        layers: Integer dot products in graph order.
        skipped: All other nodes with dot products.
        machine: The machine witnesses were run on.
        versions: Versions of the packages involved.
    """

    source: str
    against: str
    layers: tuple[LayerVerdict, ...]
    skipped: tuple[Skip, ...]
    machine: str
    versions: dict[str, str]

    @property
    def failed(self) -> tuple[LayerVerdict, ...]:
        return tuple(layer for layer in self.layers if layer.verdict != "proved")

    @property
    def ok(self) -> bool:
        """Return whether no register overflows; skipped nodes are not covered."""
        return not self.failed

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain data for JSON."""
        return {**plain(dataclasses.asdict(self)), "ok": self.ok}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def to_text(self) -> str:
        """Render totals, the tightest layers, one witness and the skipped nodes, within 80 columns."""
        return "\n".join([*self._summary(), *self._table(), *self._witnesses(), *self._skips()])

    def _summary(self) -> list[str]:
        proved = len(self.layers) - len(self.failed)
        if self.layers:
            lines = [f"verdict      {proved} of {len(self.layers)} integer dot products proved, {len(self.failed)} overflow"]
        else:
            lines = ["verdict      nothing to prove: the model has no integer dot product"]
        if self.skipped:
            lines.append(f"             {len(self.skipped)} other nodes are not integer dot products or cannot be read")
        orders = {layer.order: None for layer in self.layers if layer.order}
        lines += [line for order in orders for line in wrapped(f"order of K   {order} in convolutions")]
        return [f"model        {self.source}", *wrapped(f"against      {self.against}"), *lines]

    def _table(self) -> list[str]:
        if not self.layers:
            return []
        lines = ["", f"{'layer':30} {'K x N':>13} {'inner':>7} {'outer':>7} {'head':>6}  verdict"]
        ranked = sorted(self.layers, key=lambda layer: (layer.verdict == "proved", layer.headroom))
        for layer in ranked[:ROWS]:
            name = layer.name if len(layer.name) <= 30 else f"...{layer.name[-27:]}"
            outer = max((c for c in (layer.outer, layer.result) if c is not None), key=lambda c: c.needed)
            head = "" if layer.headroom == float("inf") else f"{layer.headroom:6.2f}"
            sizes = f"{f'{layer.inner.needed}/{layer.inner.bits}':>7} {f'{outer.needed}/{outer.bits}':>7}"
            lines.append(f"{name:30} {f'{layer.k} x {layer.n}':>13} {sizes} {head:>6}  {layer.verdict}")
        others = ranked[ROWS:]
        if others:
            failing = sum(layer.verdict != "proved" for layer in others)
            lines.append(f"... and {len(others)} more, {f'{failing} of them overflow' if failing else 'all proved'}")
        return [*lines, "inner, outer: bits needed / bits there are; head: headroom in bits"]

    def _witnesses(self) -> list[str]:
        failed = [layer for layer in self.failed if layer.witness is not None]
        if not failed:
            return []
        worst = min(failed, key=lambda layer: layer.headroom)
        witness = worst.witness
        assert witness is not None
        text = f"  {worst.name}, column {witness.column}, {_rows(witness)}: the sum is {witness.exact}, the register holds {witness.held}"
        lines = ["", "witness of the worst", *wrapped(text, 4)]
        lines += wrapped(f"  dot product {witness.dot}, with these registers {witness.simulated}; {_here(witness)}", 4)
        ran = [layer.witness for layer in failed if layer.witness is not None and layer.witness.exact_here is not None]
        exact = sum(bool(w.exact_here) for w in ran)
        lines += wrapped(f"  of {len(ran)} witnesses run on this machine ({self.machine}), {exact} came out exact", 4)
        return lines

    def _skips(self) -> list[str]:
        if not self.skipped:
            return []
        lines = ["", "not proved, and not claimed"]
        for reason, rows in by_reason(self.skipped).items():
            details = sorted({r.detail for r in rows})
            lines += skip_lines(f"{reason}{f' ({details[0]})' if details[1:] == [] and details[0] else ''}", rows)
        return lines


def _rows(witness: WitnessRow) -> str:
    rows = witness.rows
    if len(rows) <= 4:
        return f"row{'s' if len(rows) > 1 else ''} {', '.join(map(str, rows))}"
    return f"{len(rows)} rows"


def _here(witness: WitnessRow) -> str:
    if witness.exact_here is None:
        return f"not run here ({witness.detail})" if witness.detail else "not run here"
    outcome = "exact on this machine" if witness.exact_here else f"this machine computes {witness.computed}"
    return f"{outcome} ({witness.operator})"
