"""Mixed precision under a budget of size or loss: bits and blocks for every layer, from measured sensitivities.

    argmin  sum of losses   subject to   bytes of the written file <= budget        (``target_size``)
    argmin  bytes           subject to   sum of losses <= budget                    (``max_loss``)

over one choice for every layer: bits and block size as the format and the accumulator allow, or float. Losses come from
`magr_onnx.runtime.measure.sensitivity`, bytes from the emitters (`magr_onnx.workflow.size_model`), the solution from
`magr_onnx.core.knapsack`.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from magr_onnx.config.options import Options
from magr_onnx.config.plans import plan_of
from magr_onnx.core import knapsack
from magr_onnx.core.option_spec import bytes_of
from magr_onnx.core.types import Choice
from magr_onnx.errors import CalibrationError, OptionError, raise_all
from magr_onnx.model_io import files, writing
from magr_onnx.passes.emit import FORMATS
from magr_onnx.passes.layers import embedding, recurrent
from magr_onnx.passes.layers.linear import LinearLayer
from magr_onnx.passes.plan import Plan
from magr_onnx.report.mixed_precision import Assignment, Attempt, ChoiceRow, TradeOff, choice_label
from magr_onnx.report.reasons import Reason, Skip
from magr_onnx.runtime.calibration.context import CalibrationContext, Grids
from magr_onnx.runtime.data.sources import Batches, Steps
from magr_onnx.runtime.measure import sensitivity
from magr_onnx.runtime.measure.loss import Reference
from magr_onnx.runtime.ort.session import Session
from magr_onnx.workflow import size_model

FLOAT = Choice()
BITS = (2, 4, 8)  # 3-bit codes are stored in 4 bits: as many bytes, more loss
REFERENCES = (2, 4)
ATTEMPTS = 3
STAMP = 1024  # bytes of metadata at most, beside the pipeline's text
MEASURED = 8  # batches the result is measured on, at most
_SIZE = re.compile(r"\s*(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>%|bits?)\s*")
_LOSS = re.compile(r"\s*(?P<number>\d+(?:\.\d+)?(?:e-?\d+)?)\s*(?P<percent>%?)\s*")


@dataclass(frozen=True, slots=True)
class Goal:
    """What was asked for.

    Attributes:
        text: In words.
        size: A size, if that was asked for.
        unit: Of the size: ``%`` of the source, ``bit`` for that of a uniform model, or bytes.
        loss: A loss, if that was asked for.
        of_metric: Whether the loss is of the user's own measure.
        relative: Whether it is a fraction of the float model's.
    """

    text: str
    size: float | None = None
    unit: str = ""
    loss: float | None = None
    of_metric: bool = False
    relative: bool = False

    def least(self, float_value: float) -> float:
        """Return the least value of the user's own measure that keeps to the loss."""
        assert self.loss is not None
        return float_value - self.loss * (abs(float_value) if self.relative else 1)


def goal_of(options: Options, has_metric: bool = False) -> Goal | None:
    """The budget among the options, if there is one; ``has_metric``: a loss is of the user's own measure.

    Raises:
        OptionError: Both budgets, one that cannot be read, or bits that the budget is to choose.
    """
    size, loss = options.get("target_size"), options.get("max_loss")
    if size is None and loss is None:
        return None
    problems = []
    if size is not None and loss is not None:
        problems.append("give target_size or max_loss, not both")
    if options.get("bits") is not None:
        problems.append(f"bits={options['bits']} with a budget: the budget chooses the bits of every layer; leave them out")
    goal = None
    if size is not None:
        match, size_in_bytes = _SIZE.fullmatch(size), bytes_of(size)
        if not (size_in_bytes or (match is not None and float(match["number"]) > 0)):
            problems.append(f"target_size={size!r}: give a share of the source ('25%'), the size of a uniform model ('4bit'), or '30 MB'")
        elif match is None:
            goal = Goal(f"target size {size}", size_in_bytes, "B")
        else:
            goal = Goal(f"target size {size}", float(match["number"]), match["unit"].removesuffix("s"))
    elif loss is not None:
        goal = _loss_goal(loss, has_metric)
        if goal is None and has_metric:
            problems.append(f"max_loss={loss!r}: give a loss of the metric, as '1%' of the float model's or '0.01'; 0 for none")
        elif goal is None:
            problems.append(
                f"max_loss={loss!r}: give a loss above 0 and at most 1, as '1%' or '0.01': of the mean KL divergence in nats (logits), or "
                "of 1 - mean cosine (other outputs)"
            )
    raise_all(OptionError, problems)
    return goal


