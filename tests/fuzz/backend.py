"""onnx's own backend tests as models to optimize: as they are, and with all inputs but one frozen into weights.

As a program, ``python -m tests.fuzz.backend [--every N] [--format NAME]`` runs them (every N-th) and prints what became of them.
"""

from __future__ import annotations

import argparse
import functools
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx.backend.test.loader import DATA_DIR, load_model_tests

from magr_onnx.model_io.validate_proto import OLDEST_OPSET
from tests.fuzz import isolated
from tests.fuzz.judge import OPTIONS, Feeds, Outcome, judge


@dataclass(frozen=True, slots=True)
class Case:
    """A model and inputs for it."""

    name: str
    model: onnx.ModelProto
    feeds: Feeds | None


@functools.cache
def corpus() -> tuple[Case, ...]:
    """Every test of the installed onnx that comes with its model, then those that have inputs to freeze."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # onnx's tests overflow on purpose
        plain = tuple(_plain())
    return plain + tuple(frozen for case in plain if (frozen := freeze(case)) is not None)


def _plain() -> Iterator[Case]:
    for test in load_model_tests(kind="node"):
        if test.model is not None and test.data_sets:
            feeds = dict(zip((i.name for i in test.model.graph.input), test.data_sets[0][0], strict=False))
            unknown = any(isinstance(v, onnx.TensorProto) for v in feeds.values())  # types NumPy and onnxruntime's Python cannot pass
            yield Case(f"node/{test.name}", test.model, None if unknown else feeds)
    for kind in ("simple", "pytorch-converted", "pytorch-operator"):
        for test in sorted(load_model_tests(kind=kind), key=lambda t: str(t.name)):
            if test.model_dir is not None:
                yield _from_folder(f"{kind}/{test.name}", Path(test.model_dir))
    for path in sorted(Path(DATA_DIR, "light").glob("*.onnx")):
        model = onnx.load(path)
        yield Case(f"light/{path.stem}", model, _random_feeds(model))


def _from_folder(name: str, folder: Path) -> Case:
    model = onnx.load(folder / "model.onnx")
    if 1 < next((o.version for o in model.opset_import if not o.domain), 1) < OLDEST_OPSET:
        model = onnx.version_converter.convert_version(model, OLDEST_OPSET + 1)  # as the message of the refusal says
    feeds = {}
    for i, value in enumerate(model.graph.input):
        file = folder / "test_data_set_0" / f"input_{i}.pb"
        if not file.exists() or not value.type.HasField("tensor_type"):
            break
        feeds[value.name] = onnx.numpy_helper.to_array(onnx.TensorProto.FromString(file.read_bytes()))
    held = {t.name for t in model.graph.initializer}
    return Case(name, model, feeds if all(v.name in feeds or v.name in held for v in model.graph.input) else None)


def _random_feeds(model: onnx.ModelProto) -> Feeds:
    rng, held = np.random.default_rng(0), {t.name for t in model.graph.initializer}
    return {
        v.name: rng.standard_normal([max(d.dim_value, 1) for d in v.type.tensor_type.shape.dim]).astype(np.float32)
        for v in model.graph.input
        if v.name not in held
    }


def freeze(case: Case) -> Case | None:
    """The case with all inputs but the first of floats made initializers; None where there is nothing to freeze."""
    arrays = {k: v for k, v in (case.feeds or {}).items() if isinstance(v, np.ndarray)}
    floats = [name for name, array in arrays.items() if array.dtype.kind == "f"]
    if case.feeds is None or not floats or len(arrays) < 2:
        return None
    kept = {name: value for name, value in case.feeds.items() if name == floats[0] or name not in arrays}
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    inputs = [v for v in model.graph.input if v.name in kept]
    model.graph.ClearField("input")
    model.graph.input.extend(inputs)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(a, name) for name, a in arrays.items() if name not in kept)
    return Case(f"frozen/{case.name}", model, kept)


def run(case: tuple[Case, str], at: Callable[[str], None]) -> Outcome:
    """One case in one format."""
    return judge(case[0].model, case[0].feeds, OPTIONS[case[1]], at=at)


def all_cases(formats: list[str]) -> list[tuple[Case, str]]:
    return [(case, name) for case in corpus() for name in formats]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--format", action="append", choices=list(OPTIONS))
    parser.add_argument("--worker", action="store_true")
    given = parser.parse_args()
    formats = given.format or list(OPTIONS)
    cases = all_cases(formats)
    if given.worker:
        isolated.serve(cases, run)
        return 0
    return report(cases, formats, range(0, len(cases), given.every))


def report(cases: list[tuple[Case, str]], formats: list[str], chosen: Any) -> int:
    """Run the chosen cases, print the table and the bugs; the number of bugs."""
    arguments = ["--worker", *(word for name in formats for word in ("--format", name))]
    found = list(isolated.outcomes("tests.fuzz.backend", arguments, list(chosen)))
    print(isolated.table([outcome for _, outcome in found]))
    bugs = [(cases[i], outcome) for i, outcome in found if outcome.bug]
    for (case, name), outcome in bugs:
        print(f"BUG {case.name} [{name}]: {outcome.kind}: {outcome.detail[:300]}")
    return len(bugs)


if __name__ == "__main__":
    sys.exit(min(main(), 1))
