"""Pipelines as text, and passes run alone, in onnx-ir's Sequential, and fused layer by layer."""

from __future__ import annotations

import ast
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import magr_onnx
from magr_onnx.core import magr
from magr_onnx.core.layer import LayerProblem, LayerSolution
from magr_onnx.core.packing import dequantize_matmulnbits, dequantize_qdq, pack_matmulnbits, pack_qdq
from magr_onnx.core.quantizers import method_options
from magr_onnx.core.solution_arrays import to_arrays
from magr_onnx.core.types import LayerStats, WeightSpec
from magr_onnx.errors import OptionError, PipelineError
from magr_onnx.passes import CompensateBias, EmitMatMulNBits, LayerPass, MagR, Plan, Quantize, attach, find, run_layers
from magr_onnx.passes.emit.readback import read_weights
from magr_onnx.passes.layer_state import problem_of
from magr_onnx.passes.registry import passes, stages
from magr_onnx.runtime.ort.session import Session
from tests import graphs
from tests.graphs import correlated, feeds
from tests.helpers import random_quantized


def stats_of(k: int, rows: int = 400) -> LayerStats:
    x = correlated(rows, k).astype(np.float64)
    return LayerStats(x.T @ x / rows, x.mean(axis=0), rows)


@pytest.mark.parametrize(
    "text",
    [
        "magr",
        "quantize{bits=2,block_size=none}",
        "magr{alpha=0.01,relative=false,method=authors},quantize{method=rtn,bits=3,beta=0.9},compensate-bias{bias=any},emit-matmulnbits",
        "quantize,emit-qdq",
    ],
)
def test_text_round_trips(text: str) -> None:
    assert str(Plan.parse(text)) == text
    assert Plan.parse(str(Plan.parse(text))) == Plan.parse(text)


def test_text_means_what_it_says() -> None:
    assert Plan.parse(
        " magr { alpha = 1e-3 } , quantize{method=comq, bits=8, block_size=channel, symmetric=true} ,emit-matmulnbits{accuracy_level=4}"
    ) == Plan(
        magr=MagR(alpha=1e-3),
        quantize=Quantize(method="comq", bits=8, block_size=None, symmetric=True),
        emitter=EmitMatMulNBits(accuracy_level=4),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a pass name at character 0"),
        ("magr,", "expected a pass name at character 5"),
        ("magr quantize", "expected ','"),
        ("magr{alpha=1e-3", "expected '}' at character 15"),
        ("magr{alpha=1e-3,quantize{bits=4}", "expected '}' at character 24"),
        ("gptq", "no pass is called 'gptq'; there are rotate, equalize, split-outliers, split-salient, twin-ranges, error-feedback"),
        ("magr{strength=1}", "magr has no option 'strength=1'; it takes alpha, relative"),
        ("quantize{bits=four}", "expected int"),
        ("quantize{act_order=1}", "expected bool"),
        ("magr{method=fast}", "choose one of fista, authors"),
    ],
)
def test_bad_text_says_where_and_what_is_accepted(text: str, message: str) -> None:
    with pytest.raises(PipelineError) as caught:
        Plan.parse(text)
    assert message in str(caught.value)


def test_all_problems_at_once() -> None:
    with pytest.raises(OptionError) as caught:
        Plan.parse("quantize{method=magic,bits=9,damping=-1},emit-matmulnbits{accuracy_level=7}").check()
    for part in ("'magic'", "bits=9", "damping=-1"):
        assert part in str(caught.value)


@pytest.mark.parametrize("value", [np.inf, np.nan, -1.0])
def test_strengths_are_finite(value: float) -> None:
    chosen = [MagR(value, damping=value), Quantize("auto", alpha=value, damping=value, beta=value)]
    assert [len(p.problems(None)) for p in chosen] == [2, 3]
    with pytest.raises(OptionError, match=f"alpha={value} must be 0 or more, and finite"):
        magr.reduce(np.eye(4), np.eye(4), alpha=value)


