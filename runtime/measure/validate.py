"""Comparison of the float and the quantized model on data: outputs, layers, size and latency."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from magr_onnx.core.types import Array
from magr_onnx.errors import ModelError, RuntimeFailure
from magr_onnx.passes.graph.kv_cache import current_mask, pairs
from magr_onnx.report.validation import Latency, LayerMetrics, OutputMetrics, Validation
from magr_onnx.runtime.calibration.mask import kept_rows, masked_outputs
from magr_onnx.runtime.data.sources import Batches, Steps, part_of, with_progress
from magr_onnx.runtime.measure.batch_effect import batch_effect
from magr_onnx.runtime.measure.layer_errors import BATCHES, layer_errors, row_parts, without_equal_nonfinite
from magr_onnx.runtime.measure.operators import operator_shares, rounds_activations
from magr_onnx.runtime.measure.recording import Recording, are_large, bytes_of, open_alone, output_names
from magr_onnx.runtime.ort.session import Arithmetic, Batch, Model, Runner, Session, as_floats

MIN_RUNS = 5  # of each model for a latency, however long they take
DETAILS = ("layers", "latency", "batch")


@dataclass(slots=True)
class _Sums:
    """Running sums of the metrics of one output."""

    signal: float = 0.0
    noise: float = 0.0
    cosine: float = 0.0
    rows: float = 0.0
    max_error: float = 0.0
    rank: int = 0
    logits: bool = False
    agree: float = 0.0
    kl: float = 0.0
    float_loss: float = 0.0
    loss: float = 0.0
    tokens: float = 0.0
    nonfinite: tuple[float, float] = (0.0, 0.0)

    @np.errstate(all="ignore")  # non-finite values are counted and propagate to the metrics
    def add(self, y: Array, y_hat: Array, batch: Batch, mask: str | None, logits: bool, weight: float = 1.0) -> None:
        """Add one batch, weighted by ``weight``, a bounded number of rows at a time."""
        self.rank = y.ndim
        keep = None if mask is None else kept_rows(current_mask(batch, mask), y.shape)
        rows = [np.reshape(v, (-1, np.atleast_1d(v).shape[-1])) for v in (y, y_hat)]
        following = next_tokens(batch, y.shape, keep) if logits else None
        self.logits |= logits
        for part in row_parts(rows[0].shape):
            kept = slice(None) if keep is None else keep[part]
            a, b = (v[part][kept].astype(np.float64) for v in rows)
            if logits:
                self._add_losses(a, b, None if following is None else following[part][kept], weight)
            self._add_rows(a, b, weight)

    def _add_losses(self, a: Array, b: Array, following: npt.NDArray[np.int64] | None, weight: float) -> None:
        self.agree += weight * int((a.argmax(axis=1) == b.argmax(axis=1)).sum())
        la, lb = log_softmax(a), log_softmax(b)
        p = np.exp(la)
        self.kl += weight * float(np.where(p == 0, 0, p * (la - lb)).sum())
        if following is not None:
            rows = np.flatnonzero(following >= 0)
            self.float_loss -= weight * float(la[rows, following[rows]].sum())
            self.loss -= weight * float(lb[rows, following[rows]].sum())
            self.tokens += weight * len(rows)

    def _add_rows(self, a: Array, b: Array, weight: float) -> None:
        a, b = without_equal_nonfinite(a, b)
        bad = (weight * int((~np.isfinite(v)).sum()) for v in (a, b))
        self.nonfinite = (self.nonfinite[0] + next(bad), self.nonfinite[1] + next(bad))
        self.signal += weight * float((a * a).sum())
        self.noise += weight * float(((a - b) ** 2).sum())
        norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        equal = (a == b).all(axis=1)
        self.cosine += weight * float(np.where(equal, 1, (a * b).sum(axis=1) / np.where(norms > 0, norms, 1)).sum())
        self.rows += weight * len(a)
        self.max_error = float(np.maximum(self.max_error, np.abs(a - b).max(initial=0)))  # NaN stays

    @np.errstate(divide="ignore")
    def metrics(self, name: str) -> OutputMetrics:
        return OutputMetrics(
            name,
            float("inf") if self.noise == 0 else float(10 * np.log10(max(self.signal, 1e-300) / self.noise)),
            self.cosine / self.rows,
            self.max_error,
            self.agree / self.rows if self.logits else None,
            self.kl / self.rows if self.logits else None,
            (self.float_loss / self.tokens, self.loss / self.tokens) if self.tokens else None,
            (round(self.nonfinite[0]), round(self.nonfinite[1])),
        )


def is_logits(name: str, rank: int) -> bool:
    """Whether an output holds softmax logits, judged by its name."""
    return "logit" in name.lower() and rank >= 2


def log_softmax(x: Array) -> Array:
    """Compute the log-softmax along the last axis."""
    shifted = x - x.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def next_tokens(batch: Batch, shape: tuple[int, ...], keep: npt.NDArray[np.bool_] | None = None) -> npt.NDArray[np.int64] | None:
    """Return the token that each row of logits predicts, or -1 where none is known.

    Args:
        batch: Inputs, of which ``decoder_input_ids`` or else ``input_ids`` are the tokens ``(B, T)``.
        shape: That of the logits; those at position ``t`` predict the token at ``t + 1``.
        keep: Which rows are real ``(B T,)``; a prediction counts if its position and the token it predicts are. None keeps all.

    Returns:
        Tokens ``(B T,)``; None where the logits are not of shape ``(B, T, V)``, or no sequence has two tokens.
    """
    ids = batch.get("decoder_input_ids", batch.get("input_ids"))
    if ids is None or len(shape) != 3 or shape[:-1] != ids.shape or ids.shape[1] < 2:
        return None
    following = np.full(ids.shape, -1, np.int64)
    following[:, :-1] = ids[:, 1:]
    if keep is not None:
        counted = keep.reshape(ids.shape)
        following[:, :-1][~(counted[:, :-1] & counted[:, 1:])] = -1
    return following.reshape(-1)


def validate(
    float_model: Model,
    quantized_model: Model,
    data: Batches,
    *,
    provider: str = "cpu",
    arithmetics: Sequence[Arithmetic] = tuple(Arithmetic),
    mask: str | None = None,
    details: Collection[str] = DETAILS,
    progress: Steps | None = None,
    seconds: float = 2.0,
) -> Validation:
    """Compare the outputs of both models on the data.

    Args:
        float_model: The reference; always run at the default optimization level.
        quantized_model: The model to compare with it, once per arithmetic.
        data: Batches that fit both models.
        provider: Where to run both.
        arithmetics: Session configurations for the quantized model.
        mask: Input whose zero elements mark rows to leave out of the metrics.
        details: What else to measure, of `DETAILS`: the error at every quantized layer's output (`layer_errors`), the time of both
            models, on the first batch (of large models, that of the runs they are compared by), and what samples lose by being run
            together (`batch_effect`).
        progress: Called with steps done and in total.
        seconds: As in `latency`.

    Raises:
        ModelError: The models have no output in common.
        RuntimeFailure: A model does not load or run.
    """
    sizes = bytes_of(float_model), bytes_of(quantized_model)
    large, times = are_large(*sizes), None
    if large:
        timed = "latency" in details
        outputs, notes, times = _compare_in_turn(float_model, quantized_model, data, provider, arithmetics, mask, progress, timed)
    else:
        with contextlib.ExitStack() as stack:
            reference = stack.enter_context(Session(float_model, provider))
            sessions = {str(a): stack.enter_context(Session(quantized_model, provider, a)) for a in arithmetics}
            outputs, notes = compare_outputs(reference, sessions, data, mask, progress)
    if "batch" in details:
        notes += batch_effect(float_model, quantized_model, data.limit(BATCHES), provider)
    return Validation(
        data.description,
        len(data),
        provider,
        outputs,
        _layers(float_model, quantized_model, data, provider, mask, large, notes) if "layers" in details else (),
        _timed(float_model, quantized_model, data, provider, seconds, times) if "latency" in details else None,
        *sizes,
        tuple(dict.fromkeys([*data.notes, *notes])),
        data.samples,
    )


Compared = tuple[dict[str, tuple[OutputMetrics, ...]], list[str]]
"""Metrics of the outputs by name of the session, and notes."""


def _compare_in_turn(
    float_model: Model,
    quantized_model: Model,
    data: Batches,
    provider: str,
    arithmetics: Sequence[Arithmetic],
    mask: str | None,
    progress: Steps | None,
    timed: bool,
) -> tuple[dict[str, tuple[OutputMetrics, ...]], list[str], Latency | None]:
    """Compare outputs with one session open at a time; return what `compare_outputs` does, and times in the first arithmetic."""
    metrics, notes, times = dict[str, tuple[OutputMetrics, ...]](), list[str](), None
    parts, names = len(arithmetics) + 1, output_names(quantized_model)
    with comparing_with(float_model, data, provider, mask, names, part_of(progress, 0, parts), timed=timed) as compare:
        for i, arithmetic in enumerate(arithmetics):
            compared = compare(quantized_model, arithmetic, part_of(progress, i + 1, parts))
            metrics[str(arithmetic)], notes = compared.outputs, compared.notes
            times = times or compared.latency
    return metrics, notes, times


@dataclass(frozen=True, slots=True)
class InTurn:
    """How a model compares with the one that ran before it.

    Attributes:
        outputs: Metrics of the outputs.
        notes: On outputs that were not compared.
        latency: Times of both, where that was asked for.
    """

    outputs: tuple[OutputMetrics, ...]
    notes: list[str]
    latency: Latency | None


@contextlib.contextmanager
def comparing_with(
    float_model: Model,
    data: Batches,
    provider: str,
    mask: str | None = None,
    outputs: Collection[str] | None = None,
    progress: Steps | None = None,
    losses: bool = True,
    timed: bool = False,
) -> Iterator[Callable[[Model, Arithmetic, Steps | None], InTurn]]:
    """Run the float model once; yield the function that compares another with it, so that one session is open at a time.

    Args:
        float_model: The reference.
        data: Batches that fit all models.
        provider: Where to run them.
        mask: As in `validate`.
        outputs: Names of those to compare; None for all.
        progress: Called with steps done and in total while the float model runs.
        losses: As in `compare_outputs`.
        timed: Whether to compare what the runs take too, of which there are some more where batches are few.

    Raises:
        RuntimeFailure: The model does not load or run; the function raises what `compare_outputs` does.
    """
    with open_alone(float_model, provider) as session:
        masked = masked_outputs(session, session.outputs, data, mask)
        recording = Recording(session, data, session.outputs if outputs is None else outputs, progress)
        first = _times_of_runs(session, data) if timed else []

    def compare(model: Model, arithmetic: Arithmetic, progress: Steps | None) -> InTurn:
        with open_alone(model, provider, arithmetic) as session:
            metrics, notes = compare_outputs(recording, {"": session}, data, mask, progress, masked, losses)
            return InTurn(metrics[""], notes, _latency(first, _times_of_runs(session, data)) if timed else None)

    with recording:
        yield compare


def _times_of_runs(session: Session, data: Batches) -> list[float]:
    """Return the milliseconds of a session's last runs, on all batches but the first, which waits for memory, and some more on it."""
    more = max(0, MIN_RUNS + 1 - len(data))
    for _ in range(more):
        session.run(next(iter(data)))
    return session.milliseconds[1 - more - len(data) :]


