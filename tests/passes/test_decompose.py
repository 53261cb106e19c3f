"""Fused operators written out: the same outputs in onnxruntime, and gradients where there were none."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

import magr_onnx
from magr_onnx.passes.instrument.backward import Backward
from magr_onnx.passes.instrument.decompose import decomposed
from magr_onnx.passes.instrument.gradients import shaped_values
from magr_onnx.passes.instrument.taps import Extension, shape_taps
from magr_onnx.runtime.ort.session import Session
from tests import decoders, graphs
from tests.decoders import HEADS, KV_HEADS, LAYERS, SIZE, VOCAB
from tests.graphs import Array, Builder, random


def feeds(past: int, length: int = 5, samples: int = 2) -> dict[str, Array]:
    rng = np.random.default_rng(past)
    names = [f"past_key_values.{i}.{kind}" for i in range(LAYERS) for kind in ("key", "value")]
    caches = {name: random(samples, KV_HEADS, past, SIZE, seed=i, scale=1.0) for i, name in enumerate(names)}
    ids = rng.integers(0, VOCAB, (samples, length))
    return {"input_ids": ids, "attention_mask": np.ones((samples, past + length), np.int64), **caches}


def fused(model: ir.Model) -> set[str]:
    return {node.op_type for node in model.graph if node.domain == "com.microsoft"}


@pytest.mark.parametrize("past", [0, 3])
@pytest.mark.parametrize("packed", [False, True])
def test_a_decoder_of_the_builder_computes_the_same(packed: bool, past: int) -> None:
    model = decoders.genai(packed=packed)
    written_out = decomposed(model)
    assert fused(model) == {"GroupQueryAttention", "SkipSimplifiedLayerNormalization"}
    assert not fused(written_out)
    batch = feeds(past, samples=1 if past else 2)  # onnxruntime continues one sample at a time
    with Session(model) as before, Session(written_out) as after:
        assert before.outputs == after.outputs
        for expected, actual in zip(before.run(batch), after.run(batch), strict=True):
            np.testing.assert_allclose(actual, expected, atol=2e-4)


def test_gradients_pass_through_a_decoder_of_the_builder() -> None:
    """Against finite differences of the model as it is, from the logits back to the first queries, keys and values."""
    model = decoders.genai(packed=True)
    name = "model.layers.0.attn.qkv_proj.MatMul.weight"
    model.graph.inputs.append(model.graph.initializers[name])  # a caller may give it, and so can differences
    batch, probe = feeds(0, samples=2), random(2, 5, VOCAB, seed=7, scale=1.0)
    copy = Extension(decomposed(model))
    values = shaped_values(copy.model)
    with Session(shape_taps(copy.model, values)) as session:
        shapes = {n: tuple(map(int, shape)) for n, shape in zip(values, session.run(batch), strict=True)}
    backward = Backward(copy, shapes)
    found = backward.run({"logits": copy.constant("probe", probe)}, [name])
    assert not backward.blocked
    copy.output(copy.add("Identity", [found[name]], "gradient"))
    weight = model.graph.initializers[name].const_value.numpy()  # type: ignore[union-attr]
    with Session(copy.finish()) as session, Session(model) as plain:
        (gradient,) = session.run(batch)
        for i in [(3, 0), (10, 70), (20, 100), (33, 127), (60, 5)]:
            step, values_at = 1e-2, []
            for sign in (1, -1):
                moved = weight.copy()
                moved[i] += sign * step
                values_at.append(float(np.vdot(probe.astype(np.float64), plain.run({**batch, name: moved}, ["logits"])[0])))
            assert gradient[i] == pytest.approx(
                (values_at[0] - values_at[1]) / (2 * step), rel=2e-2, abs=2e-2 * float(np.abs(gradient).max())
            )


def test_a_decoder_of_the_builder_is_solved_under_gradients_and_tuned() -> None:
    batches = [{**feeds(0, samples=2), "input_ids": decoders.tokens(2, 5, seed=i)} for i in range(8)]
    _, report = magr_onnx.optimize(decoders.genai(), batches, effort="best", bits=2, include=["*"])
    assert not [note for note in report.notes if "no gradients" in note or "cannot be differentiated" in note]
    assert any("tuned" in note for note in report.notes)


def attention(**attributes: object) -> ir.Model:
    """One GroupQueryAttention of 5 tokens."""
    b = Builder(17)
    q, k, v = (b.input(name, ["batch", "time", heads * SIZE]) for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)))
    lengths, total = (b.constant(name, np.array(value, np.int32)) for name, value in (("lengths", [4, 4]), ("total", 5)))
    node = ir.node(
        "GroupQueryAttention",
        [q, k, v, None, None, lengths, total],
        {"num_heads": HEADS, "kv_num_heads": KV_HEADS, **attributes},
        domain="com.microsoft",
        num_outputs=3,
        name="attention",
    )
    for value, name in zip(node.outputs, ("y", "present_key", "present_value"), strict=True):
        value.name, value.dtype = name, ir.DataType.FLOAT
    b.nodes.append(node)
    model = b.model(node.outputs[0], ["batch", "time", HEADS * SIZE])
    model.opset_imports["com.microsoft"] = 1
    return model


@pytest.mark.parametrize("attributes", [{}, {"scale": 0.5}, {"softcap": 2.0}, {"local_window_size": 2}], ids=str)
def test_forms_of_attention(attributes: dict[str, object]) -> None:
    model = attention(**attributes)
    sizes = {"q": HEADS, "k": KV_HEADS, "v": KV_HEADS}
    batch = {name: random(2, 5, heads * SIZE, seed=i, scale=2.0) for i, (name, heads) in enumerate(sizes.items())}
    written_out = decomposed(model)
    assert not fused(written_out)
    with Session(model) as before, Session(written_out) as after:
        np.testing.assert_allclose(after.run(batch)[0], before.run(batch)[0], atol=1e-4)


MASK = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]], np.int32)
OPTIONS: dict[str, tuple[dict[int, Array], dict[str, object]]] = {
    "plain": ({}, {}),
    "bias": ({3: random(3 * HEADS * SIZE, seed=7, scale=1.0)}, {}),
    "mask": ({4: MASK}, {}),
    "bias of scores": ({5: random(1, HEADS, 4, 6, seed=8, scale=2.0)}, {}),
    "scale": ({}, {"scale": 0.5}),
    "past": ({6: random(2, HEADS, 3, SIZE, seed=5), 7: random(2, HEADS, 3, SIZE, seed=6)}, {}),
    "unidirectional": ({}, {"unidirectional": 1}),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_forms_of_multi_head_attention(option: str) -> None:
    more, attributes = OPTIONS[option]
    b = Builder(17)
    length = 4 if option == "unidirectional" else 6
    inputs: list[ir.Value | None] = [b.input(name, ["batch", n, HEADS * SIZE]) for name, n in (("q", 4), ("k", length), ("v", length))]
    inputs += [b.constant(f"input_{i}", more[i]) if i in more else None for i in range(3, max(more, default=2) + 1)]
    present = ["present_key", "present_value"] * (option == "past")
    node = ir.node(
        "MultiHeadAttention", inputs, {"num_heads": HEADS, **attributes}, domain="com.microsoft", num_outputs=1 + len(present), name="mha"
    )
    for value, name in zip(node.outputs, ("y", *present), strict=True):
        value.name, value.dtype = name, ir.DataType.FLOAT
    b.nodes.append(node)
    model = b.model(node.outputs[0], ["batch", 4, HEADS * SIZE])
    model.opset_imports["com.microsoft"] = 1
    batch = {name: random(2, n, HEADS * SIZE, seed=i, scale=2.0) for i, (name, n) in enumerate((("q", 4), ("k", length), ("v", length)))}
    written_out = decomposed(model)
    assert not fused(written_out)
    with Session(model) as before, Session(written_out) as after:
        np.testing.assert_allclose(after.run(batch)[0], before.run(batch)[0], atol=1e-4)


@pytest.mark.parametrize("rank", [3, 4])
@pytest.mark.parametrize("part", [0, 8])
def test_rotary_embeddings(part: int, rank: int) -> None:
    b = Builder(17)
    shape: list[int | str] = ["batch", 5, HEADS * SIZE] if rank == 3 else ["batch", HEADS, 5, SIZE]
    x, positions = b.input("x", shape), b.input("positions", ["batch", 5], ir.DataType.INT64)
    tables = [b.constant(name, table[:, : (part or SIZE) // 2]) for name, table in zip(("cos", "sin"), decoders.angles(), strict=True)]
    attributes = {"rotary_embedding_dim": part, "num_heads": HEADS} if part else {}
    node = ir.node("RotaryEmbedding", [x, positions, *tables], attributes, domain="com.microsoft", name="rotary")
    node.outputs[0].name, node.outputs[0].dtype = "out", ir.DataType.FLOAT
    b.nodes.append(node)
    model = b.model(node.outputs[0], shape)
    model.opset_imports["com.microsoft"] = 1
    batch = {"x": random(2, *(int(d) for d in shape[1:]), scale=2.0), "positions": np.random.default_rng(0).integers(0, 30, (2, 5))}
    written_out = decomposed(model)
    assert not fused(written_out)
    with Session(model) as before, Session(written_out) as after:
        np.testing.assert_allclose(after.run(batch)[0], before.run(batch)[0], atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "FastGelu"])
def test_norms_and_gelu(kind: str, bias: bool) -> None:
    b = Builder(17)
    x, skip = b.input("x", ["batch", 3, 16]), b.input("skip", ["batch", 3, 16])
    scale, shift, added = (b.constant(name, random(16, seed=i)) for i, name in enumerate(("scale", "shift", "added")))
    inputs = {
        "SkipLayerNormalization": [x, skip, scale, shift],
        "SkipSimplifiedLayerNormalization": [x, skip, scale],
        "FastGelu": [b.node("Add", [x, skip])],
    }[kind]
    node = ir.node(kind, [*inputs, *[added] * bias], {}, domain="com.microsoft", name="fused")
    node.outputs[0].name, node.outputs[0].dtype = "out", ir.DataType.FLOAT
    b.nodes.append(node)
    model = b.model(node.outputs[0], ["batch", 3, 16])
    model.opset_imports["com.microsoft"] = 1
    batch = {"x": random(2, 3, 16, scale=2.0), "skip": random(2, 3, 16, seed=1, scale=2.0)}
    with Session(model) as before, Session(decomposed(model)) as after:
        np.testing.assert_allclose(after.run(batch)[0], before.run(batch)[0], atol=1e-3)


@pytest.mark.parametrize("kind", ["genai with a fixed buffer", "genai with a sliding window"])
def test_what_is_not_supported_stays(kind: str) -> None:
    assert fused(decomposed(decoders.KINDS[kind]())) == {"GroupQueryAttention"}


def test_a_model_without_fused_operators_is_not_copied() -> None:
    model = graphs.matmul()
    assert decomposed(model) is model
