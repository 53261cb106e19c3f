"""Decoders with a cache: what they are fed, calibrated from tokens alone, run by onnxruntime step by step."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from typer.testing import CliRunner

import magr_onnx
from magr_onnx.cli.app import app
from magr_onnx.errors import CalibrationError, OptionError, OutputError
from magr_onnx.passes.emit.readback import read_weights
from magr_onnx.passes.graph.kv_cache import current_mask, pairs
from magr_onnx.passes.instrument.segments import residual_operand
from magr_onnx.passes.layers.linear import find
from magr_onnx.runtime.calibration.context import CalibrationContext
from magr_onnx.runtime.calibration.fisher import collect as fisher
from magr_onnx.runtime.calibration.moments import collect
from magr_onnx.runtime.data import decoders as feeding
from magr_onnx.runtime.data.sources import in_memory, open_data
from magr_onnx.runtime.ort.session import Session, inputs_of
from tests import decoders, docs_given
from tests.graphs import Array, Builder, random

EVERY = pytest.mark.parametrize("make", decoders.KINDS.values(), ids=decoders.KINDS.keys())
PLAIN = pytest.mark.parametrize("make", [decoders.genai, decoders.optimum])


def decode(session: Session, decoder: feeding.Decoder, ids: Array, count: int) -> Array:
    """Logits of the last ``count`` tokens, one at a time."""
    steps = [session.run(feed, ["logits"])[0] for feed in decoder.steps(session, ids, count)]
    result: Array = np.concatenate(steps, axis=1)
    return result


def recognised(model: ir.Model) -> feeding.Decoder:
    found = feeding.recognise(model)
    assert found is not None
    return found


def test_names_of_caches() -> None:
    inputs = ["input_ids", "past_key_values.0.key", "past_key_0", "past_1", "past_conv.0", "past_lonely"]
    outputs = ["logits", "present.0.key", "present_key_0", "present_1", "present_conv.0"]
    assert pairs(inputs, outputs) == dict(zip(inputs[1:5], outputs[1:], strict=True))


@EVERY
def test_prefill_then_decode_is_one_long_prefill(make: Callable[[], ir.Model]) -> None:
    model, ids = make(), decoders.tokens()
    decoder = recognised(model)
    with Session(model) as session:
        whole = session.run(decoder.start(ids), ["logits"])[0]
        np.testing.assert_allclose(decode(session, decoder, ids, 5), whole[:, -5:], atol=2e-5)


@EVERY
@pytest.mark.parametrize("effort", ["fast", "balanced"])
def test_tokens_are_all_it_takes(make: Callable[[], ir.Model], effort: str, tmp_path: Path) -> None:
    source, tokens, output = tmp_path / "decoder.onnx", tmp_path / "tokens.npz", tmp_path / "decoder.int4.onnx"
    model = make()
    onnx.save(ir.to_proto(model), str(source))
    ids = decoders.tokens(16)
    np.savez(tokens, input_ids=ids)
    arguments = ["optimize", str(source), "-o", str(output), "--calibration", str(tokens), "--validation", str(tokens)]
    result = CliRunner().invoke(app, [*arguments, "--bits", "8", "--effort", effort, "--exclude", "/lm_head/*"])
    assert result.exit_code == 0, result.output
    text = " ".join(result.output.split())
    assert "prefill of 192 tokens (16 samples, 4 batches) with an empty past" in text
    assert "the last tokens of 16 samples again, one by one, with the model's own past (16 batches)" in text
    assert "tokens.npz: 16 samples, 256 rows" in text
    assert "tokens.npz: 16 samples, provider" in text
    assert "4 outputs are the past of the next step, and not compared" in text
    quantized = ir.load(output)
    assert [(v.name, v.shape) for v in quantized.graph.inputs] == [(v.name, v.shape) for v in model.graph.inputs]
    assert [v.name for v in quantized.graph.outputs] == [v.name for v in model.graph.outputs]
    assert len(read_weights(quantized)) == len(find(model)[0]) - 1
    decoder, more = recognised(quantized), decoders.tokens(3, 20, seed=5)
    with Session(model) as floats, Session(output) as session:
        expected = floats.run(decoder.start(more), ["logits"])[0]
        whole = session.run(decoder.start(more), ["logits"])[0]
        np.testing.assert_allclose(decode(session, decoder, more, 6), whole[:, -6:], atol=5e-5)
        assert np.square(whole - expected).sum() < 1e-3 * np.square(expected).sum()


@PLAIN
def test_the_same_codes_as_from_whole_feeds(make: Callable[[], ir.Model], tmp_path: Path) -> None:
    """What a user would have to write: every input of every batch, in files."""
    model, ids = make(), decoders.tokens(8, 10)
    names = [str(v.name) for v in model.graph.inputs]
    pasts = [n for n in names if n.startswith("past")]

    def whole(now: Array, length: int, past: dict[str, Array]) -> dict[str, Array]:
        made = {"input_ids": now, "attention_mask": np.ones((len(now), length + now.shape[1]), np.int64)}
        if "position_ids" in names:
            made["position_ids"] = np.tile(np.arange(length, length + now.shape[1]), (len(now), 1))
        return made | past

    empty = {n: np.zeros((2, decoders.KV_HEADS, 0, decoders.SIZE), np.float32) for n in pasts}
    feeds = [whole(ids[at : at + 2], 0, empty) for at in range(0, 8, 2)]
    with Session(model) as session:
        for at in range(0, 8, 2):
            feed = whole(ids[at : at + 2, :8], 0, empty)
            for step in (8, 9):
                present = session.run(feed, [n.replace("past_key_values", "present") for n in pasts])
                feed = whole(ids[at : at + 2, step : step + 1], step, dict(zip(pasts, present, strict=True)))
                feeds.append(feed)
    for i, feed in enumerate(feeds):
        np.savez(tmp_path / f"{i:02}.npz", **feed)
    by_hand = magr_onnx.optimize(model, tmp_path, effort="fast", mask=None)
    masked = magr_onnx.optimize(model, tmp_path, effort="fast")
    made = magr_onnx.optimize(model, [{"input_ids": ids}], effort="fast", decode_steps=2)
    expected = read_weights(by_hand.model)
    assert len(expected) == 7 * decoders.LAYERS + 1
    for found in (masked, made):
        for name, weight in read_weights(found.model).items():
            np.testing.assert_array_equal(weight, expected[name])


@PLAIN
def test_padding_on_either_side_changes_nothing(make: Callable[[], ir.Model]) -> None:
    model, ids = make(), decoders.tokens(8, 9)
    left, right = (np.pad(ids, ((0, 0), pad)) for pad in ((3, 0), (0, 3)))
    wanted = [np.ones_like(ids), np.pad(np.ones_like(ids), ((0, 0), (3, 0))), np.pad(np.ones_like(ids), ((0, 0), (0, 3)))]
    sources = [{"input_ids": i, "attention_mask": m} for i, m in zip((ids, left, right), wanted, strict=True)]
    found = [list(feeding.open_for(model, [s], steps=2, runnable=model)) for s in sources]
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert a.keys() == b.keys()
            for name in a:
                np.testing.assert_array_equal(a[name], b[name])


def test_samples_of_one_length_go_together() -> None:
    model = decoders.genai()
    mask = np.ones((9, 12), np.int64)
    mask[::2, 7:] = 0
    data = feeding.open_for(model, [{"input_ids": decoders.tokens(9), "attention_mask": mask}], steps=3, runnable=model)
    batches = list(data)
    shapes = [b["input_ids"].shape for b in batches]
    assert shapes[:5] == [(2, 7), (2, 7), (1, 7), (2, 12), (2, 12)]
    assert all(shape[1] == 1 for shape in shapes[5:])
    assert len(batches) == len(data) == 5 + 5 * 3
    assert all((b["attention_mask"] == 1).all() for b in batches)
    assert [b["attention_mask"].shape[1] for b in batches[5:8]] == [5, 6, 7]
    assert "decode step 2" in data.label(7)


def test_decode_steps_lie_in_files_as_long_as_they_are_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = decoders.optimum()
    data = feeding.open_for(model, [{"input_ids": decoders.tokens(8)}], steps=2, runnable=model)
    selected = data.select([len(data) - 1])
    del data
    gc.collect()
    assert len(list(tmp_path.iterdir())) == 1
    first, second = (next(iter(selected)) for _ in range(2))
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name])
    del selected
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_decode_steps_that_cannot_be_written_are_an_error_of_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = decoders.optimum(), tmp_path / "model.onnx"
    ir.save(model, path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(OutputError, match=r"cannot write decode steps to .*nowhere.*or set TMPDIR"):
        feeding.open_for(model, [{"input_ids": decoders.tokens(8)}], runnable=path)


def test_decode_steps_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = decoders.genai()
    token = 4 * decoders.LAYERS * 2 * decoders.KV_HEADS * decoders.SIZE
    monkeypatch.setattr(feeding, "MAX_PAST_BYTES", 5 * token * 12 * 2)
    data = feeding.open_for(model, [{"input_ids": decoders.tokens(16)}], steps=2, runnable=model)
    assert [len(b["input_ids"]) for b in list(data)[4:]] == [1, 1, 1, 1, 1, 1, 2, 2]
    assert "of 5 samples" in data.notes[1]


def test_buffers_of_fixed_size_take_no_more_for_more_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """They were counted once for every token, so that no decode step of a model with a sliding window fitted."""
    model, steps = decoders.genai(window=True), 2
    window = 4 * decoders.LAYERS * 2 * decoders.KV_HEADS * decoders.SIZE * decoders.WINDOW
    monkeypatch.setattr(feeding, "MAX_PAST_BYTES", 5 * steps * window)
    data = feeding.open_for(model, [{"input_ids": decoders.tokens(16)}], steps=steps, runnable=model)
    assert "of 5 samples" in data.notes[1]
    assert sum(array.nbytes for b in list(data)[4:] for name, array in b.items() if name.startswith("past")) == 5 * steps * window
    monkeypatch.setattr(feeding, "MAX_PAST_BYTES", steps * window - 1)
    data = feeding.open_for(model, [{"input_ids": decoders.tokens(16)}], steps=steps, runnable=model)
    assert (len(data), data.notes[1]) == (4, "no decode steps were fed: the pasts of one sample take more than 0.0 GB")


@pytest.mark.parametrize(
    ("source", "steps", "runs", "note"),
    [
        (decoders.tokens(3), 4, True, "3 batches of tokens"),
        (decoders.tokens(8), 4, False, "too large for max_memory"),
        (decoders.tokens(8, 1), 4, True, "one token each"),
    ],
)
def test_prefill_alone_says_why(source: Array, steps: int, runs: bool, note: str) -> None:
    model = decoders.genai()
    data = feeding.open_for(model, [{"input_ids": source}], steps=steps, runnable=model if runs else None)
    assert note in " ".join(data.notes)
    assert all(b["input_ids"].shape[1] == source.shape[1] for b in data)


def test_the_users_own_positions_are_not_used() -> None:
    ids = decoders.tokens(4, 6)
    data = feeding.open_for(decoders.optimum(), [{"input_ids": ids, "position_ids": ids + 3}], steps=0)
    assert "position_ids of the data were not used" in data.notes[1]
    np.testing.assert_array_equal(next(iter(data))["position_ids"], [np.arange(6)])


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"input_ids": decoders.tokens(2), "labels": decoders.tokens(2)}, "has arrays labels beside input_ids"),
        ({"input_ids": decoders.tokens(2).astype(np.float32)}, "expected integers (samples, tokens)"),
        ({"input_ids": decoders.tokens(2), "attention_mask": np.ones((2, 5))}, "expected that of input_ids, (2, 12)"),
        ({"input_ids": decoders.tokens(1, 3), "attention_mask": np.array([[1, 0, 1]])}, "expected consecutive ones"),
        ({"input_ids": decoders.tokens(1, 3), "attention_mask": np.zeros((1, 3))}, "marks 0 tokens"),
        ({"ids": decoders.tokens(1, 3)}, "has arrays ids; the model's inputs are input_ids"),
    ],
)
def test_bad_tokens(batch: dict[str, Array], message: str) -> None:
    with pytest.raises(CalibrationError) as caught:
        feeding.open_for(decoders.genai(), [batch])
    assert message in str(caught.value)


def test_inputs_that_tokens_do_not_give() -> None:
    model = decoders.optimum()
    model.graph.inputs.append(ir.val("encoder_hidden_states", ir.DataType.FLOAT, ["batch_size", "n", 8]))
    with pytest.raises(CalibrationError, match=r"encoder_hidden_states: float32 \(\?, \?, 8\) do not follow.*give complete feeds"):
        feeding.open_for(model, [{"input_ids": decoders.tokens()}])
    model = decoders.optimum()
    for value in model.graph.inputs:
        if str(value.name).startswith("past"):
            value.shape = ir.Shape(["batch_size", decoders.KV_HEADS, 32, decoders.SIZE])
    with pytest.raises(CalibrationError, match=r"4 past inputs have a fixed length"):
        feeding.open_for(model, [{"input_ids": decoders.tokens()}])
    for value in model.graph.inputs:
        if str(value.name).startswith("past"):
            value.shape = ir.Shape(["batch_size", decoders.KV_HEADS, "past", "size"])
    with pytest.raises(CalibrationError, match=r"the size of axis 3 of the past input past_key_values.0.key.* is not known"):
        feeding.open_for(model, [{"input_ids": decoders.tokens()}])
    with pytest.raises(OptionError, match="decode_steps=-1"):
        feeding.open_for(decoders.genai(), [{"input_ids": decoders.tokens()}], steps=-1)


@pytest.mark.parametrize("size", [1, 2])
def test_a_past_may_fix_the_number_of_samples(size: int) -> None:
    model = decoders.optimum()
    for value in model.graph.inputs:
        if str(value.name).startswith("past"):
            value.shape = ir.Shape([size, decoders.KV_HEADS, "past_sequence_length", decoders.SIZE])
    decoder = recognised(model)
    assert decoder.samples == size
    assert {(p.batch, p.length) for p in decoder.pasts} == {(0, 2)}
    batches = feeding.open_for(model, [{"input_ids": decoders.tokens(12, 8)}], runnable=model)
    assert {len(batch["input_ids"]) for batch in batches} == {size}
    assert any("decode: the last tokens" in note for note in batches.notes)


def test_samples_that_fill_no_batch_count_once() -> None:
    """A model that takes 4 samples at a time and 10 samples, in any form, are fed and counted as those of one that takes any number."""
    ids = decoders.tokens(10)
    layers = [layer for layer in find(decoders.optimum())[0] if layer.name.endswith("q_proj/MatMul")]
    whole = decoders.optimum()
    expected = collect(whole, layers, CalibrationContext(feeding.open_for(whole, {"input_ids": ids}, steps=0))).stats
    fixed = decoders.optimum()
    for value in fixed.graph.inputs:
        if value.shape is not None:
            value.shape = ir.Shape([4 if getattr(d, "value", d) == "batch_size" else d for d in value.shape])
    for source in ({"input_ids": ids}, [{"input_ids": ids[:7]}, {"input_ids": ids[7:]}]):
        data = feeding.open_for(fixed, source, steps=0)
        assert data.samples == 10
        assert {b["input_ids"].shape for b in data} == {(4, 12)}
        assert any("were repeated to fill batches, and count once" in note for note in data.notes)
        for name, stats in collect(fixed, layers, CalibrationContext(data)).stats.items():
            assert stats.rows == expected[name].rows
            np.testing.assert_allclose(stats.gram, expected[name].gram, rtol=1e-3, atol=1e-4)
    with_steps = feeding.open_for(fixed, {"input_ids": decoders.tokens(18)}, steps=2, runnable=fixed)
    assert sorted(with_steps.weights) == [0.5] * 3 + [1] * 12
    assert any("the last tokens of 18 samples" in note for note in with_steps.notes)


@PLAIN
def test_a_mask_longer_than_the_tokens_marks_its_last(make: Callable[[], ir.Model]) -> None:
    """Users' own feeds may be padded; in decode steps the mask covers the past too."""
    model = make()
    decoder, ids = recognised(model), decoders.tokens(4, 8)
    with Session(model) as session:
        prefill, step = decoder.start(ids[:, :7]), next(iter(decoder.steps(session, ids, 1)))
    step["attention_mask"] = step["attention_mask"].copy()
    step["attention_mask"][2:, -1] = 0
    assert current_mask(step, "attention_mask").tolist() == [[True], [True], [False], [False]]
    layers, _ = find(model)
    wanted = layers[-1:]
    data = open_data([prefill, step], inputs_of(model))
    masked = collect(model, wanted, CalibrationContext(data, "attention_mask")).stats[wanted[0].reads]
    first = {n: a[:2] for n, a in step.items()}
    counted = collect(model, wanted, CalibrationContext(in_memory([prefill, first], "x"))).stats[wanted[0].reads]
    assert masked.rows == counted.rows == 4 * 7 + 2
    np.testing.assert_allclose(masked.gram, counted.gram, rtol=1e-3, atol=1e-5 * np.abs(counted.gram).max())


