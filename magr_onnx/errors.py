"""The exception tree. Everything the library raises deliberately is a `MagrError` with a remedy in its message."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence


class MagrError(Exception):
    """Base of every error this package raises deliberately; the command line prints it without a traceback.

    Attributes:
        problems: What is wrong, one text each; the message has all of them.
    """

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)
        self.problems: tuple[str, ...] = (str(self),)


class ModelError(MagrError):
    """The input is not a usable ONNX model (not ONNX, truncated, invalid, external data missing)."""


class CalibrationError(MagrError):
    """The calibration or validation data does not fit the model, or is empty."""


class NonFiniteError(MagrError):
    """A weight, an activation or a Gram matrix holds NaN or infinity."""


class OptionError(MagrError):
    """An option, or a combination of options, that the target cannot run."""


class PipelineError(OptionError):
    """A textual pipeline that does not parse, or names an unknown pass or option."""


class RecipeError(OptionError):
    """A recipe that does not parse, or names unknown keys or impossible values."""


class OutputError(MagrError):
    """The output cannot be written to its path."""


class ReportError(MagrError):
    """A file that is no report, or one of a newer version."""


class ProviderError(MagrError):
    """The execution provider is not available in the installed onnxruntime."""


class ExportError(MagrError):
    """A torch module that torch cannot export to ONNX."""


class DependencyError(MagrError, ImportError):
    """A package of an optional extra is not installed."""


class RuntimeFailure(MagrError):
    """onnxruntime could not load or run a model."""


def joined(kind: type[MagrError], problems: Sequence[str]) -> MagrError:
    """Return one ``kind`` that lists every problem on its own line."""
    several = f"{len(problems)} problems:\n" + "\n".join(f"  - {problem}" for problem in problems)
    error = kind(problems[0] if len(problems) == 1 else several)
    error.problems = tuple(problems)
    return error


def raise_all(kind: type[MagrError], problems: Iterable[str | None]) -> None:
    """Raise one ``kind`` that lists every problem on its own line, None for no problem left out; do nothing when there is none."""
    if texts := [problem for problem in problems if problem is not None]:
        raise joined(kind, texts)


def do_all(steps: Iterable[Callable[[], None]]) -> None:
    """Run every step even if others fail; then raise the error, or one of the first kind that lists all of them."""
    errors: list[MagrError] = []
    for step in steps:
        try:
            step()
        except MagrError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise_all(type(errors[0]), [problem for error in errors for problem in error.problems])


@contextlib.contextmanager
def translate_resource_errors() -> Iterator[None]:
    """Convert exhausted memory or stack to a `MagrError`. Wraps every public function."""
    try:
        yield
    except MemoryError as error:
        raise MagrError(
            f"out of memory ({error or 'no size is known'}); give smaller batches, a smaller gram budget, or a machine with more"
        ) from error
    except RecursionError as error:
        raise ModelError("the model is nested too deeply: subgraphs in subgraphs, or functions that call functions") from error


def listed(names: Sequence[str], separator: str = ", ") -> str:
    """Join the first three names and count the rest: ``a, b, c and 2 more``."""
    return separator.join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def short_repr(value: object) -> str:
    """Return the repr of a value in at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def install(extra: str) -> str:
    """Return the command that installs an extra, for error messages."""
    return f"pip install 'onnx-magr[{extra}]', or pip install '.[{extra}]' in a clone"


def choose_one(value: object, choices: Iterable[object]) -> str:
    """Return ``choose one of ...`` for a wrong value, with the choices closest to it."""
    names = list(map(str, choices))
    return f"choose one of {', '.join(names)}{closest(str(value), names)}"


def closest(name: str, names: Iterable[str]) -> str:
    """Return ``; did you mean ...?`` with the names closest to a wrong one; empty where none is close."""
    import difflib  # slow to import

    matches = difflib.get_close_matches(name.replace("-", "_").lower(), list(names), 3, 0.6)
    return f"; did you mean {' or '.join(map(repr, matches))}?" if matches else ""
