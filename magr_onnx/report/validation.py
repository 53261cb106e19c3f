"""What a comparison of the float and the quantized model found."""

from __future__ import annotations

import math
from dataclasses import dataclass

MOST_NATS = 709.0  # whose exponential is a float


def amount(samples: int | None, batches: int) -> str:
    """How much data there is, to a person: how it is cut into batches is no matter of theirs."""
    return f"{batches} batches" if samples is None else f"{samples} samples"


@dataclass(frozen=True, slots=True)
class OutputMetrics:
    """How close one output of the quantized model is to the float one's, over all rows counted.

    Attributes:
        output: Name.
        sqnr_db: ``10 log10(sum y^2 / sum (y - y_hat)^2)``.
        cosine: Mean cosine similarity of the vectors along the last axis.
        max_error: Largest absolute difference.
        top1: Fraction of rows with the same largest element (logits only).
        kl: Mean Kullback-Leibler divergence of the softmax from the float one, nats (logits only).
        cross_entropy: Next-token cross-entropy, float and quantized, nats (language models only).
        nonfinite: Values that are NaN or infinite in the float model alone, or there in another way, and those in the quantized one. A
            value that is the same NaN or infinity in both is no difference, and counts nowhere.
    """

    output: str
    sqnr_db: float
    cosine: float
    max_error: float
    top1: float | None = None
    kl: float | None = None
    cross_entropy: tuple[float, float] | None = None
    nonfinite: tuple[int, int] = (0, 0)

    @property
    def perplexity(self) -> tuple[float, float] | None:
        """``exp`` of the cross-entropies; infinite where that is beyond a float."""
        if self.cross_entropy is None:
            return None
        before, after = (math.exp(nats) if nats < MOST_NATS else nats * math.inf for nats in self.cross_entropy)
        return before, after


@dataclass(frozen=True, slots=True)
class LayerMetrics:
    """Relative error ``||y - y_hat|| / ||y||`` at a layer's output inside the running models, upstream errors included.

    ``scope`` is the path of the torch module it came from, where a file says so.
    """

    layer: str
    relative_error: float
    scope: str = ""

    @property
    def label(self) -> str:
        """What to call it to a person: its module, or the name of its output."""
        return self.scope or self.layer


@dataclass(frozen=True, slots=True)
class Latency:
    """Milliseconds a batch, runs interleaved, each model first as often as second.

    Attributes:
        float_ms: Median of the float model.
        quantized_ms: Median of the quantized one.
        runs: Of each.
        float_quartiles: A quarter of the runs took less than the first, a quarter more than the second; None in older reports.
        quantized_quartiles: The same of the quantized model.
    """

    float_ms: float
    quantized_ms: float
    runs: int
    float_quartiles: tuple[float, float] | None = None
    quantized_quartiles: tuple[float, float] | None = None

    @property
    def spread(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Both quartiles, of the float and of the quantized model; both the median where they are not known."""
        return self.float_quartiles or (self.float_ms,) * 2, self.quantized_quartiles or (self.quantized_ms,) * 2

    @property
    def slower(self) -> bool:
        """Whether the quantized model is slower by a tenth or more, and by more than the runs scatter."""
        (_, float_late), (early, _) = self.spread
        return early > float_late and self.quantized_ms > 1.1 * self.float_ms


@dataclass(frozen=True, slots=True)
class Validation:
    """Everything `validate` measured."""

    data: str
    batches: int
    provider: str
    arithmetics: dict[str, tuple[OutputMetrics, ...]]
    layers: tuple[LayerMetrics, ...] = ()
    latency: Latency | None = None
    float_bytes: int = 0
    quantized_bytes: int = 0
    notes: tuple[str, ...] = ()
    samples: int | None = None

    @property
    def amount(self) -> str:
        """How much data there was."""
        return amount(self.samples, self.batches)

    def shown(self) -> list[tuple[str, OutputMetrics]]:
        """What a table shows: metrics with the arithmetics they hold for, one row where all are equal in the digits shown."""
        found: list[tuple[str, OutputMetrics]] = []
        rows = [(a, m) for a, outputs in self.arithmetics.items() for m in outputs]
        for output in dict.fromkeys(m.output for _, m in rows):
            own = [(a, m) for a, m in rows if m.output == output]
            found += [("all", own[0][1])] if len(own) > 1 and len({_digits(m) for _, m in own}) == 1 else own
        return found

    def broken(self) -> list[str]:
        """A sentence an output with values that are not finite in one model only, of the arithmetic that has most of them."""
        found = []
        for name in dict.fromkeys(m.output for outputs in self.arithmetics.values() for m in outputs):
            own = [(m.nonfinite, a) for a, outputs in self.arithmetics.items() for m in outputs if m.output == name]
            (before, after), arithmetic = max(own, key=lambda one: one[0][::-1])
            if after:
                found.append(f"{name}: values that are NaN or infinite in the result and not in the float model: {after} ({arithmetic})")
            elif before:
                found.append(f"{name}: values that are NaN or infinite in the float model and not in the result: {before} ({arithmetic})")
        return found


def severity(error: float) -> float:
    """What errors are ordered by: NaN is the worst."""
    return math.inf if math.isnan(error) else error


def _digits(m: OutputMetrics) -> tuple[str, ...]:
    """Metrics in the digits that reports show."""
    texts = (f"{m.sqnr_db:.2f}", f"{m.cosine:.5f}", f"{m.max_error:.3g}", f"{m.top1 or 0:.4f}", f"{m.kl or 0:.5f}")
    return (*texts, str(m.nonfinite))
