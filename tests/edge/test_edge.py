"""Our files, run by the runtimes they are for: x86 without VNNI, ARM64 with and without dot product, a browser; and in the .ort format.

Every target starts once and runs all models; the tests compare what it said. docs/edge.md says what runs where.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.edge import emitted, integer
from tests.edge.integer import FORMS
from tests.edge.jobs import Answer, Array, EdgeError, Job, Outputs, Target
from tests.edge.targets import CORTEX_A53, HASWELL, HOST, TARGETS, require

SHAPES = {"64x16": (64, 16), "71x33": (71, 33)}
PAIRS = {  # what two adjacent codes are, and whether all inputs at 255 keep their products within int16
    (64, 64): True,
    (65, 64): False,
    (-64, -64): True,
    (-65, -64): False,
    (127, 1): True,
    (127, 2): False,
    (-128, 0): True,
    (-128, -1): False,
    (127, -128): True,
}
STRADDLING = (0, 65, 64, 0)  # adjacent codes, but of two pairs
RUNS = [*emitted.FILES, *(f"{name} row" for name in emitted.FILES), *emitted.LANGUAGE_MODELS]
UNREADABLE = {  # in the runtime style: the format has no int4; a MatMul fused with integers and float results is not recorded in full
    "qdq-4": "Unsupported tensor data type",
    "qdq-int8": "Not enough produced nodes",
    "qdq-int8-4": "Not enough produced nodes",
}
FULL_PRECISION = {"session.x64quantprecision": "1"}


def relative(a: Array, b: Array) -> float:
    return float(np.linalg.norm(a.astype(np.float64) - b) / np.linalg.norm(b.astype(np.float64)))


def only(outputs: Outputs) -> Array:
    (array,) = outputs.values()
    return array


def boundary_codes() -> Array:
    columns = [(*pair, 0, 0) for pair in PAIRS] + [STRADDLING]
    return np.array(columns, np.int8).T


class Work:
    """All jobs, the exact answers of those that have one, and what each target answered, asked once."""

    def __init__(self, folder: Path) -> None:
        self.jobs: dict[str, Job] = {}
        self.exact: dict[str, Array] = {}
        self._answers: dict[str, dict[str, Answer]] = {}
        self._add_emitted(folder)
        self._add_integer(folder)

    def _add_emitted(self, folder: Path) -> None:
        files = emitted.write(folder)
        emitted.to_ort(folder)
        for name, job in files.items():
            self.jobs[name] = job
            self.jobs[f"{name} unoptimized"] = replace(job, optimize=False)
            if name in emitted.FILES:
                row = {key: array[:1, :1] for key, array in job.feeds.items()}
                self.jobs[f"{name} row"] = replace(job, feeds=row)
                self.jobs[f"{name} row unoptimized"] = replace(job, feeds=row, optimize=False)
            for style, (suffix, config) in emitted.ORT_STYLES.items():
                self.jobs[f"{name} ort-{style}"] = replace(job, model=job.model.with_suffix(suffix), config=config)

    def _add_integer(self, folder: Path) -> None:
        def add(name: str, form: str, codes: Array, x: Array) -> None:
            self.jobs[name], self.exact[name] = FORMS[form](codes, x, folder / f"{name.replace(' ', '-')}.onnx")

        for shape, (k, n) in SHAPES.items():
            for form in FORMS:
                safe, unsafe = integer.pair_safe(k, n), integer.unsafe(k, n)
                for rows, cut in (("all", None), ("one", 1)):
                    add(f"{form} safe {shape} {rows}", form, safe, integer.worst(safe)[:cut])
                    add(f"{form} unsafe {shape} {rows}", form, unsafe, integer.high(8, k)[:cut])
                name = f"{form} unsafe {shape} all"
                self.jobs[f"{name} full-precision"] = replace(self.jobs[name], config=FULL_PRECISION)
        add("boundary", "matmul-integer", boundary_codes(), np.full((2, 4), 255, np.uint8))
        for low in (-128, -127):
            add(f"int8 {low}", "matmul-integer", np.full((64, 16), low, np.int8), np.full((3, 64), -128, np.int8))

    def answer(self, target: str, job: str) -> Outputs:
        """What a target computed.

        Raises:
            EdgeError: It could not.
        """
        if target not in self._answers:
            self._answers[target] = dict(zip(self.jobs, TARGETS[target].run(list(self.jobs.values())), strict=True))
        return self._answers[target][job].get()


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    return Work(tmp_path_factory.mktemp("edge"))


Ask = Callable[[str], Array]


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest) -> str:
    require(TARGETS[request.param])
    return str(request.param)


@pytest.fixture
def ask(work: Work, target: str) -> Ask:
    """The only output of a job on the target."""
    return lambda job: only(work.answer(target, job))


def agree(work: Work, answer: Array, run: str) -> None:
    """The answer is one of the two that the host has for these codes: in float, or with the int8 activations that the file asks for.

    Targets without int8 kernels for blocks compute in float instead; both are right, what lies between is not.
    """
    name, *row = run.split()
    file = emitted.ALL[name]
    in_float = only(work.answer(HOST.name, " ".join([file.in_float or name, *row, "unoptimized"])))
    as_asked = only(work.answer(HOST.name, run))
    assert answer.dtype == in_float.dtype
    assert relative(as_asked, in_float) < (2e-2 if file.int8 else 1e-5)
    assert min(relative(answer, as_asked), relative(answer, in_float)) < (1e-3 if file.int8 else 1e-5)


@pytest.mark.long
@pytest.mark.parametrize("run", RUNS)
def test_emitted_files_give_the_answers_of_the_host(work: Work, ask: Ask, run: str) -> None:
    agree(work, ask(run), run)
    agree(work, ask(f"{run} unoptimized"), run)


@pytest.mark.parametrize("style", emitted.ORT_STYLES)
@pytest.mark.parametrize("name", emitted.ALL)
def test_ort_format_gives_the_answers_of_the_onnx_file(work: Work, ask: Ask, name: str, style: str) -> None:
    job = f"{name} ort-{style}"
    assert work.jobs[job].model.read_bytes()[4:8] == b"ORTM"
    if style == "runtime" and name in UNREADABLE:
        with pytest.raises(EdgeError, match=UNREADABLE[name]):
            ask(job)
    else:
        agree(work, ask(job), name)


@pytest.mark.parametrize("rows", ["all", "one"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMS)
def test_pair_safe_codes_are_exact_everywhere(work: Work, ask: Ask, form: str, shape: str, rows: str) -> None:
    name = f"{form} safe {shape} {rows}"
    assert np.array_equal(ask(name), work.exact[name])


@pytest.mark.parametrize("rows", ["all", "one"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMS)
def test_unsafe_codes_are_exact_but_where_pairs_saturate(work: Work, ask: Ask, target: str, form: str, shape: str, rows: str) -> None:
    """Also the proof that the emulated x86 has no VNNI, and that the test above can fail."""
    name = f"{form} unsafe {shape} {rows}"
    expected = work.exact[name]
    if saturates(target):
        assert relative(ask(name), expected) > 0.1
        expected = integer.saturated(work.jobs[name].feeds["x"], integer.unsafe(*SHAPES[shape])) if form == "matmul-integer" else ask(name)
    assert np.array_equal(ask(name), expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMS)
def test_onnxruntimes_own_switch_makes_unsafe_codes_exact(work: Work, form: str, shape: str) -> None:
    """Its price is another, slower kernel; that it works here means that the int16 pairs are all that goes wrong."""
    require(HASWELL)
    name = f"{form} unsafe {shape} all"
    assert np.array_equal(only(work.answer(HASWELL.name, f"{name} full-precision")), work.exact[name])


def test_boundary_of_the_pair_condition(work: Work, ask: Ask, target: str) -> None:
    exact, answer = work.exact["boundary"], ask("boundary")
    fits = np.array([*PAIRS.values(), True])
    assert np.array_equal(answer[:, fits], exact[:, fits])
    if saturates(target):
        assert (answer[:, ~fits] != exact[:, ~fits]).all()
        exact = integer.saturated(work.jobs["boundary"].feeds["x"], boundary_codes())
    assert np.array_equal(answer, exact)


def test_int8_inputs_need_codes_above_the_lowest_without_dot_product(work: Work, ask: Ask, target: str) -> None:
    """-128 * -128 twice is one too many for int16; also the proof that this emulated ARM has no dot product instructions."""
    assert np.array_equal(ask("int8 -127"), work.exact["int8 -127"])
    assert np.array_equal(ask("int8 -128"), work.exact["int8 -128"]) == (target != CORTEX_A53.name)


def saturates(target: str) -> bool:
    known = TARGETS[target].saturates
    if known is None:
        pytest.skip(f"whether the processor of {target} has VNNI is not known")
    return known


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_a_model_that_fails_takes_no_other_with_it(target: Target, tmp_path: Path) -> None:
    require(target)
    (tmp_path / "broken.onnx").write_bytes(b"not a model")
    codes = integer.pair_safe(4, 2)
    good, exact = integer.matmul_integer(codes, integer.worst(codes), tmp_path / "good.onnx")
    broken, answer = target.run([Job(tmp_path / "broken.onnx", good.feeds), good])
    assert np.array_equal(only(answer.get()), exact)
    with pytest.raises(EdgeError, match=r"(?i)protobuf"):
        broken.get()
