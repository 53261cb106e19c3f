"""The user's own measure of a model: a function of its predictions, or a script that has one, which returns a number."""

from __future__ import annotations

import importlib.util
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import numpy.typing as npt

from magr_onnx.errors import MagrError, OptionError
from magr_onnx.report.validation import MetricResult, amount
from magr_onnx.runtime.data.sources import Batches
from magr_onnx.runtime.ort.session import Model, Session

Function = Callable[["Predictions"], Any]
USUAL = "metric"  # function of a script of several, where none is named


class Predictions:
    """What a model puts out on data, batch by batch: dicts of arrays by name, of its outputs and of its inputs.

    Samples are in the order of the data, and each is there once, also where the model takes more at a time than there were left. Every
    iteration runs the model.
    """

    def __init__(self, session: Session, data: Batches) -> None:
        """Nothing runs until it is iterated over."""
        self._session, self._data = session, data

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self._data)

    def __iter__(self) -> Iterator[dict[str, npt.NDArray[Any]]]:
        starts = self._data.starts or range(len(self._data))
        order, waiting = iter(sorted(range(len(self._data)), key=lambda index: starts[index])), dict[int, dict[str, Any]]()
        following = next(order, None)
        for index, batch in enumerate(self._data):
            results = zip(self._session.outputs, self._session.run(batch), strict=True)
            waiting[index] = {name: self._unrepeated(index, array) for name, array in (*batch.items(), *results)}
            while following in waiting:
                yield waiting.pop(following)
                following = next(order, None)

    def _unrepeated(self, index: int, array: Any) -> Any:
        """Return an array without the samples that were repeated to fill a batch."""
        weight = self._data.weight(index)
        if weight == 1 or not self._data.sizes or not np.ndim(array):
            return array
        count = round(self._data.sizes[index])
        return array[:count] if len(array) == round(count / weight) else array


@dataclass(frozen=True, slots=True)
class Metric:
    """A function of `Predictions` that returns a number, the higher the better.

    Attributes:
        name: Its name, for the report.
        where: Its script and name, for messages.
        function: What is called.
    """

    name: str
    where: str
    function: Function

    @staticmethod
    def of(value: Function | str | os.PathLike[str]) -> Metric:
        """Make one of a function, or of ``SCRIPT.py`` or ``SCRIPT.py:FUNCTION``.

        Raises:
            OptionError: It is neither, the script does not run, or it has no such function.
        """
        if callable(value):
            name = getattr(value, "__name__", type(value).__name__)
            return Metric(name, name, value)
        if not isinstance(value, str | os.PathLike):
            raise OptionError(f"metric = {value!r}: give a function of predictions, or a script that has one, as 'accuracy.py:top1'")
        path, name = script_of(value)
        functions = _functions(path)
        if not functions:
            raise OptionError(f"metric {path}: it has no function; write one, as def {USUAL}(predictions), that returns a number")
        listed = ", ".join(functions)
        if not name:
            name = USUAL if USUAL in functions else next(iter(functions))
            if len(functions) > 1 and name != USUAL:
                raise OptionError(
                    f"metric {path}: expected one function, or one called {USUAL}, and it has {listed}; name one: {path}:NAME"
                )
        if name not in functions:
            raise OptionError(f"metric {path}: the script has no function {name}; it has {listed}")
        return Metric(name, f"{path}:{name}", functions[name])

    def value(self, model: Model, data: Batches, provider: str = "cpu") -> float:
        """Return what the function says of a model; NaN where it says that.

        Raises:
            OptionError: The function fails, or returns no number.
            RuntimeFailure: The model does not run.
        """
        with Session(model, provider) as session:
            try:
                value = self.function(Predictions(session, data))
            except MagrError:
                raise
            except Exception as error:
                raise OptionError(
                    f"metric {self.where}: {_described(error)}; it gets the predictions, of which each is a dict of arrays by name: "
                    f"{', '.join((*session.outputs, *(i.name for i in session.inputs)))}"
                ) from error
        try:
            if isinstance(value, bool | np.bool_ | str | bytes):
                raise TypeError
            return float(value)
        except (TypeError, ValueError) as error:
            raise OptionError(
                f"metric {self.where}: expected a number, found {type(value).__name__}; return one, the higher the better"
            ) from error


@dataclass(frozen=True, slots=True, eq=False)
class Judge:
    """A metric on data, with its value for the float model.

    Attributes:
        metric: The metric.
        data: What models are run on.
        provider: Where they run.
        float_value: Its value for the float model.
    """

    metric: Metric
    data: Batches
    provider: str
    float_value: float

    @staticmethod
    def of(metric: Metric, model: Model, data: Batches, provider: str) -> Judge:
        """Measure the float model.

        Raises:
            OptionError: The function fails, or returns no finite number.
        """
        value = metric.value(model, data, provider)
        if not math.isfinite(value):
            raise OptionError(f"metric {metric.where}: expected a finite number for the float model, found {value}; mend the function")
        return Judge(metric, data, provider, value)

    @property
    def where(self) -> str:
        """How much data of what, in words."""
        return f"{amount(self.data.samples, len(self.data))} of {self.data.description}"

    def value(self, model: Model) -> float:
        """Return the metric of another model."""
        return self.metric.value(model, self.data, self.provider)

    def compare(self, model: Model) -> MetricResult:
        """Measure a quantized model."""
        return MetricResult(self.metric.name, self.float_value, self.value(model))


def script_of(value: str | os.PathLike[str]) -> tuple[Path, str]:
    """Split ``SCRIPT.py:FUNCTION``; the function is empty where none is named."""
    text = os.fspath(value)
    path, colon, name = text.rpartition(":")
    return (Path(path), name) if colon and path and name.isidentifier() else (Path(text), "")


def _functions(path: Path) -> dict[str, Function]:
    """Run a script, and return the public functions that it defines, by name."""
    if not path.is_file():
        raise OptionError(f"metric {path}: there is no such file; give a Python script, or a function in it, as {path.stem}.py:top1")
    spec = importlib.util.spec_from_file_location(path.stem, path) if path.suffix == ".py" else None
    if spec is None or spec.loader is None:
        raise OptionError(f"metric {path}: expected a Python script, whose name ends in .py")
    module = importlib.util.module_from_spec(spec)
    if (folder := str(path.resolve().parent)) not in sys.path:  # after all else, for what the script imports from beside it
        sys.path.append(folder)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise OptionError(f"metric {path}: the script failed: {_described(error)}") from error
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, FunctionType) and value.__module__ == module.__name__ and not name.startswith("_")
    }


def _described(error: BaseException) -> str:
    """Describe an error in a user's script, with the line where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    line = f" (line {frames[-1].lineno} of {Path(frames[-1].filename).name})" if len(frames) > 1 else ""
    return f"{type(error).__name__}: {error}{line}"