def test_kernels_a_provider_lacks_are_refused() -> None:
    plan = Plan.parse("quantize{bits=2},emit-matmulnbits")
    plan.check()
    for provider in ("cuda", "CUDAExecutionProvider"):
        with pytest.raises(OptionError, match="4 and 8 bits only"):
            plan.check(provider)


def test_an_invalid_quantizer_is_no_missing_one() -> None:
    stages = "low-rank{rank=0},compensate-bias,emit-matmulnbits,convolutions"
    valid = Plan.parse(f"quantize,{stages}").problems()
    assert valid == ["low-rank: rank=0 must be at least 1; leave the pass out for none"]
    assert Plan.parse(f"quantize{{bits=9}},{stages}").problems() == ["bits=9 is not supported; choose one of 2, 3, 4, 5, 6, 7, 8", *valid]
    assert any("low-rank needs a quantize pass" in text for text in Plan.parse(stages).problems())


def test_blocks_are_kept_to_what_a_provider_takes() -> None:
    plan = Plan.parse("quantize{block_size=channel},emit-matmulnbits")
    assert plan.suited("cpu") == plan
    assert plan.suited("cuda") == Plan.parse("quantize{block_size=channel},emit-matmulnbits{largest_block=128}")
    assert str(Plan.parse("quantize{block_size=256},emit-qdq").suited("cuda")) == "quantize{block_size=256},emit-qdq{largest_block=128}"
    integer = Plan.parse("quantize-activations,quantize{block_size=channel},emit-qdq-int8")
    assert integer.suited("cuda") == integer
    assert Plan.parse("quantize,emit-matmulnbits{largest_block=32}").suited("cuda").emitter == EmitMatMulNBits(largest_block=32)
    with pytest.raises(OptionError, match="largest_block=48"):
        Plan.parse("quantize,emit-matmulnbits{largest_block=48}").check()


@pytest.mark.parametrize(("group", "block"), [(None, 128), (256, 128), (512, 128), (64, 64), (96, 32)])
def test_a_smaller_largest_block_repeats_scales(group: int | None, block: int) -> None:
    weight = random_quantized(512, 8, WeightSpec(4, group))
    packed = pack_matmulnbits(weight, 128)
    assert packed.block_size == block
    np.testing.assert_array_equal(dequantize_matmulnbits(packed), weight.dequantize())
    dequantized = pack_qdq(weight, 128)
    assert dequantized.block_size == (0 if group in (None, 512) else block)  # the kernel's, where a column has one scale
    np.testing.assert_array_equal(dequantize_qdq(dequantized), weight.dequantize())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("quantize,magr", "magr must come before quantize"),
        ("quantize,error-feedback", "error-feedback must come before quantize"),
        ("compensate-bias,quantize", "quantize must come before compensate-bias"),
        ("embeddings,quantize,convolutions", "convolutions must come before embeddings"),
        ("quantize,quantize", "quantize appears twice"),
        ("magr,quantize,magr", "magr appears twice"),
        ("equalize,equalize,quantize", "equalize appears twice"),
        ("quantize,emit-qdq,emit-matmulnbits", "emit-qdq and emit-matmulnbits: a pipeline has one of them"),
    ],
)
def test_order_is_that_of_the_fields(text: str, message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        Plan.parse(text)


def test_a_stage_without_a_slot_is_refused() -> None:
    class Unplaced(LayerPass):
        name, summary = "unplaced", "leave a solution as it is"

        def solve(self, problem: LayerProblem, solution: LayerSolution) -> LayerSolution:
            return solution

    class Misplaced(Unplaced):
        slot = "before"

    for stage in (Unplaced(), Misplaced()):
        with pytest.raises(PipelineError, match="unplaced has no place in a plan: set its class attribute slot to one of rewrites, error"):
            Plan.read([Quantize(), stage])


def test_a_plan_is_its_stages_in_any_writing() -> None:
    text = "rotate,equalize,split-outliers,error-feedback,output-hessian,magr,quantize,low-rank,compensate-bias,emit-qdq,convolutions"
    text += ",recurrent,embeddings"
    plan = Plan.parse(text)
    assert str(plan) == text
    assert Plan.of(plan.stages) == plan
    assert Plan.read(plan) is plan
    assert Plan.read(text) == Plan.read(list(plan.stages)) == plan
    for other in (3, [3], "nothing"):
        with pytest.raises(PipelineError):
            Plan.read(other)  # type: ignore[arg-type]


def test_registry_is_complete() -> None:
    slots = {f.name for f in fields(Plan)}
    for name, kind in stages().items():
        assert kind.name == name
        assert kind.summary
        assert kind.slot in slots
        assert Plan.parse(name).stages == (kind(),)
        own = kind.options().keys() - method_options().keys()  # those of one quantizer have their help in its file
        assert all(f"{option}:" in (kind.__doc__ or "") for option in own), f"{name}: undocumented option"
        assert issubclass(kind, ir.passes.InPlacePass) == (name in passes())


def test_nothing_asks_for_the_class_of_a_stage() -> None:
    """What a plan does follows from its fields; only the registry looks at classes."""
    names = {kind.__name__ for kind in stages().values()} | {"Stage", "LayerStage", "LayerPass", "ModelPass", "Emitter", "Rewrite"}
    folder = Path(magr_onnx.__file__).parent
    modules = [path for part in ("", "passes", "runtime") for path in (folder / part).resolve().rglob("*.py")]
    assert len(modules) > 150
    places = []
    for path in modules:
        for node in ast.walk(ast.parse(path.read_text())):
            asks = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "issubclass")
            classes = {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)} if asks else set()
            if classes & names and path.name != "registry.py":
                places.append(f"{path}:{node.lineno}")
    assert places == []


