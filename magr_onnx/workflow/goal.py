"""The budget of a run: a size, or a loss."""

from __future__ import annotations

import re
from dataclasses import dataclass

from magr_onnx.config.options import Options
from magr_onnx.core.option_spec import bytes_of
from magr_onnx.errors import OptionError, raise_all

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
