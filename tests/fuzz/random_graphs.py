"""Random graphs through `optimize` in every format, and those of odd forms with options drawn at random.

As a program, ``python -m tests.fuzz.random_graphs [--odd] [--cases N] [--seed S]`` runs N of them in processes of their own and prints
what became of them; ``--show I`` writes the model of one seed to ``random.onnx`` and prints what it is made of.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx

import magr_onnx
from magr_onnx.errors import MagrError
from tests.fuzz import isolated
from tests.fuzz.generate import Made, make
from tests.fuzz.judge import ALL, CONVERTED, OPTIONS, REFUSED, Outcome, judge
from tests.fuzz.mutate import Cases
from tests.fuzz.odd import make_odd

RUNS: dict[str, tuple[dict[str, Any], bool]] = {
    **{f"{name}, data-free": (options | ALL, False) for name, options in OPTIONS.items()},
    **{f"{name}, calibrated": (options | ALL, True) for name, options in OPTIONS.items()},
    "qdq-int8": ({"format": "qdq-int8", "bits": 8}, True),
    "fast": ({"format": "matmulnbits", "bits": 8, "effort": "fast"}, True),
}
"""Options by name, and whether there is calibration data."""

EXTRAS: tuple[dict[str, Any], ...] = (
    {"recurrent": "dynamic-quantize-lstm"},
    {"recurrent": "fold"},
    {"recurrent": "dequantize"},
    {"embeddings": "gather-block-quantized"},
    {"embeddings": "dequantize"},
    {"keep_overridable": True},
    {"requantize": True},
    {"conv_form": "fold"},
    {"conv_form": "dequantize"},
    {"conv_bits": None},
    {"low_rank": 2},
    {"equalize": True},
    {"rotate": "on"},
    {"rotate": "auto"},
    {"split_outliers": True},
    {"symmetric": True},
    {"block_size": 16},
    {"quantizer": "rtn"},
    {"effort": "balanced"},
    {"external_data": True},
    {"max_memory": 2000},
    {"quantize_outputs": True},
    {"twin_ranges": True},
    {"target_size": "60%", "bits": None},
)
"""Options that a run may have beside; some exclude each other, and are refused."""
INTEGER_ONLY = ("quantize_outputs", "twin_ranges")
CALIBRATED_ONLY = ("target_size", "equalize")
BLOCKS_ONLY = ("block_size", "target_size")

EXPECTED = ("no layer can be converted", "matches no layer; there are none", "onnxruntime loses a cast")
UNFIT = ("OptionError", "PipelineError")


def judge_made(made: Made, run: str) -> Outcome:
    """What becomes of a random graph in one of the runs."""
    options, calibrated = RUNS[run]
    return judge(made.model, made.feeds, options, made.calibration if calibrated else None)


def problem(made: Made, outcome: Outcome, expected: Sequence[str] = EXPECTED) -> str | None:
    """What is wrong with what became of a random graph."""
    if outcome.bug or (outcome.kind == REFUSED and not any(reason in outcome.detail for reason in expected)):
        return f"{outcome.kind}: {outcome.detail}\n{made.text}"
    if outcome.kind == CONVERTED and outcome.layers + outcome.skipped < made.linear:
        return f"{made.linear} linear layers, {outcome.layers} converted, {outcome.skipped} skipped\n{made.text}"
    return None


def odd_options(rng: random.Random) -> tuple[dict[str, Any], bool]:
    """A run with up to three more options, and whether it has calibration data."""
    options, calibrated = RUNS[rng.choice(list(RUNS))]
    integers = "int8" in options["format"]
    unfit = {
        *(BLOCKS_ONLY if integers else ()),
        *(() if options["format"] == "qdq-int8" else INTEGER_ONLY),
        *((*CALIBRATED_ONLY, "effort") if not calibrated else ()),
    }
    fitting = [extra for extra in EXTRAS if not unfit & set(extra)]
    result = {"bits": 8} | options | {"effort": "fast"}
    for extra in rng.sample(fitting, rng.choice((0, 1, 2, 3))):
        result |= extra
    if "quantizer" in result:
        del result["effort"]
    return result, calibrated


def other_commands(made: Made, folder: Path) -> str | None:
    """What fails, other than with a reason, when the float model is inspected, verified, and compared with itself."""
    path = folder / "model.onnx"
    path.write_bytes(made.model.SerializeToString())
    commands: dict[str, Callable[[], Any]] = {
        "inspect": lambda: magr_onnx.inspect(path),
        "verify": lambda: magr_onnx.verify(path, target="x86-avx2", run=False),
        "validate": lambda: magr_onnx.validate(path, path, made.calibration[:2], latency=False, progress=False),
    }
    for name, command in commands.items():
        try:
            command()
        except MagrError as error:
            if "please report" in str(error):
                return f"{name}: {error}"
        except Exception as error:
            return f"{name}: {type(error).__name__}: {error}"
    return None


def judge_odd(seed: int, at: Callable[[str], None] = lambda stage: None) -> Outcome:
    """What becomes of the odd graph of a seed; the options are named where that is a bug."""
    made = make_odd(random.Random(seed))
    options, calibrated = odd_options(random.Random(-seed - 1))
    outcome = judge(made.model, made.feeds, options, made.calibration if calibrated else None, at, values=options["bits"] == 8)
    wrong = problem(made, outcome, (*EXPECTED, *UNFIT))
    at("inspect, verify and validate")
    with tempfile.TemporaryDirectory() as folder:
        wrong = wrong or other_commands(made, Path(folder))
    return outcome if wrong is None else Outcome("wrong", f"{options}, {'calibrated' if calibrated else 'data-free'}: {wrong}")


def judge_plain(seed: int, at: Callable[[str], None] = lambda stage: None) -> Outcome:
    """What becomes of the graph of a seed in one of the runs."""
    made, run = make(random.Random(seed)), list(RUNS)[seed % len(RUNS)]
    options, calibrated = RUNS[run]
    outcome = judge(made.model, made.feeds, options, made.calibration if calibrated else None, at)
    wrong = problem(made, outcome)
    return outcome if wrong is None else Outcome("wrong", f"{run}: {wrong}")


def campaign(count: int, seed: int, odd: bool) -> list[tuple[int, Outcome]]:
    """What became of ``count`` graphs, by seed."""
    arguments = ["--worker", "--seed", str(seed), *(["--odd"] if odd else [])]
    return [(seed + i, outcome) for i, outcome in isolated.outcomes("tests.fuzz.random_graphs", arguments, range(count))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--odd", action="store_true")
    parser.add_argument("--worker", action="store_true")
    parser.add_argument("--show", type=int)
    given = parser.parse_args()
    run = judge_odd if given.odd else judge_plain
    if given.worker:
        isolated.serve(Cases(given.seed), run)
        return 0
    if given.show is not None:
        made = (make_odd if given.odd else make)(random.Random(given.show))
        Path("random.onnx").write_bytes(made.model.SerializeToString())
        print(made.text, odd_options(random.Random(-given.show - 1)) if given.odd else list(RUNS)[given.show % len(RUNS)])
        print(onnx.printer.to_text(made.model)[:4000])
        return 0
    found = campaign(given.cases, given.seed, given.odd)
    print(f"seeds {given.seed} to {given.seed + given.cases - 1}")
    print(isolated.table([replace(outcome, detail="") if outcome.bug else outcome for _, outcome in found]))
    for seed, outcome in found:
        if outcome.bug:
            print(f"seed {seed}: {outcome.kind}: {outcome.detail[:800]}")
    return sum(outcome.bug for _, outcome in found)


if __name__ == "__main__":
    sys.exit(min(main(), 1))