def test_stages_leave_open_what_only_the_plan_knows() -> None:
    plan = Plan.parse("magr,quantize,compensate-bias{bias=any},emit-matmulnbits").resolved
    assert plan.magr is not None
    assert plan.quantize is not None
    assert (plan.magr.bias, plan.quantize.bias) == ("any", "any")
    assert Plan.parse("quantize").resolved == Plan.parse("quantize")


def test_sequential_equals_layer_by_layer() -> None:
    plan = Plan.parse("magr,quantize{method=comq},compensate-bias,emit-matmulnbits")
    one, two = graphs.chain(), graphs.chain()
    run_layers(plan, find(one)[0], lambda layer: stats_of(layer.k), lambda _: None)
    for layer in find(two)[0]:
        attach(layer, stats_of(layer.k))
    result = ir.passes.Sequential(*plan.passes)(two)
    assert result.modified
    a, b = read_weights(one), read_weights(two)
    assert a.keys() == b.keys() == {"up_out", "down_bias_out"}
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])
    x = feeds(one)
    with Session(one) as left, Session(two) as right:
        np.testing.assert_array_equal(left.run(x)[0], right.run(x)[0])


def test_magr_alone_is_float_to_float() -> None:
    model = graphs.chain()
    before = {layer.name: layer.read() for layer in find(model)[0]}
    run_layers(Plan.parse("magr{alpha=0.01}"), find(model)[0], lambda layer: stats_of(layer.k), lambda _: None)
    layers, _ = find(model)
    assert [n.op_type for n in model.graph] == [n.op_type for n in graphs.chain().graph]
    for layer in layers:
        assert np.abs(layer.read()).max() < np.abs(before[layer.name]).max()
    with Session(model) as session:
        session.run(feeds(model))


def test_quantize_alone_is_fake_quantization() -> None:
    model = graphs.chain()
    run_layers(Plan.parse("quantize{bits=2,block_size=16}"), find(model)[0], lambda layer: stats_of(layer.k), lambda _: None)
    for layer in find(model)[0]:
        weight = layer.read()
        assert all(len(np.unique(weight[:16, j])) <= 4 for j in range(layer.n))


