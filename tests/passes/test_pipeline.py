"""Pipelines as text, and passes run alone, in onnx-ir's Sequential, and fused layer by layer."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from magr_onnx.core import magr
from magr_onnx.core.packing import dequantize_matmulnbits, pack_matmulnbits
from magr_onnx.core.types import LayerStats, WeightSpec
from magr_onnx.errors import OptionError, PipelineError
from magr_onnx.passes import PASSES, CompensateBias, EmitMatMulNBits, LayerPass, MagR, Quantize, attach, find, parse, run_layers, text_of
from magr_onnx.passes.emit.readback import read_weights
from magr_onnx.passes.pipeline import check, options_of, resolve, suited
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
    assert text_of(parse(text)) == text
    assert parse(text_of(parse(text))) == parse(text)


def test_text_means_what_it_says() -> None:
    assert parse(
        " magr { alpha = 1e-3 } , quantize{method=comq, bits=8, block_size=channel, symmetric=true} ,emit-matmulnbits{accuracy_level=4}"
    ) == (
        MagR(alpha=1e-3),
        Quantize(method="comq", bits=8, block_size=None, symmetric=True),
        EmitMatMulNBits(accuracy_level=4),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a pass name at character 0"),
        ("magr,", "expected a pass name at character 5"),
        ("magr quantize", "expected ','"),
        ("magr{alpha=1e-3", "expected '}' at character 15"),
        ("magr{alpha=1e-3,quantize{bits=4}", "expected '}' at character 24"),
        ("gptq", "no pass is called 'gptq'; there are equalize, split-outliers, twin-ranges, error-feedback, output-hessian, magr"),
        ("magr{strength=1}", "magr has no option 'strength=1'; it takes alpha, relative"),
        ("quantize{bits=four}", "expected int"),
        ("quantize{act_order=1}", "expected bool"),
        ("magr{method=fast}", "choose one of fista, authors"),
    ],
)
def test_bad_text_says_where_and_what_is_accepted(text: str, message: str) -> None:
    with pytest.raises(PipelineError) as caught:
        parse(text)
    assert message in str(caught.value)


def test_all_problems_at_once() -> None:
    with pytest.raises(OptionError) as caught:
        check(parse("quantize{method=magic,bits=9,damping=-1},emit-matmulnbits{accuracy_level=7}"))
    for part in ("'magic'", "bits=9", "damping=-1"):
        assert part in str(caught.value)


@pytest.mark.parametrize("value", [np.inf, np.nan, -1.0])
def test_strengths_are_finite(value: float) -> None:
    chosen = [MagR(value, damping=value), Quantize("auto", alpha=value, damping=value, beta=value)]
    assert [len(p.problems(None)) for p in chosen] == [2, 3]
    with pytest.raises(OptionError, match=f"alpha={value} must be 0 or more, and finite"):
        magr.reduce(np.eye(4), np.eye(4), alpha=value)


def test_kernels_a_provider_lacks_are_refused() -> None:
    passes = parse("quantize{bits=2},emit-matmulnbits")
    check(passes)
    for provider in ("cuda", "CUDAExecutionProvider"):
        with pytest.raises(OptionError, match="4 and 8 bits only"):
            check(passes, provider)


def test_blocks_are_kept_to_what_a_provider_takes() -> None:
    passes = parse("quantize{block_size=channel},emit-matmulnbits")
    assert suited(passes, "cpu") == passes
    assert suited(passes, "cuda") == parse("quantize{block_size=channel},emit-matmulnbits{largest_block=128}")
    assert suited(parse("quantize,emit-matmulnbits{largest_block=32}"), "cuda")[-1] == EmitMatMulNBits(largest_block=32)
    with pytest.raises(OptionError, match="largest_block=48"):
        check(parse("quantize,emit-matmulnbits{largest_block=48}"))


@pytest.mark.parametrize(("group", "block"), [(None, 128), (256, 128), (512, 128), (64, 64), (96, 32)])
def test_a_smaller_largest_block_repeats_scales(group: int | None, block: int) -> None:
    weight = random_quantized(512, 8, WeightSpec(4, group))
    packed = pack_matmulnbits(weight, 128)
    assert packed.block_size == block
    np.testing.assert_array_equal(dequantize_matmulnbits(packed), weight.dequantize())


def test_order_is_checked() -> None:
    with pytest.raises(OptionError, match="must come before quantize"):
        check(parse("quantize,magr"))
    with pytest.raises(OptionError, match="twice"):
        check(parse("quantize,quantize"))


def test_registry_is_complete() -> None:
    for name, kind in PASSES.items():
        assert kind.name == name
        assert kind.summary
        assert kind() == parse(name)[0]
        assert all(f"{option}:" in (kind.__doc__ or "") for option in options_of(kind)), f"{name}: undocumented option"
        assert issubclass(kind, LayerPass)
        assert issubclass(kind, ir.passes.InPlacePass)


def test_passes_leave_open_what_only_the_pipeline_knows() -> None:
    magr, quantize, *_ = resolve(parse("magr,quantize,compensate-bias{bias=any},emit-matmulnbits"))
    assert isinstance(magr, MagR)
    assert isinstance(quantize, Quantize)
    assert (magr.bias, quantize.bias) == ("any", "any")
    assert resolve(parse("quantize")) == parse("quantize")


def test_sequential_equals_layer_by_layer() -> None:
    passes = resolve(parse("magr,quantize{method=comq},compensate-bias,emit-matmulnbits"))
    one, two = graphs.chain(), graphs.chain()
    run_layers(passes, find(one)[0], lambda layer: stats_of(layer.k), lambda _: None)
    for layer in find(two)[0]:
        attach(layer, stats_of(layer.k))
    result = ir.passes.Sequential(*passes)(two)
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
    run_layers(parse("magr{alpha=0.01}"), find(model)[0], lambda layer: stats_of(layer.k), lambda _: None)
    layers, _ = find(model)
    assert [n.op_type for n in model.graph] == [n.op_type for n in graphs.chain().graph]
    for layer in layers:
        assert np.abs(layer.read()).max() < np.abs(before[layer.name]).max()
    with Session(model) as session:
        session.run(feeds(model))


def test_quantize_alone_is_fake_quantization() -> None:
    model = graphs.chain()
    run_layers(parse("quantize{bits=2,block_size=16}"), find(model)[0], lambda layer: stats_of(layer.k), lambda _: None)
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
    passes = parse("quantize{bits=2},compensate-bias")
    weights: dict[str, np.ndarray] = {}
    run_layers(passes[:1], find(model)[0], lambda layer: stats_of(layer.k), lambda j: weights.update({j.layer.name: j.weight}))
    again = graphs.chain()
    run_layers((Quantize(bits=2, bias="none"), CompensateBias()), find(again)[0], lambda layer: stats_of(layer.k), lambda _: None)
    for a, b in zip(find(model)[0], find(again)[0], strict=True):
        np.testing.assert_array_equal(a.read(), b.read())
        assert not np.array_equal(a.read_bias(), b.read_bias())  # type: ignore[arg-type]
