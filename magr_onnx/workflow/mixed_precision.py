"""Mixed precision under a budget of size or loss: bits and blocks for every layer, from measured sensitivities.

    argmin  sum of losses   subject to   bytes of the written file <= budget        (``target_size``)
    argmin  bytes           subject to   sum of losses <= budget                    (``max_loss``)

over one choice for every layer: bits and block size as the format and the accumulator allow, or float. Losses come from
`magr_onnx.runtime.measure.sensitivity`, bytes from the emitters (`magr_onnx.workflow.size_model`), the solution from
`magr_onnx.core.knapsack`.
"""

from __future__ import annotations

import itertools
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
from magr_onnx.workflow.conv_choices import ConvChoices
from magr_onnx.workflow.goal import Goal

FLOAT = Choice()
BITS = (2, 4, 8)  # 3-bit codes are stored in 4 bits: as many bytes, more loss
REFERENCES = (2, 4)
ATTEMPTS = 3
STAMP = 1024  # bytes of metadata at most, beside the pipeline's text
MEASURED = 8  # batches the result is measured on, at most


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


def check_layers(goal: Goal | None, layers: Sequence[LinearLayer]) -> None:
    """Refuse a budget where there is no linear layer to choose bits for, and no convolution.

    Raises:
        OptionError: There is none.
    """
    if goal is not None and not layers:
        raise OptionError(
            f"{goal.text}: a budget chooses the bits of linear layers, and there is none to convert; leave it out (it chooses those of "
            "convolutions that compute in float too, where conv_bits is not given; tables of embeddings have embedding_bits)"
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
        convolutions: What its convolutions may become; None where there are none, or nothing to choose for them.
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
    convolutions: ConvChoices | None = None

    def size(self, plans: Mapping[str, Plan], conv_bits: Mapping[str, int] | None = None) -> int:
        """Bytes of the result with the layers named in ``plans`` and ``conv_bits`` converted, beside those that have no choice."""
        model = size_model.converted(self.model, {**self.fixed, **plans}, self.grids)
        if self.convolutions is not None:
            self.convolutions.write(model, conv_bits or {})
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
        convolutions = source.convolutions
        if not source.layers and convolutions is None:
            raise OptionError(f"{goal.text}: every layer has bits of its own, so that there is nothing to choose; leave the budget out")
        self.goal, self.source, self.plans = goal, source, choices
        linear = [[layer.name for layer in group] for group in size_model.by_tensor(source.layers)]
        columns = [size_model.changes(source.model, linear, plan, source.grids) for plan in choices.values()]
        self.items, self._linear = linear, len(linear)
        self._choices = [[*choices, FLOAT]] * len(linear)
        self._costs = [np.array([*(float(column[i]) for column in columns), 0.0]) for i in range(len(linear))]
        if convolutions is not None:
            self.items = [*linear, *convolutions.items]
            self._choices = [*self._choices, *([[*(Choice(b) for b in convolutions.bits), FLOAT]] * len(convolutions.items))]
            self._costs += [np.array([*convolutions.changes(source.model, names), 0.0]) for names in convolutions.items]
        self._base = source.size({})
        self.attempts: list[Attempt] = []
        if goal.loss is None:
            self._target = self._bytes(goal)
            least = self._size([int(np.argmin(costs)) for costs in self._costs])
            if least > self._target:
                raise OptionError(
                    f"{goal.text}: that is {self._target:,} bytes, and the smallest possible is {least:,} ({least / source.bytes:.1%} of "
                    f"the source); ask for that much, or convert more{_in_float(source.model)}"
                )

    def solve(self, losses: Callable[[str, Choice], float]) -> None:
        """Choose, given the loss of a layer, by name, at a choice."""

        def loss(item: int, choice: Choice) -> float:
            names = self.items[item]
            if item < self._linear:
                return sum(losses(name, choice) for name in names)
            assert self.source.convolutions is not None
            assert choice.bits is not None
            return self.source.convolutions.losses[names[0], choice.bits]

        self._items = [
            knapsack.Item(self._costs[i], np.array([*(loss(i, choice) for choice in choices if choice != FLOAT), 0.0]))
            for i, choices in enumerate(self._choices)
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
        layers = Counter(dict.fromkeys((*self.plans, *itertools.chain(*self._choices)), 0))
        for names, choice in zip(self.items, self._chosen(self._point.choices), strict=True):
            layers[choice] += len(names)
        kept = layers.pop(FLOAT)  # the last in the text
        return [f"{count} x {choice_label(c.bits, c.block_size)}" for c, count in [*layers.items(), (FLOAT, kept)] if count]

    def conv_bits(self) -> dict[str, int]:
        """The bits of every convolution that is converted, by the first name of those with its weight."""
        return self._conv_bits(self._point.choices)

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
        self._attempt(measured)
        if self._meets(measured) or len(self.attempts) == ATTEMPTS:
            return True
        assert self.goal.loss is not None
        self._point = self._within_loss(self._point.loss * self.goal.loss / measured)
        return False

    def _attempt(self, measured: float) -> None:
        self.attempts.append(Attempt(self._size(self._point.choices), self._point.loss, measured))

    def _meets(self, measured: float) -> bool:
        """Return whether a result keeps to the budget."""
        return self.goal.loss is None or measured <= self.goal.loss

    def report(self, metric: str, measured_on: str, measure: str = "") -> Assignment:
        """What was decided; ``measure`` is the name of what was measured, where that is not ``metric``."""
        rows = [
            ChoiceRow(tuple(names), choice.bits, choice.block_size, int(item.costs[j]), float(item.losses[j]))
            for names, item, j, choice in zip(self.items, self._items, self._point.choices, self._chosen(self._point.choices), strict=True)
        ]
        shift = self.attempts[-1].bytes - self._point.cost  # what is not tensors of layers
        same = self.plans if self._linear else self._choices[0][:-1]
        points = [(choice, knapsack.point(self._items, self._uniform(choice))) for choice in same]
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

    def _chosen(self, choices: Sequence[int]) -> list[Choice]:
        """Return what the numbers of a point stand for."""
        return [of_item[j] for of_item, j in zip(self._choices, choices, strict=True)]

    def _assigned(self, choices: Sequence[int]) -> dict[str, Plan]:
        pairs = list(zip(self.items, self._chosen(choices), strict=True))[: self._linear]
        return {name: self.plans[choice] for names, choice in pairs if choice != FLOAT for name in names}

    def _conv_bits(self, choices: Sequence[int]) -> dict[str, int]:
        pairs = list(zip(self.items, self._chosen(choices), strict=True))[self._linear :]
        return {names[0]: choice.bits for names, choice in pairs if choice.bits is not None}

    def _size(self, choices: Sequence[int]) -> int:
        """Return the bytes of the result with these choices."""
        return self.source.size(self._assigned(choices), self._conv_bits(choices))

    def _uniform(self, choice: Choice) -> list[int]:
        """Return the numbers of one choice for all; of convolutions, those of the bits that are nearest."""
        numbers = [of_item.index(choice) for of_item in self._choices[: self._linear]]
        for of_item in self._choices[self._linear :]:
            differences = [abs(each.bits - (choice.bits or 0)) for each in of_item if each.bits is not None]
            numbers.append(differences.index(min(differences)))
        return numbers

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
        return self._size(self._uniform(choice))

    def _within_size(self) -> knapsack.Point:
        """The least loss whose file, nodes and names included, is no larger than the target."""
        room = float(self._target - self._base)
        while (point := knapsack.least_loss(self._items, room)) is not None:
            excess = self._size(point.choices) - self._target
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
        losses: Mapping[str, sensitivity.Sensitivity] = {}
        if source.layers:
            losses, effects = sensitivity.measure(model, source.layers, choices, references, split, calibration, gram_budget, progress)
            self.metric = effects.metric
        elif source.convolutions is not None:
            self.metric = source.convolutions.metric
        self.solve(lambda name, choice: losses[name].loss(choice))
        self.calibration = replace(calibration, data=split.rest) if holds_out else calibration
        part = "held out of all else" if holds_out else "held out of the sensitivities"
        self.measured_on = f"{min(len(split.held_out), MEASURED)} calibration batches {part}"
        with Session(source.reference or source.model, provider) as session:
            self._reference = Reference(session, split.held_out.limit(MEASURED), calibration.mask)

    def measure(self, work: ir.Model) -> float:
        """Return the loss of a quantized model."""
        return self._reference.loss_of(work, self.calibration.provider)

    def outcome(self) -> Assignment:
        """Return what was decided, for the report."""
        return self.report(self.metric, self.measured_on)


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