def split_of(goal: Goal, data: Batches) -> sensitivity.Split:
    """Split the data, of which some is held out where the loss of a budget is measured on it.

    Raises:
        CalibrationError: There is no batch that could have no part in the quantization.
    """
    if goal.loss is not None and not goal.of_metric and len(data) < 2:
        raise CalibrationError(
            f"{goal.text} needs at least two batches of calibration data, one of them held out; got {len(data)} ({data.description}): "
            "give more samples, or a smaller batch size"
        )
    return sensitivity.Split.of(data)


def _loss_goal(text: str, of_metric: bool) -> Goal | None:
    """The goal of ``max_loss``; None where it cannot be read, or is out of range."""
    match = _LOSS.fullmatch(text)
    if match is None:
        return None
    percent = bool(match["percent"])
    most = float(match["number"]) / (100 if percent else 1)
    if of_metric:
        return Goal(f"loss of the metric at most {text}", loss=most, of_metric=True, relative=percent)
    return Goal(f"loss at most {text}", loss=most) if 0 < most <= 1 else None


def check_layers(goal: Goal | None, layers: Sequence[LinearLayer]) -> None:
    """Refuse a budget where there is no linear layer to choose bits for.

    Raises:
        OptionError: There is none.
    """
    if goal is not None and not layers:
        raise OptionError(
            f"{goal.text}: a budget chooses the bits of linear layers, and there is none to convert; leave it out (convolutions have "
            "conv_bits, tables of embeddings embedding_bits)"
        )


def choices_of(options: Options, provider: str = "cpu") -> dict[Choice, Plan]:
    """Everything a layer may become but float, with its plan: what the format, the accumulator and the provider take.

    Raises:
        OptionError: Nothing is possible; with the reasons.
    """
    rest: Options = {**options}
    for name in ("target_size", "max_loss"):
        rest.pop(name, None)  # type: ignore[misc]
    kernels = FORMATS[options.get("format", next(iter(FORMATS)))].kernel_blocks
    known = {block for blocks in kernels.values() for block in blocks}
    choices: dict[Choice, Plan] = {}
    problems = []
    for bits in [bits for bits in BITS if bits in kernels]:
        for block in (options["block_size"],) if "block_size" in options else kernels[bits]:
            if block in known and block not in kernels[bits]:
                continue
            each: Options = {**rest, "bits": bits, "block_size": block}
            try:
                choices[Choice(bits, block)] = plan_of(each, provider=provider).suited(provider)
            except OptionError as error:
                problems.append(str(error))
    if not choices:
        raise_all(OptionError, dict.fromkeys(problems))
    return choices


def references_of(choices: Iterable[Choice]) -> list[Choice]:
    """The choices whose effect is measured: one of 2 and one of 4 bits, of block 32 or as near as may be; else the first there is."""
    references = []
    for bits in REFERENCES:
        blocks = [c.block_size for c in choices if c.bits == bits]
        if blocks:
            references.append(Choice(bits, 32 if 32 in blocks else blocks[0]))
    return references or list(choices)[:1]


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """The model a plan is for.

    Attributes:
        model: The float model, prepared for what will be written.
        layers: Its layers.
        bytes: Size of the source as it came.
        file: Whether a file will be written, whose every byte counts; else tensors count.
        stamp: Bytes of metadata that will be added.
        reference: The float model results are compared with, where ``model`` is quantized in part; None for ``model``.
        tapped: ``model`` with what layers in bodies read as values of the main graph; None for ``model``.
        fixed: Plans of layers that have no choice, by name; they are not among ``layers``.
        grids: The 8-bit grids of inputs and products; None where they stay float.
    """

    model: ir.Model
    layers: Sequence[LinearLayer]
    bytes: int
    file: bool
    stamp: int
    reference: ir.Model | None = None
    tapped: ir.Model | None = None
    fixed: Mapping[str, Plan] = field(default_factory=dict)
    grids: Grids | None = None

    def size(self, plans: Mapping[str, Plan]) -> int:
        """Bytes of the result with the layers named in ``plans`` converted, beside those that have no choice."""
        model = size_model.converted(self.model, {**self.fixed, **plans}, self.grids)
        if not self.file:
            return files.model_bytes(model) + self.stamp
        with tempfile.TemporaryDirectory(prefix="onnx-magr-") as folder:
            return writing.save(model, Path(folder, "blank.onnx")) + self.stamp