def test_gradients_are_those_of_the_logits() -> None:
    """A decoder with its cache among the outputs, and one without, weigh errors alike."""
    model, bare = decoders.optimum(), decoders.optimum()
    model.graph.outputs.insert(0, model.graph.outputs.pop())  # random gradients are numbered by output
    bare.graph.outputs[:] = bare.graph.outputs[-1:]
    data = feeding.open_for(model, [{"input_ids": decoders.tokens(4, 6)}], steps=0)
    layers, _ = find(model)
    with fisher(model, layers, data) as a, fisher(bare, find(bare)[0], data) as b:
        name = str(layers[0].output.name)
        found, expected = a.moments(name), b.moments(name)
        assert found is not None
        assert expected is not None
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6 * expected.max())


def test_validation_feeds_decoders_too(tmp_path: Path) -> None:
    model = decoders.genai()
    quantized = magr_onnx.optimize(model, [{"input_ids": decoders.tokens(8)}], effort="fast", bits=8).model
    result = magr_onnx.validate(model, quantized, [{"input_ids": decoders.tokens(8, seed=3)}], latency=False)
    metrics = next(iter(result.arithmetics.values()))
    assert [m.output for m in metrics] == ["logits"]
    assert metrics[0].kl is not None
    assert metrics[0].kl < 0.01
    assert result.batches == 4 + 4 * feeding.STEPS
    assert any("prefill of" in note for note in result.notes)


