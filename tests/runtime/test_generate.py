"""Greedy generation: with and without a cache, as a loop over the whole model has it; from the command line; what ends it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from tokenizers import Tokenizer as Tool
from typer.testing import CliRunner

import magr_onnx
from magr_onnx.cli.app import app
from magr_onnx.errors import CalibrationError, ModelError, NonFiniteError, OptionError, RuntimeFailure
from magr_onnx.models import bundled
from tests import decoders, docs_given
from tests.graphs import Builder, random

PROMPT = [3, 14, 15, 92, 65]


def whole(path: Path, prompt: list[int], count: int) -> list[int]:
    """The most likely tokens, with all tokens run at once for every new one and an empty past."""
    session = ort.InferenceSession(str(path))
    ids = list(prompt)
    for _ in range(count):
        feed = {}
        for i in session.get_inputs():
            if i.name.startswith("past"):
                longest = i.shape[2] if isinstance(i.shape[2], int) else decoders.WINDOW if "sliding" in i.shape[2] else 0
                feed[i.name] = np.zeros((1, decoders.KV_HEADS, longest, decoders.SIZE), np.float32)
        length = len(ids)
        made = {"input_ids": [ids], "attention_mask": [[1] * length], "position_ids": [list(range(length))]}
        feed |= {i.name: np.array(made[i.name], np.int64) for i in session.get_inputs() if i.name in made}
        ids.append(int(session.run(["logits"], feed)[0][0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("make", decoders.KINDS.values(), ids=decoders.KINDS.keys())
def test_steps_with_a_cache_are_runs_of_the_whole(make: Callable[[], ir.Model], tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    ir.save(make(), path)
    result = magr_onnx.generate(path, prompt=PROMPT, max_tokens=20)
    assert list(result.results[0].tokens) == whole(path, PROMPT, 20)
    assert result.prompt == tuple(PROMPT)
    assert result.differs is None
    assert result.results[0].end == "length"
    assert result.results[0].tokens_per_second is not None


@pytest.mark.parametrize("width", ["time", 32])
def test_models_without_a_cache(width: int | str, tmp_path: Path) -> None:
    """A mean over the tokens so far, and a head."""
    b = Builder()
    ids = b.input("input_ids", ["batch", width], ir.DataType.INT64)
    x = b.node("Gather", [b.constant("table", random(64, 32)), ids])
    x.dtype = ir.DataType.FLOAT
    sums = b.node("CumSum", [x, b.constant("axis", np.array(1))])
    path = tmp_path / "model.onnx"
    ir.save(b.model(b.node("MatMul", [sums, b.constant("head", random(32, 64))]), ["batch", width, 64], "logits"), path)
    table, head, seen = random(64, 32), random(32, 64), [1, 2]
    for _ in range(10):
        seen.append(int((table[seen].sum(0) @ head).argmax()))
    assert list(magr_onnx.generate(path, prompt="1, 2", max_tokens=10).results[0].tokens) == seen[2:]
    if width == 32:
        assert len(magr_onnx.generate(path, prompt=[1, 2], max_tokens=10).results[0].tokens) == 10
        with pytest.raises(ModelError, match="takes 32 tokens at a time, and there are 40"):
            magr_onnx.generate(path, prompt=[1] * 40)


def test_one_token_at_a_time(tmp_path: Path) -> None:
    model = decoders.genai()
    fixed, free = tmp_path / "fixed.onnx", tmp_path / "free.onnx"
    ir.save(model, free)
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.shape = ir.Shape([{"batch_size": 2, "sequence_length": 1}.get(str(getattr(d, "value", d)), d) for d in value.shape])
    ir.save(model, fixed)
    tokens = [magr_onnx.generate(path, prompt=PROMPT, max_tokens=8).results[0].tokens for path in (fixed, free)]
    assert tokens[0] == tokens[1]


def test_the_command_shows_both_and_where_they_differ(tmp_path: Path) -> None:
    docs_given.decoder_folder(tmp_path / "decoder")
    quantized = tmp_path / "quantized"
    magr_onnx.optimize_folder(tmp_path / "decoder", output=quantized, bits=2, effort="fast")
    arguments = ["generate", str(tmp_path / "decoder"), str(quantized), "--max-tokens", "30"]
    made = CliRunner().invoke(app, [*arguments, "--prompt", "w1 w2 w3"])
    assert made.exit_code == 0, made.output
    tokens = [whole(folder / "model.onnx", [1, 2, 3], 30) for folder in (tmp_path / "decoder", quantized)]
    first = next(i for i, (a, b) in enumerate(zip(*tokens, strict=True)) if a != b)
    for folder, ids in zip((tmp_path / "decoder", quantized), tokens, strict=True):
        assert f"{folder / 'model.onnx'}:\n{' '.join(f'w{i}' for i in ids)}\n" in made.stdout
        assert f"{folder / 'model.onnx'}: 30 tokens, the first in" in made.stdout
    assert f"the first {first} tokens are the same, and number {first + 1} differs" in made.stdout
    data = json.loads(CliRunner().invoke(app, [*arguments, "--json"], input="w1 w2 w3\n").stdout)
    assert [each["tokens"] for each in data["results"]] == tokens
    assert (data["differs"], data["prompt"]) == (first, [1, 2, 3])
    same = CliRunner().invoke(app, ["generate", str(quantized), str(quantized), "--max-tokens", "5", "--prompt", "w1"])
    assert "all 5 tokens are the same" in same.stdout
    assert CliRunner().invoke(app, [*arguments, "--prompt", "w1", "-q"]).stdout == ""


def test_text_comes_in_whole_characters() -> None:
    pieces: list[tuple[int, str]] = []
    folder = bundled.FOLDER
    result = magr_onnx.generate(
        bundled.MODEL, prompt="She said “", max_tokens=40, on_token=lambda model, token, text: pieces.append((token, text))
    )
    tool = Tool.from_file(str(folder / "tokenizer.json"))
    prompt = tool.encode("She said “").ids
    (one,) = result.results
    assert list(result.prompt) == prompt
    assert list(one.tokens) == whole(bundled.MODEL, prompt, 40) == [token for token, _ in pieces]
    assert one.text == "".join(text for _, text in pieces) == tool.decode(list(one.tokens))
    assert not any("\ufffd" in text for _, text in pieces)


def test_what_ends_a_text(tmp_path: Path) -> None:
    folder = tmp_path / "decoder"
    docs_given.decoder_folder(folder)
    tokens = whole(folder / "model.onnx", PROMPT, 20)
    last = next(i for i in range(3, 20) if tokens[i] not in tokens[:i])
    model = {"decoder": {"filename": "model.onnx"}, "eos_token_id": [tokens[last]]}
    (folder / "genai_config.json").write_text(json.dumps({"model": model}))
    text = " ".join(f"w{i}" for i in PROMPT)
    (one,) = magr_onnx.generate(folder, prompt=text, max_tokens=20).results
    assert (list(one.tokens), one.end) == (tokens[:last], "end token")
    (folder / "genai_config.json").write_text('{"model": {"decoder": {"filename": "model.onnx"}, "context_length": 9}}')
    (one,) = magr_onnx.generate(folder, prompt=text, max_tokens=20).results
    assert (list(one.tokens), one.end) == (tokens[:4], "context")
    with pytest.raises(CalibrationError, match="the prompt has 10 tokens, and the model's context is 9"):
        magr_onnx.generate(folder, prompt=" ".join([text, text]))
    (one,) = magr_onnx.generate(bundled.MODEL, prompt=[1] * 120).results  # which has 128 positions
    assert (len(one.tokens), one.end) == (9, "failure")
    with pytest.raises(RuntimeFailure):
        magr_onnx.generate(bundled.MODEL, prompt=[1] * 129)


def test_chats_are_framed(tmp_path: Path) -> None:
    folder = tmp_path / "decoder"
    docs_given.decoder_folder(folder)
    template = "{% for m in messages %}w1 {{ m.content }} w2 {% endfor %}{% if add_generation_prompt %}w3{% endif %}"
    (folder / "chat_template.jinja").write_text(template)
    assert magr_onnx.generate(folder, prompt="w7 w8", chat=True, max_tokens=1).prompt == (1, 7, 8, 2, 3)


def test_what_cannot_be_generated_from_is_explained(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    ir.save(decoders.genai(), path)
    with pytest.raises(CalibrationError, match=r"no tokenizer.json in .* so a prompt is token ids; 'word' is none"):
        magr_onnx.generate(path, prompt="1 word")
    with pytest.raises(OptionError, match="the prompt is empty"):
        magr_onnx.generate(path, prompt=" ")
    with pytest.raises(OptionError, match="max_tokens = 0"):
        magr_onnx.generate(path, prompt=[1], max_tokens=0)
    (tmp_path / "other.onnx").write_bytes(path.read_bytes())
    with pytest.raises(ModelError, match=r"has 2 models \(model.onnx, other.onnx\); give the file of one"):
        magr_onnx.generate(tmp_path, prompt=[1])
    b = Builder()
    ids, scale = b.input("input_ids", ["b", "t"], ir.DataType.INT64), b.input("scale", [1])
    x = b.node("Gather", [b.constant("table", random(8, 8)), ids])
    x.dtype = ir.DataType.FLOAT
    ir.save(b.model(b.node("Mul", [x, scale]), ["b", "t", 8], "logits"), path)
    with pytest.raises(ModelError, match=r"scale: float32 \(1\) do not follow from input_ids"):
        magr_onnx.generate(path, prompt=[1])
    b = Builder()
    x = b.node("Gather", [b.constant("table", np.full((8, 8), np.nan, np.float32)), b.input("input_ids", ["b", "t"], ir.DataType.INT64)])
    x.dtype = ir.DataType.FLOAT
    ir.save(b.model(x, ["b", "t", 8], "logits"), path)
    with pytest.raises(NonFiniteError, match="logits after 1 tokens"):
        magr_onnx.generate(path, prompt=[1])
    ir.save(graph_without_logits(), path)
    with pytest.raises(ModelError, match="no output called logits; its outputs are y"):
        magr_onnx.generate(path, prompt=[1])


def graph_without_logits() -> ir.Model:
    b = Builder()
    x = b.node("Gather", [b.constant("table", random(8, 8)), b.input("input_ids", ["b", "t"], ir.DataType.INT64)])
    x.dtype = ir.DataType.FLOAT
    return b.model(x, ["b", "t", 8])