class Allocation:
    """The choice of every layer, made from what was measured, and made again where the result loses more than it may."""

    def __init__(self, goal: Goal, source: Source, choices: Mapping[Choice, Plan]) -> None:
        """Find what every choice costs, before anything is measured; `solve` comes next.

        Args:
            goal: The budget.
            source: The model.
            choices: All but float, with their plans.

        Raises:
            OptionError: No choices are small enough; the message gives the smallest size.
        """
        if not source.layers:
            raise OptionError(f"{goal.text}: every layer has bits of its own, so that there is nothing to choose; leave the budget out")
        self.goal, self.source, self.plans = goal, source, choices
        self.items = _shared(source.layers)
        self.choices = [*choices, FLOAT]
        columns = [size_model.changes(source.model, self.items, plan, source.grids) for plan in choices.values()]
        self._costs = [np.array([*(float(column[i]) for column in columns), 0.0]) for i in range(len(self.items))]
        self._base = source.size({})
        self.attempts: list[Attempt] = []
        if goal.loss is None:
            self._target = self._bytes(goal)
            least = source.size(self._assigned([int(np.argmin(costs)) for costs in self._costs]))
            if least > self._target:
                raise OptionError(
                    f"{goal.text}: that is {self._target:,} bytes, and the smallest possible is {least:,} ({least / source.bytes:.1%} of "
                    f"the source); ask for that much, or convert more{_in_float(source.model)}"
                )

    def solve(self, losses: Callable[[str, Choice], float]) -> None:
        """Choose, given the loss of a layer, by name, at a choice."""
        self._items = [
            knapsack.Item(costs, np.array([*(sum(losses(name, choice) for name in names) for choice in self.plans), 0.0]))
            for names, costs in zip(self.items, self._costs, strict=True)
        ]
        self._point = self._first()

    def _first(self) -> knapsack.Point:
        """Return the choices to begin with."""
        return self._within_size() if self.goal.loss is None else self._within_loss(self.goal.loss)

    def assigned(self) -> dict[str, Plan]:
        """The plan of every layer that is converted, by its name."""
        return {**self.source.fixed, **self._assigned(self._point.choices)}

    def counts(self) -> list[str]:
        """How many layers have which choice, in words."""
        layers = Counter(dict.fromkeys(range(len(self.choices)), 0))
        for names, j in zip(self.items, self._point.choices, strict=True):
            layers[j] += len(names)
        labels = [choice_label(c.bits, c.block_size) for c in self.choices]
        return [f"{count} x {label}" for label, count in zip(labels, layers.values(), strict=True) if count]

    def stamp(self, work: ir.Model) -> None:
        """Say in the model's metadata what its layers are, where its pipeline says what they would be without a budget."""
        work.metadata_props["onnx_magr.mixed"] = "; ".join([self.goal.text, *self.counts()])

    def select(self, layers: Sequence[LinearLayer]) -> tuple[list[LinearLayer], list[Skip]]:
        """Those to convert, and those that stay float."""
        plans = self.assigned()
        kept = [Skip(layer.name, layer.op, Reason.BUDGET) for layer in layers if layer.name not in plans]
        return [layer for layer in layers if layer.name in plans], kept

    def accepts(self, measured: float) -> bool:
        """Take note of a result's loss. Where it is more than it may be, plan again, for less by the ratio it was missed by."""
        self.attempts.append(Attempt(self.source.size(self.assigned()), self._point.loss, measured))
        if self._meets(measured) or len(self.attempts) == ATTEMPTS:
            return True
        assert self.goal.loss is not None
        self._point = self._within_loss(self._point.loss * self.goal.loss / measured)
        return False

    def _meets(self, measured: float) -> bool:
        """Return whether a result keeps to the budget."""
        return self.goal.loss is None or measured <= self.goal.loss

    def report(self, metric: str, measured_on: str, measure: str = "") -> Assignment:
        """What was decided; ``measure`` is the name of what was measured, where that is not ``metric``."""
        rows = [
            ChoiceRow(tuple(names), self.choices[j].bits, self.choices[j].block_size, int(item.costs[j]), float(item.losses[j]))
            for names, item, j in zip(self.items, self._items, self._point.choices, strict=True)
        ]
        shift = self.attempts[-1].bytes - self._point.cost  # what is not tensors of layers
        points = [(choice, knapsack.point(self._items, [j] * len(self._items))) for j, choice in enumerate(self.plans)]
        uniform = [TradeOff(round(p.cost + shift), p.loss, choice_label(choice.bits, choice.block_size)) for choice, p in points]
        return Assignment(
            self.goal.text,
            metric,
            measured_on,
            self.source.bytes,
            tuple(self.attempts),
            self._meets(self.attempts[-1].measured),
            tuple(rows),
            tuple(TradeOff(round(p.cost + shift), p.loss) for p in knapsack.curve(self._items)),
            tuple(uniform),
            measure,
        )

    def _assigned(self, choices: Sequence[int]) -> dict[str, Plan]:
        pairs = zip(self.items, (self.choices[j] for j in choices), strict=True)
        return {name: self.plans[choice] for names, choice in pairs if choice != FLOAT for name in names}

    def _bytes(self, goal: Goal) -> int:
        """The size asked for."""
        assert goal.size is not None
        if goal.unit == "%":
            return int(goal.size / 100 * self.source.bytes)
        if goal.unit != "bit":
            return int(goal.size)
        blocks = [c.block_size for c in self.plans if c.bits == goal.size]
        if not blocks:
            possible = ", ".join(f"{b}bit" for b in sorted({c.bits or 0 for c in self.plans}))
            raise OptionError(f"{goal.text}: no layer can have these bits here; there are {possible}")
        choice = Choice(int(goal.size), 32 if 32 in blocks else blocks[0])
        return self.source.size({layer.name: self.plans[choice] for layer in self.source.layers})

    def _within_size(self) -> knapsack.Point:
        """The least loss whose file, nodes and names included, is no larger than the target."""
        room = float(self._target - self._base)
        while (point := knapsack.least_loss(self._items, room)) is not None:
            excess = self.source.size(self._assigned(point.choices)) - self._target
            if excess <= 0:
                return point
            room = point.cost - excess
        return knapsack.smallest(self._items)

    def _within_loss(self, loss: float) -> knapsack.Point:
        point = knapsack.least_cost(self._items, loss)
        assert point is not None  # float loses nothing
        return point