def test_an_opset_is_raised_around_operators_onnx_lacks() -> None:
    """SimplifiedLayerNormalization is in ONNX's domain and not in ONNX."""
    model = decoders.genai()
    assert [n.domain for n in model.graph if n.op_type == "SimplifiedLayerNormalization"] == [""]
    result = magr_onnx.optimize(model, [{"input_ids": decoders.tokens(4)}], format="qdq", effort="fast", bits=8)
    assert result.model.opset_imports[""] > model.opset_imports[""]
    decoder, ids = recognised(result.model), decoders.tokens(2, seed=4)
    with Session(model) as floats, Session(result.model) as session:
        expected, found = (s.run(decoder.start(ids), ["logits"])[0] for s in (floats, session))
    assert np.square(found - expected).sum() < 1e-3 * np.square(expected).sum()


def test_a_folder_with_text(tmp_path: Path) -> None:
    """As onnxruntime-genai's builder leaves it: a model, a tokenizer, a configuration."""
    folder, output, text = tmp_path / "decoder", tmp_path / "out", tmp_path / "text.txt"
    docs_given.decoder_folder(folder)
    docs_given.text(text)
    pytest.importorskip("tokenizers")
    result = CliRunner().invoke(app, ["optimize", str(folder), "-o", str(output), "--calibration", str(text), "--effort", "fast"])
    assert result.exit_code == 0, result.output
    assert "prefill of 192 tokens" in " ".join(result.output.split())
    assert (output / "genai_config.json").read_bytes() == (folder / "genai_config.json").read_bytes()
    models = folder / "model.onnx", output / "model.onnx"
    judged = magr_onnx.validate(*models, text, layers=False, latency=False)
    assert magr_onnx.validate(folder, output, text, layers=False, latency=False) == judged
    assert judged.batches > 1
    assert any("prefill of 192 tokens" in note for note in judged.notes)
    alone = magr_onnx.optimize(models[0], text, effort="fast").report
    assert "prefill of 192 tokens" in " ".join(alone.notes)
    with pytest.raises(CalibrationError, match=r"text.txt: there is no tokenizer.json beside the model, which is in no file"):
        magr_onnx.optimize(ir.load(models[0]), text)
    np.savez(tmp_path / "tokens.npz", input_ids=decoders.tokens())
    by_tokens = CliRunner().invoke(
        app, ["optimize", str(folder), "-o", str(tmp_path / "again"), "--calibration", str(tmp_path / "tokens.npz"), "--effort", "fast"]
    )
    assert by_tokens.exit_code == 0, by_tokens.output
    for name, weight in read_weights(ir.load(output / "model.onnx")).items():
        np.testing.assert_array_equal(weight, read_weights(ir.load(tmp_path / "again" / "model.onnx"))[name])