def compare_outputs(
    reference: Runner,
    sessions: Mapping[str, Session],
    data: Batches,
    mask: str | None,
    progress: Steps | None = None,
    masked: Collection[str] | None = None,
    losses: bool = True,
) -> Compared:
    """Compare the outputs of several sessions with those of one, which runs once.

    Args:
        reference: The float model.
        sessions: What to compare with it, by name.
        data: Batches that fit them all.
        mask: Input whose zero elements mark rows to leave out of the metrics.
        progress: Called with steps done and in total.
        masked: The outputs that follow the mask, where that is known.
        losses: Whether to measure what is of logits only: top-1, KL, the loss of the next token. It takes most of the time.

    Returns:
        The metrics of the outputs that all have, by name of the session, and notes on those that were not compared.

    Raises:
        ModelError: They have no output in common.
        RuntimeFailure: A model does not run.
    """
    names, notes = _common_outputs(reference, tuple(sessions.values()))
    masked = masked_outputs(reference, names, data, mask) if masked is None else {name for name in masked if name in names}
    masks = dict.fromkeys(names) | dict.fromkeys(masked, mask)
    sums = {key: {n: _Sums() for n in names} for key in sessions}
    skipped: dict[str, str] = {}
    for index, batch in with_progress(data, progress):
        expected = reference.run(batch, names)
        for key, session in sessions.items():
            for name, y, y_hat in zip(names, map(as_floats, expected), map(as_floats, session.run(batch, names)), strict=True):
                if y is None or y_hat is None:
                    skipped[name] = "not floats"
                elif y.shape == y_hat.shape:
                    sums[key][name].add(y, y_hat, batch, masks[name], losses and is_logits(name, np.ndim(y)), data.weight(index))
                else:
                    skipped[name] = "of other shapes than the float model's"
    compared = next(iter(sums.values()), {})
    if losses and [s.rows > 0 and s.rank >= 2 and not s.logits for s in compared.values()] == [True]:
        notes.append(f"top-1 and KL are of outputs called logits, and this one is called {next(iter(compared))}")
    for reason in dict.fromkeys(skipped.values()):
        names = sorted(name for name in skipped if skipped[name] == reason)
        notes.append(f"outputs that are {reason}, and not compared: {', '.join(names)}")
    return {key: tuple(s.metrics(n) for n, s in by_name.items() if s.rows) for key, by_name in sums.items()}, notes


