"""The least work in 16 bits, or in float, that keeps a model with static activations of 8 bits within a loss.

In these formats all layers have 8 bits, and what costs accuracy is rounding activations. So a budget of loss is not spent on layers first:
models whose shares of the work in 16 bits rise (`magr_onnx.workflow.wide_inputs`, `magr_onnx.passes.tensors.widths`) are made and measured,
and the first that keeps to the loss is the result. Where values between convolutions cannot have 16 bits, as in qdq-int8, the same share of
the work between them is done in float (`magr_onnx.workflow.rounded_activations`). Only where none of these keeps to the loss, linear layers
become float, too. Ranges of activations, and what each of them costs, are measured once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import onnx_ir as ir

from magr_onnx.core.bisection import Bisection
from magr_onnx.runtime.measure.loss import Reference
from magr_onnx.runtime.measure.sensitivity import Split
from magr_onnx.runtime.ort.session import Session
from magr_onnx.workflow.context import RunContext
from magr_onnx.workflow.goal import Goal
from magr_onnx.workflow.mixed_precision import MEASURED, split_of
from magr_onnx.workflow.prepare import Prepared
from magr_onnx.workflow.request import OptimizeRequest
from magr_onnx.workflow.solve import Solved, solve
from magr_onnx.workflow.solve_or_round import solve_or_round
from magr_onnx.workflow.wide_inputs import NOTHING, is_spent_on_activations, may_be_float, with_share

SHARES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)
"""Of the work, what may be done in 16 bits: tried by bisection, nothing first."""


def solve_within_loss(prepared: Prepared, request: OptimizeRequest, context: RunContext) -> Solved:
    """Solve, with the least share of the work in 16 bits that keeps to the budget, where that is what a budget is spent on.

    Raises:
        MagrError: As `solve_or_round`.
    """
    goal = request.budget
    widens, floats = (may(goal, prepared.plan, context.provider) for may in (is_spent_on_activations, may_be_float))
    if goal is None or prepared.data is None or context.memory.large or not (widens or floats):
        return solve_or_round(prepared, request, context)
    split = None if goal.of_metric else split_of(goal, prepared.data)
    measure = _measure(goal, prepared, split, context)
    tried: dict[float, float] = {}
    context = replace(context, known={})

    def solved_at(share: float, budget: Goal | None = None) -> Solved:
        data = prepared.data if split is None or budget is not None else split.rest
        plan = with_share(prepared.plan, share) if widens and (prepared.layers or not floats) else prepared.plan
        copy = replace(prepared, model=prepared.model.clone(), plan=plan, data=data)  # solving changes it
        return solve(replace(copy, float_share=share if floats else 0.0), replace(request, budget=budget), context)

    def keeps(share: float, solved: Solved) -> bool:
        tried[share] = measure.of_model(solved.model)
        return measure.keeps(tried[share])

    best: Solved | None = None
    notes: list[str] = []
    bisection = Bisection(len(SHARES), first=0)
    while not bisection.finished:
        share = SHARES[bisection.next]
        solved = solved_at(share)
        kept, floats = keeps(share, solved), floats and (solved.rounds or share > 0)
        if kept or not (solved.may_widen or floats):
            best = solved
        if not (kept or solved.may_widen or floats):  # every share makes this model
            notes.append(NOTHING)
            break
        bisection.take(kept)
        del solved  # one quantized model at a time, beside the best
    if best is None:  # the last one is left
        best = solved_at(SHARES[bisection.next])
        keeps(SHARES[bisection.next], best)
    if not any(map(measure.keeps, tried.values())) and prepared.layers:
        best = solved_at(max(tried), goal)
    values = ", ".join(f"{share:.0%}: {tried[share]:.4g}" for share in sorted(tried))
    least = min((share for share in tried if measure.keeps(tried[share])), default=None)
    if least is not None:
        outcome = f"{least:.0%} is the least of these that keeps to it"
    else:
        outcome = "none of these keeps to it, so layers stay float, too" if prepared.layers else "THE GOAL IS MISSED by all of these"
    what = "in float" if not widens else "in 16 bits or float" if floats else "in 16 bits"
    note = f"{goal.text}: by the share of the work that may be {what}, {measure.name} is {values} ({measure.where}); {outcome}"
    return replace(best, notes=[*best.notes, *notes, note])


@dataclass(frozen=True, slots=True)
class _Measure:
    """What models are judged by.

    Attributes:
        name: Of the loss, or of the user's own measure.
        where: What it is measured on, in words.
        of_model: Measures a model.
        keeps: Whether a value keeps to the budget.
    """

    name: str
    where: str
    of_model: Callable[[ir.Model], float]
    keeps: Callable[[float], bool]


def _measure(goal: Goal, prepared: Prepared, split: Split | None, context: RunContext) -> _Measure:
    """Return the user's own measure, or the loss on the batches that are held out."""
    judge = prepared.judge
    if split is None and judge is not None:
        return _Measure(judge.metric.name, judge.where, judge.value, lambda value: value >= goal.least(judge.float_value))
    assert split is not None
    assert goal.loss is not None
    most, held_out = goal.loss, split.held_out.limit(MEASURED)
    with Session(prepared.model, context.provider) as session:
        reference = Reference(session, held_out, context.mask)

    where = f"{len(held_out)} calibration batches held out of all else"
    return _Measure(reference.metric, where, lambda model: reference.loss_of(model, context.provider), lambda loss: loss <= most)