@pytest.mark.parametrize("last", [decoders.SIZE, -1])
def test_the_size_of_a_head_is_that_of_what_is_appended(last: int) -> None:
    """The cache of a model without GroupQueryAttention, whose last dimension has a name: values are reshaped, perhaps with -1."""
    model = decoders.optimum()
    for value in model.graph.inputs:
        if str(value.name).endswith(".value"):
            value.shape = ir.Shape(["batch_size", decoders.KV_HEADS, "past_sequence_length", "kv_cache_dim"])
    shape = model.graph.initializers[f"/model/constants/INT64/[0, 0, {decoders.KV_HEADS}, {decoders.SIZE}]"]
    shape.const_value = ir.tensor(np.array([0, 0, decoders.KV_HEADS, last]), name=shape.name)
    ids = decoders.tokens()
    with Session(model) as session:
        whole = session.run(recognised(decoders.optimum()).start(ids), ["logits"])[0]
        np.testing.assert_allclose(decode(session, recognised(model), ids, 5), whole[:, -5:], atol=2e-5)


def test_the_size_of_a_head_that_rotates() -> None:
    """As the builder writes attention in float16 for CPUs: RotaryEmbedding, Reshape with -1, Transpose, Concat."""
    b = Builder()
    ids, past = b.input("input_ids", ["batch", "time"], ir.DataType.INT64), b.input("past_key_values.0.key", ["batch", 4, "past", "size"])
    x = b.node("Gather", [b.constant("table", random(8, 64)), ids])
    key = b.node("MatMul", [x, b.constant("weight", random(64, 96))])
    angles = [b.constant(name, random(8, 12)) for name in ("cos_cache", "sin_cache")]
    rotated = b.node("RotaryEmbedding", [key, ids, *angles])
    heads = b.node("Transpose", [b.node("Reshape", [rotated, b.constant("shape", np.array([0, 0, 4, -1]))])], perm=[0, 2, 1, 3])
    model = b.model(b.node("Concat", [past, heads], axis=2), ["batch", 4, "total", "size"], "present.0.key")
    assert recognised(model).pasts[0].shape == (None, 4, None, 24)


def test_a_residual_that_a_norm_adds_is_seen() -> None:
    """Of every attention and feed-forward block: what error feedback aims at makes up for it."""
    model = decoders.genai()
    found = {layer.name.split("/", 3)[-1]: residual_operand(layer) for layer in find(model)[0] if "layers.0" in layer.name}
    assert found == dict.fromkeys(("attn/q_proj/MatMul", "attn/k_proj/MatMul", "attn/v_proj/MatMul"), None) | {
        "attn/o_proj/MatMul": "/model/embed_tokens/Gather/output_0",
        "mlp/gate_proj/MatMul": None,
        "mlp/up_proj/MatMul": None,
        "mlp/down_proj/MatMul": "/model/layers.0/post_attention_layernorm/SkipLayerNorm/output_3",
    }
