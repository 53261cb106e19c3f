"""Options, on the command line and in Python: what formats default to, how blocks are sized, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import magr_onnx
from magr_onnx.cli.app import app
from magr_onnx.config.plans import build_pipeline
from magr_onnx.core.overflow.accumulator import Accumulator
from magr_onnx.core.overflow.targets import TARGETS
from magr_onnx.errors import OptionError
from magr_onnx.passes import EmitMatMulNBits, Plan, Quantize, QuantizeActivations
from tests import graphs
from tests.cli.test_cli import run
from tests.graphs import feeds, proto


def pipeline_of(**options: Any) -> str:
    return str(build_pipeline(**options))


DEFAULTS = {
    "matmulnbits": "error-feedback,quantize{method=auto},compensate-bias{bias=any},emit-matmulnbits",
    "qdq": "error-feedback,quantize{method=auto},compensate-bias,emit-qdq",
    "qdq-int8": "quantize-activations,quantize{method=comq,bits=8,block_size=none,symmetric=true},compensate-bias,emit-qdq-int8",
    "dynamic-int8": (
        "quantize-activations{type=dynamic},quantize{method=comq,bits=8,block_size=none,symmetric=true},compensate-bias,emit-dynamic-int8"
    ),
}


@pytest.mark.parametrize("form", DEFAULTS)
def test_defaults_of_every_format(form: Any) -> None:
    assert Plan.parse(DEFAULTS[form]).resolved == build_pipeline(format=form).resolved


FAST = "magr{alpha=0.0001,block_size=32},quantize{method=comq},compensate-bias{bias=any},emit-matmulnbits"
EFFORTS: list[tuple[dict[str, Any], str]] = [
    ({"effort": "fast"}, FAST),
    ({"quantizer": "comq"}, FAST),
    ({"quantizer": "comq", "feedback": True}, f"error-feedback,{FAST}"),
    ({"effort": "fast", "feedback": True}, f"error-feedback,{FAST}"),
    ({"effort": "balanced"}, DEFAULTS["matmulnbits"]),
    ({"effort": None, "quantizer": None, "feedback": None}, DEFAULTS["matmulnbits"]),
    ({"feedback": False}, "quantize{method=auto},compensate-bias{bias=any},emit-matmulnbits"),
    ({"quantizer": "auto"}, "quantize{method=auto},compensate-bias{bias=any},emit-matmulnbits"),
    (
        {"effort": "best"},
        "error-feedback,output-hessian,quantize{method=auto},compensate-bias{bias=any},tune-scales,emit-matmulnbits",
    ),
    (
        {"output_hessian": "adaptive"},
        "error-feedback,output-hessian{kind=adaptive},quantize{method=auto},compensate-bias{bias=any},emit-matmulnbits",
    ),
    ({"effort": "best", "output_hessian": "none", "tune_scales": False}, DEFAULTS["matmulnbits"]),
    (
        {"bits": 3},
        "rotate{auto=true,optional=true},error-feedback,quantize{method=auto,bits=3},compensate-bias{bias=any},tune-scales{epochs=1,bounded=true},emit-matmulnbits",
    ),
    (
        {"bits": 2, "tune_scales": True},
        "rotate{auto=true,optional=true},error-feedback,quantize{method=auto,bits=2},compensate-bias{bias=any},tune-scales{rate=0.006},emit-matmulnbits",
    ),
    (
        {"bits": 3, "rotate": "none", "tune_scales": False},
        "error-feedback,quantize{method=auto,bits=3},compensate-bias{bias=any},emit-matmulnbits",
    ),
    (
        {"block_size": None},
        "rotate{optional=true},error-feedback,quantize{method=auto,block_size=none},compensate-bias{bias=any},emit-matmulnbits",
    ),
    (
        {"format": "qdq-full", "bits": 4},
        "magr,quantize-activations,quantize{method=comq,block_size=none,symmetric=true},compensate-bias,emit-qdq-full",
    ),
    ({"bits": 8, "block_size": None, "bias": "none"}, "error-feedback,quantize{method=auto,bits=8,block_size=none},emit-matmulnbits"),
    ({"bits": 3, "effort": "fast"}, FAST.replace("method=comq", "method=comq,bits=3")),
    ({"bits": 3, "quantizer": "comq"}, FAST.replace("method=comq", "method=comq,bits=3")),
    ({"effort": "fast", "split_salient": 0.1}, f"split-salient{{fraction=0.1}},{FAST}"),
    ({"alpha": 0.0}, "error-feedback,quantize{method=auto,alpha=0},compensate-bias{bias=any},emit-matmulnbits"),
    (
        {"effort": "best", "format": "qdq-int8", "alpha": 2e-3, "bias": "none"},
        "error-feedback,output-hessian,quantize-activations,"
        "quantize{method=auto,bits=8,block_size=none,symmetric=true,alpha=0.002},emit-qdq-int8",
    ),
]


@pytest.mark.parametrize(("options", "text"), EFFORTS)
def test_what_an_effort_stands_for(options: dict[str, Any], text: str) -> None:
    assert Plan.parse(text).resolved == build_pipeline(**options).resolved


@pytest.mark.parametrize("options", [{}, {"effort": None}, {"quantizer": "gptq"}, {"quantizer": None, "effort": "fast"}])
def test_without_data_there_is_nothing_to_choose_by(options: dict[str, Any]) -> None:
    _, report = magr_onnx.optimize(graphs.chain(), **options)
    assert "error-feedback" not in report.pipeline
    assert f"method={options.get('quantizer') or 'comq'}" in report.pipeline or "quantizer" in options
    assert any("data-free" in note for note in report.notes)


@pytest.mark.parametrize(
    "options",
    [
        {
            "format": "qdq-int8",
            "activation_type": "int8",
            "activation_range": "percentile",
            "quantize_outputs": True,
            "target": "arm64-neon",
        },
        {"format": "dynamic-int8", "accumulator_bits": 16, "accumulator_tile": 64, "quantizer": "gptq", "bits": 5},
        {"format": "qdq-int8", "accumulator_bits": 12, "quantizer": "a2q+", "symmetric": False, "bias": "none"},
        {"format": "qdq-int8", "alpha": 1e-3, "bias": "any", "damping": 0.5, "beta": 0.9},
        {"accumulator_bits": 16},
        {"equalize": True, "split_outliers": True, "low_rank": 4, "feedback": True, "quantizer": "hqq"},
        {"format": "qdq-int8", "twin_ranges": True, "equalize": True},
        {"rotate": "on", "equalize": True},
        {"rotate": "auto", "bits": 3},
    ],
)
def test_every_pipeline_is_text_and_back(options: dict[str, Any]) -> None:
    plan = build_pipeline(**options)
    assert Plan.parse(str(plan)) == plan
    assert Plan.parse(str(plan.resolved)) == plan.resolved


def test_the_quantizer_learns_what_the_layer_reads() -> None:
    for kind in ("uint8", "int8", "dynamic"):
        text = f"quantize-activations{{type={kind}}},quantize{{block_size=none,accumulator_bits=16}},compensate-bias"
        quantize = Plan.parse(text).resolved.quantize
        assert quantize is not None
        assert (quantize.activation, quantize.bias) == (kind, "existing")
        budget = quantize.budget()
        assert budget is not None
        assert (budget.x_min, budget.x_max) == ((-128, 127) if kind == "int8" else (0, 255))
    given = Plan.parse("quantize{block_size=none,accumulator_bits=16,activation=int8,bias=none}").quantize
    assert given == Quantize(block_size=None, accumulator_bits=16, activation="int8", bias="none")
    assert Plan(activations=QuantizeActivations(), quantize=given).resolved.quantize == given


@pytest.mark.parametrize("before", ["quantize-activations{type=uint8},", ""])
def test_a_budget_for_other_activations_is_refused(before: str) -> None:
    plan = Plan.parse(f"{before}quantize{{block_size=none,accumulator_bits=16,activation=int8}}")
    with pytest.raises(OptionError, match="quantize expects int8 activations"):
        plan.check()


# Blocks sized to an accumulator: MatMulNBits


def sized(**options: Any) -> tuple[int, int | None, int]:
    """Bits, block and accuracy level."""
    plan = build_pipeline(**options)
    quantize, emit = plan.quantize, plan.emitter
    assert quantize is not None
    assert isinstance(emit, EmitMatMulNBits)
    assert (quantize.accumulator_bits, emit.accumulator_bits) == (None, options["accumulator_bits"])
    return quantize.bits, quantize.block_size, emit.accuracy_level


SIZES = [  # 127 (2^bits - 1) block < 2^(P - 1), by hand
    ({"accumulator_bits": 16}, (4, 16)),  # 1905 * 16 = 30480 < 32768
    ({"accumulator_bits": 17}, (4, 32)),
    ({"accumulator_bits": 20}, (4, 256)),
    ({"accumulator_bits": 15}, (3, 16)),  # 889 * 16 = 14224 < 16384
    ({"accumulator_bits": 32}, (4, 256)),
    ({"accumulator_bits": 16, "bits": 2}, (2, 64)),  # 381 * 64 = 24384; 2 bits have blocks of 32, 64 and 128
    ({"accumulator_bits": 15, "bits": 2}, (2, 32)),
    ({"accumulator_bits": 18, "block_size": 64}, (4, 64)),
    ({"accumulator_bits": 16, "block_size": 32}, (3, 32)),
    ({"accumulator_bits": 24, "block_size": 128}, (8, 128)),
    ({"accumulator_bits": 24, "accumulator_tile": 128}, (8, 128)),
    ({"accumulator_bits": 20, "bits": 8}, (8, 16)),  # 32385 * 16 = 518160 < 524288
    ({"accumulator_bits": 17, "bits": 5}, (5, 16)),
    ({"accumulator_bits": 20, "bits": 5, "symmetric": True}, (5, 16)),  # stored up to 143: 127 * 143 * 16 < 524288
]


@pytest.mark.parametrize(("options", "expected"), SIZES)
def test_blocks_are_the_largest_that_fit(options: dict[str, Any], expected: tuple[int, int]) -> None:
    assert sized(**options) == (*expected, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulator_bits": 14}, "16 products of int8 activations and 3-bit codes need 15; that is the smallest that works here"),
        ({"accumulator_bits": 14, "bits": 2}, "32 products of int8 activations and 2-bit codes need 15"),
        ({"accumulator_bits": 15, "bits": 4}, "16 products of int8 activations and 4-bit codes need 16"),
        ({"accumulator_bits": 15, "bits": 3, "symmetric": True}, "16 products of int8 activations and 3-bit codes need 16"),
        ({"accumulator_bits": 16, "block_size": 128}, "128 products of int8 activations and 2-bit codes need 17"),
        ({"accumulator_bits": 2, "block_size": 32, "bits": 8}, "32 products of int8 activations and 8-bit codes need 21"),
        ({"accumulator_bits": 16, "accumulator_tile": 24}, "MatMulNBits sums whole blocks of 16, 32, 64, 128, 256"),
        ({"accumulator_bits": 16, "accumulator_tile": 64, "block_size": 32}, "MatMulNBits' tile is its block; give one of them"),
        ({"accumulator_bits": 16, "accuracy_level": 1}, "only level 4 computes in integers"),
        ({"accumulator_bits": 16, "block_size": None}, "leave the block size out"),
        ({"accumulator_bits": 16, "block_size": 16, "bits": 2}, "2 bits sums blocks of 32, 64 or 128"),
        ({"accumulator_tile": 16}, "accumulator_tile needs accumulator_bits"),
    ],
)
def test_what_cannot_be_sized_says_what_can(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        build_pipeline(**options)
    named = re.search(r"codes need (\d+)", message)
    if named is not None:
        assert build_pipeline(**{**options, "accumulator_bits": int(named[1])})


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
def test_a_sized_file_is_proved(bits: int, symmetric: bool) -> None:
    """Codes of 3, 5, 6 and 7 bits are stored in more, symmetric ones higher than their own width."""
    for width in range(14, 22):
        try:
            build_pipeline(bits=bits, symmetric=symmetric, accumulator_bits=width)
        except OptionError:
            continue
        model = graphs.matmul(64, 8)
        made, report = magr_onnx.optimize(
            model, [feeds(model)], bits=bits, symmetric=symmetric, accumulator_bits=width, quantizer="rtn", alpha=0.0
        )
        block = report.layers[0].block_size
        (row,) = magr_onnx.verify(made, accumulator=Accumulator(width, block), run=False).layers
        assert row.verdict == "proved"
        return
    pytest.fail("no width worked")


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "qdq-int8", "target": "x86"}, f"unknown target 'x86'; choose one of {', '.join(TARGETS)}"),
        ({"format": "qdq-int8", "target": "generic", "accumulator_bits": 16}, "give a target or accumulator_bits, not both"),
        ({"format": "qdq", "accumulator_bits": 16}, "floats have no accumulator"),
        ({"format": "qdq-int8", "block_size": 32}, "integer kernels have one scale a column; use 'channel'"),
        ({"format": "dynamic-int8", "block_size": 32}, "integer kernels have one scale a column; use 'channel'"),
        ({"format": "qdq-int8", "accumulator_bits": 8}, "the smallest that works is 9"),
        ({"format": "qdq-int8", "accumulator_bits": 1}, "accumulators have 2 to 64 bits"),
        ({"format": "qdq-int8", "accumulator_bits": 16, "accumulator_tile": 0}, "accumulator tile 0 must be at least 1"),
        ({"format": "qdq-int8", "accumulator_tile": 4}, "accumulator_tile needs accumulator_bits"),
        ({"format": "qdq-int8", "quantizer": "a2q"}, "a2q is for accumulators only"),
        ({"quantizer": "a2q+", "target": "generic"}, "needs 8-bit activations"),
        ({"format": "qdq-int8", "quantizer": "rtn", "target": "generic"}, "rtn knows no accumulators"),
        ({"format": "qdq-int8", "activation_range": "mse"}, "choose one of auto, min-max, percentile, min-error, daq"),
        ({"format": "qdq-int8", "activation_type": "int4"}, "choose one of uint8, int8"),
        ({"format": "dynamic-int8", "activation_type": "int8"}, "activation_type is for format qdq-int8 or qdq-full only"),
        ({"format": "qdq", "activation_range": "auto"}, "activation_range is for format qdq-int8 or qdq-full only"),
        ({"quantize_outputs": True}, "quantize_outputs is for format qdq-int8 only"),
        ({"format": "qdq-int8", "accuracy_level": 4}, "accuracy_level is for format matmulnbits only"),
        ({"format": "qdq-int8", "bits": 9}, "bits=9 is not supported"),
        ({"effort": "most"}, "effort='most' is not known; choose one of fast, balanced, best"),
        ({"effort": "best", "quantizer": "auto"}, "effort=best and quantizer=auto: an effort chooses the quantizer; give one of them"),
        ({"alpha": -1.0}, "alpha=-1.0 must be 0 or more"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message.replace("+", r"\+")):
        build_pipeline(**options)


def test_all_offenders_at_once() -> None:
    with pytest.raises(OptionError) as caught:
        build_pipeline(
            format="qdq-int8", bits=9, quantizer="rtn", target="x86", accumulator_bits=3, activation_range="mse", bias="all", colour=1
        )  # type: ignore[call-arg]
    for part in ("bits=9", "rtn knows no", "not both", "unknown target 'x86'", "'mse'", "bias='all'", "'colour'"):
        assert part in str(caught.value)


def test_a_mistyped_option_may_stand_for_any_argument() -> None:
    for given, meant in (("bit", "bits"), ("calibraton", "calibration"), ("validation", "validation_data"), ("exclud", "exclude")):
        with pytest.raises(OptionError, match=f"unknown option '{given}'; did you mean '{meant}'"):
            magr_onnx.optimize("no such file", **{given: 4})
    with pytest.raises(OptionError, match=r"unknown option 'colour'; there are model, calibration, .*, preset, .*, bits"):
        magr_onnx.optimize("no such file", colour=1)  # type: ignore[call-arg]


# The command line


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("options")
    (found / "model.onnx").write_bytes(proto(graphs.chain()).SerializeToString())
    np.savez(found / "calibration.npz", **feeds(graphs.chain(), rows=64))
    return found


NEW_OPTIONS = (
    "--activation-type",
    "--activation-range",
    "--quantize-outputs",
    "--target",
    "--accumulator-bits",
    "--accumulator-tile",
    "--low-rank",
    "--output-hessian",
    "--rotate",
    "--equalize",
    "--split-outliers",
    "--split-salient",
    "--twin-ranges",
    "--effort",
    "--cache",
)


def test_help_shows_the_options() -> None:
    text = CliRunner().invoke(app, ["optimize", "--help"], env={"COLUMNS": "200"}).stdout
    for option in (*NEW_OPTIONS, "qdq-int8", "dynamic-int8", "a2q+", "x86-avx2", "arm64-neon"):
        assert option in text
    listed = run("passes").stdout
    for name in (
        "quantize-activations",
        "emit-qdq-int8",
        "emit-dynamic-int8",
        "low-rank",
        "rotate",
        "equalize",
        "split-outliers",
        "twin-ranges",
        "output-hessian",
    ):
        assert name in listed


@pytest.mark.parametrize(
    ("arguments", "operators"),
    [
        (("--format", "qdq-int8", "--target", "x86-avx2"), {"QuantizeLinear", "DequantizeLinear"}),
        (("--format", "qdq-int8", "--activation-type", "int8", "--activation-range", "percentile"), {"QuantizeLinear"}),
        (("--format", "qdq-int8", "--quantize-outputs", "--accumulator-bits", "16", "--accumulator-tile", "32"), {"QuantizeLinear"}),
        (("--format", "dynamic-int8", "--bits", "5", "--asymmetric"), {"DynamicQuantizeLinear", "MatMulInteger"}),
        (("--accumulator-bits", "16"), {"MatMulNBits"}),
        (("--low-rank", "4", "--quantizer", "hqq"), {"MatMulNBits", "Sum"}),
    ],
)
def test_options_reach_the_file(arguments: tuple[str, ...], operators: set[str], folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    result = run("optimize", folder / "model.onnx", "-o", out, "-c", folder / "calibration.npz", *arguments)
    assert result.returncode == 0, result.stderr
    assert "2 read back and verified" in result.stdout
    assert operators <= {node.op_type for node in magr_onnx.model_io.files.load(out).model.graph}
    if "--target" in arguments:
        assert run("verify", out, "--target", "x86-avx2").returncode == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--format", "qdq-int8"), 2, "static 8-bit activations need calibration data"),
        (("--format", "qdq-int8", "--target", "x86"), 2, "target = 'x86': choose one of x86-avx2"),
        (("--low-rank", "4", "--format", "qdq-int8"), 2, "low-rank adds float products"),
        (("--low-rank", "-1"), 2, "greater than or equal to 0"),
        (("--twin-ranges",), 2, "twin-ranges is for static 8-bit inputs"),
        (("--pipeline", "quantize", "--equalize"), 2, "pipeline replaces equalize"),
        (("--rotate", "atuo"), 2, "did you mean 'auto'"),
        (("--format", "qdq", "--accumulator-bits", "16"), 2, "accumulator_bits needs integer activations"),
        (("--accumulator-bits", "14"), 2, "the smallest that works here"),
        (("--format", "qdq-int8", "--activation-type", "int4"), 2, "did you mean 'int8'"),
        (("--format", "dynamic-int8", "--activation-type", "int8"), 2, "for format qdq-int8 or qdq-full only"),
        (("--pipeline", "quantize", "--target", "generic"), 2, "pipeline replaces target"),
    ],
)
def test_errors_leave_no_file(arguments: tuple[str, ...], code: int, message: str, folder: Path, tmp_path: Path) -> None:
    result = run("optimize", folder / "model.onnx", "-o", tmp_path / "out.onnx", *arguments)
    assert (result.returncode, result.stdout) == (code, "")
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_magr_runs_before_integer_formats_only_when_asked() -> None:
    assert build_pipeline(format="qdq-int8").magr is None
    assert build_pipeline(format="qdq-int8", alpha=1e-3).magr is not None