def test_a_pass_without_statistics_is_data_free() -> None:
    model = graphs.chain()
    assert not MagR()(model).modified
    result = Quantize(method="gptq")(model)
    assert result.modified
    plain = graphs.chain()
    Quantize(method="rtn")(plain)
    for a, b in zip(find(model)[0], find(plain)[0], strict=True):
        np.testing.assert_array_equal(a.read(), b.read())


def test_compensated_bias_alone_changes_only_biases() -> None:
    model = graphs.chain()
    weights: dict[str, np.ndarray] = {}
    rounding = Plan(quantize=Quantize(bits=2))
    run_layers(rounding, find(model)[0], lambda layer: stats_of(layer.k), lambda s: weights.update({s.layer.name: s.solution.weight}))
    again = graphs.chain()
    plan = Plan(quantize=Quantize(bits=2, bias="none"), bias=CompensateBias())
    run_layers(plan, find(again)[0], lambda layer: stats_of(layer.k), lambda _: None)
    for a, b in zip(find(model)[0], find(again)[0], strict=True):
        np.testing.assert_array_equal(a.read(), b.read())
        assert not np.array_equal(a.read_bias(), b.read_bias())  # type: ignore[arg-type]


PLANS = {
    "magr": "magr{alpha=0.01}",
    "gptq": "magr{alpha=0.01},quantize{bits=3,block_size=16},compensate-bias{bias=any},emit-matmulnbits",
    "auto": "quantize{method=auto,bits=2,block_size=32},compensate-bias,emit-qdq",
    "comq": "quantize{method=comq,bits=4,block_size=none,symmetric=true},low-rank{rank=3},compensate-bias{bias=any},emit-qdq",
    "low rank": "quantize{method=rtn,bits=2},low-rank{rank=100,kind=diagonal},emit-matmulnbits",
    "dynamic": "quantize-activations{type=dynamic},quantize{bits=8,block_size=none,symmetric=true},compensate-bias,emit-dynamic-int8",
}


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_stages_are_pure_and_say_what_they_add_to_a_file(name: str, dtype: Any) -> None:
    """Solving changes no array it is given and answers the same twice; placeholders have the shapes and types of what is solved."""
    (layer,) = find(graphs.matmul_bias(48, 24, dtype=dtype))[0]
    problem = problem_of(layer, stats_of(48))
    for array in (problem.weight, problem.bias, problem.stats.gram, problem.stats.mean):
        assert array is not None
        array.flags.writeable = False
    plan = Plan.parse(PLANS[name])
    first, second, placeholder = plan.solve(problem), plan.solve(problem), plan.placeholder(problem)
    assert {n: a.tobytes() for n, a in to_arrays(first).items()} == {n: a.tobytes() for n, a in to_arrays(second).items()}

    def shapes(solution: LayerSolution) -> dict[str, Any]:
        arrays = to_arrays(solution)
        return {n: (a.shape, a.dtype) for n, a in arrays.items() if n not in ("facts", "weight")}

    assert shapes(first) == shapes(placeholder)
    assert (first.quantized is None) == (placeholder.quantized is None)
    if first.quantized is not None and placeholder.quantized is not None:
        assert first.quantized.spec == placeholder.quantized.spec


def test_a_plan_is_its_stages_one_after_the_other() -> None:
    (layer,) = find(graphs.matmul_bias(48, 24))[0]
    problem = problem_of(layer, stats_of(48))
    plan = Plan.parse(PLANS["gptq"])
    solution = LayerSolution.unsolved(problem)
    for stage in plan.solving:
        solution = stage.solve(problem, solution)
    assert to_arrays(plan.solve(problem)).keys() == to_arrays(solution).keys()
    np.testing.assert_array_equal(plan.solve(problem).weight, solution.weight)
