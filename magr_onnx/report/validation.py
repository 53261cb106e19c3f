"""Result of comparing the float and the quantized model, as data."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

SLOWER = 1.05  # times the float model's time from which a result is called slower
SHOWN, LEAST_SHARE = 5, 0.02  # operators that take the most time, and the share from which they are shown
MADE_UP = "made-up inputs"  # what the data of a comparison without data are called
MOST_NATS = 709.0  # largest exponent whose exponential is finite


def amount(samples: int | None, batches: int) -> str:
    """Describe the amount of data: samples where known, else batches."""
    return f"{batches} batch{'es' * (batches != 1)}" if samples is None else f"{samples} samples"


@dataclass(frozen=True, slots=True)
class OutputMetrics:
    """Metrics of one output of the quantized model against the float model, over all counted rows.

    Attributes:
        output: Name.
        sqnr_db: ``10 log10(sum y^2 / sum (y - y_hat)^2)``.
        cosine: Mean cosine similarity of the vectors along the last axis.
        max_error: Largest absolute difference.
        top1: Fraction of rows with the same largest element (logits only).
        kl: Mean Kullback-Leibler divergence of the softmax from the float one, nats (logits only).
        cross_entropy: Next-token cross-entropy, float and quantized, nats (language models only).
        nonfinite: Numbers of values that are NaN or infinite in the float model only, or differently, and in the quantized one. Values that
            are the same NaN or infinity in both count nowhere.
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
        """Return ``exp`` of the cross-entropies; infinite on overflow."""
        if self.cross_entropy is None:
            return None
        before, after = (math.exp(nats) if nats < MOST_NATS else nats * math.inf for nats in self.cross_entropy)
        return before, after


@dataclass(frozen=True, slots=True)
class LayerMetrics:
    """Error at a layer's output in the running models: whatever differs there, so that the errors of all layers before are in it.

    Attributes:
        layer: Name of its output.
        relative_error: Root mean square of the difference, over the standard deviation of the float model's output over rows.
        scope: Path of its torch module, where known.
    """

    layer: str
    relative_error: float
    scope: str = ""

    @property
    def label(self) -> str:
        """Return its display name: its module, or the name of its output."""
        return self.scope or self.layer


@dataclass(frozen=True, slots=True)
class Latency:
    """Milliseconds per batch, with interleaved runs, each model first equally often.

    Attributes:
        float_ms: Median of the float model.
        quantized_ms: Median of the quantized one.
        runs: Runs of each model.
        float_quartiles: First and third quartile of the float model; None in older reports.
        quantized_quartiles: The same for the quantized model.
        ratios: Median of the quantized model's time over the float model's in the same turn, between the ends of its 95% confidence
            interval; None in older reports.
        float_operators: Share of the float model's time by operator of onnxruntime's graph, the largest first; empty where not measured.
        quantized_operators: The same of the quantized model.
    """

    float_ms: float
    quantized_ms: float
    runs: int
    float_quartiles: tuple[float, float] | None = None
    quantized_quartiles: tuple[float, float] | None = None
    ratios: tuple[float, float, float] | None = None
    float_operators: dict[str, float] = field(default_factory=dict)
    quantized_operators: dict[str, float] = field(default_factory=dict)

    @property
    def where(self) -> str:
        """Say where the time of both models goes; empty where that was not measured."""
        shares = [
            ", ".join(f"{name} {share:.0%}" for name, share in list(operators.items())[:SHOWN] if share >= LEAST_SHARE)
            for operators in (self.float_operators, self.quantized_operators)
        ]
        return f"time of the float model: {shares[0]}; of the quantized one: {shares[1]}" if all(shares) else ""

    @property
    def spread(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Return the quartiles of the float and the quantized model; the medians where unknown."""
        return self.float_quartiles or (self.float_ms,) * 2, self.quantized_quartiles or (self.quantized_ms,) * 2

    @property
    def interval(self) -> tuple[float, float, float]:
        """Return how many times the float model's time the quantized model takes, at least, about and at most."""
        return self.ratios or (self.quantized_ms / self.float_ms,) * 3

    @property
    def ratio(self) -> float:
        """Return how many times the float model's time the quantized model takes."""
        return self.interval[1]

    @property
    def slower(self) -> bool:
        """Return whether the quantized model is slower by more than `SLOWER`, and not by chance."""
        return self.interval[0] > SLOWER


@dataclass(frozen=True, slots=True)
class MetricResult:
    """The user's own measure of both models, the higher the better.

    Attributes:
        name: Name of the function.
        float_value: Of the float model.
        quantized_value: Of the quantized model.
    """

    name: str
    float_value: float
    quantized_value: float

    def __str__(self) -> str:
        change = self.quantized_value - self.float_value
        return f"{self.name} {self.float_value:.6g} -> {self.quantized_value:.6g} ({change:+.4g})"


@dataclass(frozen=True, slots=True)
class Validation:
    """Result of `validate`.

    ``in_sample`` says that the data is what the quantized model was made from; ``metric`` is the user's own measure, if there is one.
    """

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
    in_sample: bool = False
    metric: MetricResult | None = None

    @property
    def amount(self) -> str:
        """Describe the amount of data."""
        return amount(self.samples, self.batches)

    @property
    def made_up(self) -> bool:
        """Whether there were no data, and inputs were made up."""
        return self.data.startswith(MADE_UP)

    def shown(self) -> list[tuple[str, OutputMetrics]]:
        """Return the rows of a table: metrics by arithmetic, merged where all are equal in the digits shown."""
        shown: list[tuple[str, OutputMetrics]] = []
        rows = [(a, m) for a, outputs in self.arithmetics.items() for m in outputs]
        for output in dict.fromkeys(m.output for _, m in rows):
            metrics = [(a, m) for a, m in rows if m.output == output]
            shown += [("all", metrics[0][1])] if len(metrics) > 1 and len({_digits(m) for _, m in metrics}) == 1 else metrics
        return shown

    def broken(self) -> list[str]:
        """Describe outputs with values that are not finite in one model only, for the arithmetic with most of them."""
        lines = []
        for name in dict.fromkeys(m.output for outputs in self.arithmetics.values() for m in outputs):
            counts = [(m.nonfinite, a) for a, outputs in self.arithmetics.items() for m in outputs if m.output == name]
            (before, after), arithmetic = max(counts, key=lambda count: count[0][::-1])
            if after:
                lines.append(f"{name}: values that are NaN or infinite in the result and not in the float model: {after} ({arithmetic})")
            elif before:
                lines.append(f"{name}: values that are NaN or infinite in the float model and not in the result: {before} ({arithmetic})")
        return lines


def severity(error: float) -> float:
    """Return the sort key of errors: NaN is the worst."""
    return math.inf if math.isnan(error) else error


def _digits(m: OutputMetrics) -> tuple[str, ...]:
    """Format metrics with the digits that reports show."""
    texts = (f"{m.sqnr_db:.2f}", f"{m.cosine:.5f}", f"{m.max_error:.3g}", f"{m.top1 or 0:.4f}", f"{m.kl or 0:.5f}")
    return (*texts, str(m.nonfinite))