def _common_outputs(reference: Runner, sessions: Sequence[Session]) -> tuple[list[str], list[str]]:
    """Return the names of the outputs to compare, those of all sessions that are no cache, and notes on the others."""
    notes = []
    names = list(reference.outputs)
    for session in sessions:
        if missing := sorted(set(names) ^ set(session.outputs)):
            notes.append(f"outputs only one of the models has: {', '.join(missing)}")
        names = [n for n in names if n in session.outputs]
    if not names:
        outputs = [", ".join(session.outputs) for session in (reference, *sessions)]
        raise ModelError(f"the models have no output in common: {outputs[0]}, and {outputs[1]}; are these two forms of one model?")
    presents = set(pairs((i.name for i in reference.inputs), names).values())
    if presents and not presents.issuperset(names):
        names = [n for n in names if n not in presents]
        notes.append(f"{len(presents)} outputs are the past of the next step, and not compared")
    return names, notes


def _layers(
    float_model: Model, quantized_model: Model, data: Batches, provider: str, mask: str | None, large: bool, notes: list[str]
) -> tuple[LayerMetrics, ...]:
    """Measure errors of layers, or note why not: the models themselves run, but copies of them with more outputs may not."""
    try:
        return layer_errors(float_model, quantized_model, data, provider, mask, large=large)
    except RuntimeFailure as error:
        notes.append(f"errors of layers were not measured: {str(error).splitlines()[0]}")
        return ()