class Search(Allocation):
    """An allocation made from measured sensitivities (see `magr_onnx.runtime.measure.sensitivity.measure`).

    Attributes:
        calibration: What layers are calibrated with: without the batches that a loss is measured on.
        metric: What a loss is of.
        measured_on: The batches that results are measured on, in words.
    """

    def __init__(
        self, goal: Goal, options: Options, source: Source, calibration: CalibrationContext, gram_budget: int, progress: Steps
    ) -> None:
        """Measure the sensitivities, and plan.

        Raises:
            OptionError: No choice is possible, or none small enough.
            CalibrationError: A loss is asked for, and there is no batch to measure it on that had no part in the quantization.
        """
        data, provider = calibration.data, calibration.provider
        holds_out = goal.loss is not None and not goal.of_metric
        split, choices = split_of(goal, data), choices_of(options, provider)
        super().__init__(goal, source, choices)
        model, references = source.tapped or source.model, references_of(choices)
        losses, effects = sensitivity.measure(model, source.layers, choices, references, split, calibration, gram_budget, progress)
        self.solve(lambda name, choice: losses[name].loss(choice))
        self.calibration = replace(calibration, data=split.rest) if holds_out else calibration
        part = "held out of all else" if holds_out else "held out of the sensitivities"
        self.metric, self.measured_on = effects.metric, f"{min(len(split.held_out), MEASURED)} calibration batches {part}"
        with Session(source.reference or source.model, provider) as session:
            self._reference = Reference(session, split.held_out.limit(MEASURED), calibration.mask)

    def measure(self, work: ir.Model) -> float:
        """Return the loss of a quantized model."""
        with Session(work, self.calibration.provider) as session:
            return self._reference.loss(session.run)

    def outcome(self) -> Assignment:
        """Return what was decided, for the report."""
        return self.report(self.metric, self.measured_on)


def _shared(layers: Sequence[LinearLayer]) -> list[list[str]]:
    """Names of layers, those with one weight together."""
    names: dict[int, list[str]] = {}
    for layer in layers:
        names.setdefault(id(layer.weight.stored), []).append(layer.name)
    return list(names.values())


def _in_float(model: ir.Model) -> str:
    """What a budget cannot make smaller, but an option can, as the end of a message."""
    tables = {table.weight_name: table.weight.stored.nbytes for table in embedding.find(model)[0]}
    weights = {layer.weight_key: layer.bytes for layer in recurrent.find(model)[0]}
    kinds = (
        (sum(tables.values()), "tables of embeddings", "--embeddings gather-block-quantized --embedding-bits 4"),
        (sum(weights.values()), "LSTM, GRU and RNN", "--recurrent fold"),
    )
    texts = [f"{what} are {size:,} bytes in float ({option})" for size, what, option in kinds if size]
    return f": {', '.join(texts)}" if texts else ""
