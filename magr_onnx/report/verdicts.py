"""Sentences on what is ruined, with the remedy: the last lines of a report."""

from __future__ import annotations

import math
from collections.abc import Sequence

from magr_onnx.errors import listed
from magr_onnx.report.layer_row import LayerRow
from magr_onnx.report.validation import Validation, severity

RUINED_LAYER, RUINED_DB = 0.5, 10.0
"""Error of a layer, relative to its output, and SQNR of an output, from which a report ends with a warning."""


_DOUBT = "which may say little of real ones, of random tokens above all: give some (--calibration or --validation) to know"


def verdicts(layers: Sequence[LayerRow], comparisons: Sequence[Validation], growth: float = 0.0) -> list[str]:
    """Describe layers that lose half of their output or more, outputs below `RUINED_DB`, results slower or larger than float, and remedies.

    On made-up inputs an output may be far off in a model that is sound on real ones: that is a doubt, unless it is no number.

    Errors of layers are those of all layers before them, too, and of outputs that may be small. Where outputs were compared and none is
    ruined, layers with such errors are named without an alarm. ``growth`` is the size of the result over that of its source.
    """
    remedy = "give it more bits or smaller blocks, or leave it float (--exclude NAME)"
    if any(row.activation for row in layers):
        remedy = (
            "scale its inputs (--equalize), give some 16 bits (--wide-activations 0.2, with static ranges), leave it float "
            "(--exclude NAME), or keep inputs float (--format matmulnbits)"
        )
    ruined = [row for row in layers if severity(row.error or 0) >= RUINED_LAYER]
    lines: list[str] = []
    compared = [m.sqnr_db for comparison in comparisons for _, m in comparison.shown()]
    harmless = bool(compared) and all(db >= RUINED_DB for db in compared) and all(math.isfinite(row.error or 0) for row in ruined)
    if ruined and harmless:
        names, most = listed([row.label for row in ruined]), max(row.error or 0 for row in ruined)
        lines.append(
            f"layers that differ from the float model by half of what varies in their output or more: {names} (up to {most:.0%}, with what "
            f"the layers before them did); the outputs of the model are not ruined by it (SQNR {min(compared):.1f} dB or more)"
        )
    elif ruined:
        worst = max(ruined, key=lambda row: severity(row.error or 0))
        inputs = [row.label for row in ruined if ((row.activation or {}).get("error") or 0) >= RUINED_LAYER]
        cause = f"; at {listed(inputs)} by rounding the input to 8 bits, of which large values leave few for small ones" if inputs else ""
        names = listed([row.label for row in ruined])
        lines.append(f"RUINED: layers that lose most of their output: {names} (error {worst.error:.0%} at {worst.label}{cause}); {remedy}")
    for comparison in comparisons:
        for arithmetic, m in comparison.shown():
            if m.sqnr_db < RUINED_DB:
                error, data = f"{10 ** (-m.sqnr_db / 20):.0%}", f"{comparison.amount} of {comparison.data}, {arithmetic}"
                off = f"output {m.output} is off by {error} (SQNR {m.sqnr_db:.1f} dB; {data})"
                doubtful = comparison.made_up and math.isfinite(m.sqnr_db)
                what = "see the largest errors above" if ruined else remedy
                lines.append(f"IN DOUBT: {off}, {_DOUBT}" if doubtful else f"RUINED: {off}; {what}")
        if (times := comparison.latency) is not None and times.slower:
            milliseconds = f"{times.quantized_ms:.3g} against {times.float_ms:.3g} ms"
            lines.append(
                f"SLOWER: a batch takes {times.ratio:.2f} times as long as with the float model here ({milliseconds}; {comparison.data}); "
                f"{times.where}{'; ' if times.where else ''}"
                "weight-only formats are faster with --accuracy-level 4, convolutions with --conv-bits none or --format dynamic-int8"
            )
    if growth > 1:
        lines.append(
            f"LARGER: the file is {growth:.2f} times as large as its source: scales, nodes and float weights kept for others take more "
            "than the weights save; leave small layers float (--exclude NAME), or store weights only (--format matmulnbits adds least)"
        )
    return lines