def _timed(float_model: Model, quantized_model: Model, data: Batches, provider: str, seconds: float, times: Latency | None) -> Latency:
    """Time both models, unless that was done, and where one computes in integers, find out where the time goes."""
    times, batch = times or latency(float_model, quantized_model, data, provider, seconds), next(iter(data))
    if not rounds_activations(quantized_model):
        return times
    shares = [operator_shares(model, batch, provider) for model in (float_model, quantized_model)]
    return replace(times, float_operators=shares[0], quantized_operators=shares[1])


def latency(float_model: Model, quantized_model: Model, data: Batches, provider: str, seconds: float = 2.0, threads: int = 0) -> Latency:
    """Time both models on the first batch, in turns, for so many seconds or 5 runs each.

    ``threads`` as in `Session`. Time and ``seconds`` of a single one are those it was given by the processor, whatever else runs there.
    """
    batch, clock = next(iter(data)), time.thread_time if threads == 1 else time.perf_counter
    times: tuple[list[float], list[float]] = ([], [])
    with (
        Session(float_model, provider, threads=threads, spinning=True) as a,
        Session(quantized_model, provider, threads=threads, spinning=True) as b,
    ):
        for session in (a, b):
            session.run(batch)
        begin = clock()
        while len(times[0]) < MIN_RUNS or (clock() - begin < seconds and len(times[0]) < 50):
            order = 1 - 2 * (len(times[0]) % 2)  # alternate: the first to run finds the other's data in the caches
            for of_model, session in [(times[0], a), (times[1], b)][::order]:
                start = clock()
                session.run(batch)
                of_model.append(1000 * (clock() - start))
    return _latency(*times)


def _latency(*times: list[float]) -> Latency:
    """Summarize times of the float and the quantized model, as many of each."""
    (low, median, high), (quantized_low, quantized_median, quantized_high) = (map(float, np.quantile(t, (0.25, 0.5, 0.75))) for t in times)
    ratios = median_interval(np.divide(times[1], times[0]))
    return Latency(median, quantized_median, len(times[0]), (low, high), (quantized_low, quantized_high), ratios)


def median_interval(values: Array) -> tuple[float, float, float]:
    """Return the median of independent values between the ends of its 95% confidence interval, which are two of the values.

    Each value lies below the true median with a probability of one half, whatever the distribution (sign test). Fewer than six values
    cannot give 95%: their extremes, which give 94% for five.
    """
    ordered, n = np.sort(values), len(values)
    tails = np.cumsum([math.comb(n, k) for k in range(n)]) / 2.0**n  # of at most k values below the median
    left_out = int(np.count_nonzero(tails <= 0.025))
    first = max(left_out - 1, 0)
    return float(ordered[first]), float(np.median(ordered)), float(ordered[n - 1 - first])
