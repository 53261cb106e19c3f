"""What a target is given and what it gives back."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy.typing as npt

Array = npt.NDArray[Any]
Outputs = dict[str, Array]

TIMEOUT = 900.0
"""Seconds a target may take for all jobs of one call; below pytest's own limit, whose message would say less."""


class EdgeError(RuntimeError):
    """A target could not run a model; the message is what it said."""


@dataclass(frozen=True, slots=True)
class Job:
    """One model file, its inputs, and how onnxruntime is to load it.

    Attributes:
        model: An ``.onnx`` or ``.ort`` file; without external data, where it is to run in a browser.
        feeds: The inputs by name.
        optimize: Whether onnxruntime's graph optimizations are at their default, or off.
        config: Session configuration entries.
    """

    model: Path
    feeds: Mapping[str, Array]
    optimize: bool = True
    config: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one job."""

    outputs: Outputs
    error: str = ""

    def get(self) -> Outputs:
        """The outputs by name.

        Raises:
            EdgeError: There are none.
        """
        if self.error:
            raise EdgeError(self.error)
        return self.outputs


class Target(abc.ABC):
    """Somewhere onnxruntime runs."""

    name: str
    saturates: bool | None
    """Whether its U8S8 kernels add pairs of products in saturating int16 (x86 without VNNI); None where that is unknown."""

    @abc.abstractmethod
    def missing(self) -> str | None:
        """Why it cannot run here, or None."""

    @abc.abstractmethod
    def run(self, jobs: Sequence[Job]) -> list[Answer]:
        """Run all jobs in one start of the target; one answer a job, in order. It does not raise for what a model or a target does."""

    def run_one(self, model: Path, feeds: Mapping[str, Array]) -> Outputs:
        """Run one model.

        Raises:
            EdgeError: The target could not run it.
        """
        return self.run([Job(model, feeds)])[0].get()
