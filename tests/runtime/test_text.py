"""Text for language models: packed sequences, chats, tokens; perplexity of a text before and after."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from tokenizers import Tokenizer as Tool
from tokenizers import models, pre_tokenizers, processors
from typer.testing import CliRunner

import magr_onnx
from magr_onnx.cli.app import app
from magr_onnx.errors import CalibrationError, DependencyError
from magr_onnx.models import bundled
from magr_onnx.runtime.data import decoders, text
from magr_onnx.runtime.data.sources import Batches
from magr_onnx.runtime.data.tokenizer import Tokenizer
from magr_onnx.runtime.ort.session import InputInfo
from tests import decoders as made
from tests.graphs import Array, Builder, random

WORDS = ["<pad>", "<unk>", "<s>", "</s>", "<|user|>", "<|model|>", *[f"w{i}" for i in range(26)]]
IDS, MASK = (InputInfo(name, np.dtype(np.int64), (None, None)) for name in ("input_ids", "attention_mask"))
CHAT = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}\n"
    "<|{{ 'user' if message['role'] == 'user' else 'model' }}|> {% generation %}{{ message['content'] | trim }}{% endgeneration %} </s>\n"
    "{% endfor %}{% if add_generation_prompt %}<|model|>{% endif %}"
)
NOT = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
ADDED = {"__type": "AddedToken", "content": "<s>", "special": True, **NOT}
CONFIG = {"bos_token": ADDED, "eos_token": "</s>", "pad_token": "<pad>", "chat_template": CHAT}


def tokenizer(folder: Path, special: bool = True, config: Mapping[str, Any] = CONFIG) -> Tokenizer:
    tool = Tool(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tool.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tool.add_special_tokens(WORDS[2:6])
    if special:
        tool.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    tool.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.open(folder)


def words(*numbers: int) -> str:
    return " ".join(f"w{i}" for i in numbers)


def long_text(path: Path, count: int, seed: int = 0) -> list[int]:
    """Write ``count`` words in lines of five, and return their ids."""
    numbers = np.random.default_rng(seed).integers(0, 26, count).tolist()
    path.write_text("\n".join(words(*numbers[at : at + 5]) for at in range(0, count, 5)) + "\n")
    return [6 + i for i in numbers]


def packed(path: Path, folder: Path, batch_size: int = 16, vocabulary: int | None = None, **reading: Any) -> Batches:
    return text.packed(path, Tokenizer.open(folder), [IDS, MASK], batch_size, text.Reading(**reading), vocabulary)


def rows(data: Batches, name: str = "input_ids") -> list[list[int]]:
    return [row for batch in data for row in batch[name].tolist()]


def test_sequences_are_cut_from_the_whole_text(tmp_path: Path) -> None:
    tokenizer(tmp_path)
    ids = long_text(tmp_path / "text.txt", 103)
    data = packed(tmp_path / "text.txt", tmp_path, length=11)
    assert rows(data) == [[2, *ids[at : at + 10]] for at in range(0, 100, 10)]
    assert np.all(rows(data, "attention_mask"))
    assert data.notes == (f"{tmp_path / 'text.txt'}: 103 tokens; 10 sequences of 11 tokens",)


def test_sequences_are_drawn_by_the_seed(tmp_path: Path) -> None:
    tokenizer(tmp_path)
    long_text(tmp_path / "text.txt", 2000)
    every = rows(packed(tmp_path / "text.txt", tmp_path, length=11, samples=500))
    assert len(every) == 200
    drawn = [rows(packed(tmp_path / "text.txt", tmp_path, length=11, samples=20, seed=seed)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    for some in drawn:
        places = [every.index(row) for row in some]
        assert len(set(places)) == 20
        assert places == sorted(places)
    data = packed(tmp_path / "text.txt", tmp_path, length=11)
    assert len(rows(data)) == 128
    assert "128 of 200 sequences of 11 tokens, drawn with seed 0" in data.notes[0]


def test_short_texts_make_short_sequences_or_an_error(tmp_path: Path) -> None:
    tokenizer(tmp_path, special=False)
    path = tmp_path / "text.txt"
    long_text(path, 320)
    assert np.shape(rows(packed(path, tmp_path))) == (16, 20)
    long_text(path, 127)
    with pytest.raises(CalibrationError, match=r"text.txt: 127 tokens, and at least 128 .*sequences of at most 127 .*--sequence-length"):
        packed(path, tmp_path)
    assert np.shape(rows(packed(path, tmp_path, length=127))) == (1, 127)
    with pytest.raises(CalibrationError, match=r"127 tokens, and at least 200 are needed"):
        packed(path, tmp_path, length=200)
    path.write_text("\n \n")
    with pytest.raises(CalibrationError, match="0 tokens, and at least 128 are needed; give a longer text"):
        packed(path, tmp_path)


def test_lengths_that_files_and_models_state(tmp_path: Path) -> None:
    tokenizer(tmp_path)
    path = tmp_path / "text.txt"
    long_text(path, 20000)
    assert np.shape(rows(packed(path, tmp_path)))[1] == 512
    (tmp_path / "genai_config.json").write_text('{"model": {"context_length": 100}}')
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 200}')
    assert np.shape(rows(packed(path, tmp_path)))[1] == 100
    assert np.shape(rows(packed(path, tmp_path, length=300)))[1] == 300
    fixed = [InputInfo("input_ids", np.dtype(np.int32), (3, 17))]
    data = text.packed(path, Tokenizer.open(tmp_path), fixed, 16, text.Reading(samples=7))
    assert {batch["input_ids"].shape for batch in data} == {(3, 17)}
    assert data.weights[0] == 1 / 3


def test_batches_of_large_vocabularies_are_small(tmp_path: Path) -> None:
    tokenizer(tmp_path)
    long_text(tmp_path / "text.txt", 20000)
    sizes = [max(len(batch["input_ids"]) for batch in packed(tmp_path / "text.txt", tmp_path, vocabulary=v)) for v in (32, 100_000, 10**6)]
    assert sizes == [9, 1, 1]  # of 39 sequences, a fourth at a time; of 200 and 2,000 MB of logits a sequence


def test_batches_of_tokens_are_small_for_large_vocabularies(tmp_path: Path) -> None:
    """Of arrays, too, and in a model with a cache."""
    np.savez(tmp_path / "tokens.npz", input_ids=np.ones((32, 40), np.int64))
    model = classifier(9)
    model.graph.outputs[0].shape = ir.Shape(["batch", "time", 10**6])
    sizes = [
        {len(batch["input_ids"]) for batch in decoders.open_for(model, source)}
        for source in (tmp_path / "tokens.npz", [{"input_ids": np.ones((9, 40), np.int64)}])
    ]
    assert sizes == [{1}, {9}]  # 160 MB of logits a sequence; batches that a caller made stay
    cached = made.genai()
    cached.graph.outputs[-1].shape = ir.Shape(["batch_size", "sequence_length", 10**6])
    assert {len(batch["input_ids"]) for batch in decoders.open_for(cached, tmp_path / "tokens.npz", steps=0)} == {1}


def test_documents_are_joined_by_the_end_token(tmp_path: Path) -> None:
    """Chats and tokens have ends of their own; tokens that begin a sequence stand at its beginning only."""
    tokenizer(tmp_path)
    path = tmp_path / "mixed.jsonl"
    entries = [
        {"text": words(1, 2)},
        [{"role": "user", "content": f" {words(3)} "}, {"role": "assistant", "content": words(4)}],
        {"input_ids": [2, 20, 21]},
        {"messages": [{"role": "user", "content": words(5)}], "id": 7},
    ]
    path.write_text("\n\n".join(map(json.dumps, entries)) + "\n")
    assert rows(packed(path, tmp_path, length=15)) == [[2, 7, 8, 3, 4, 9, 3, 5, 10, 3, 20, 21, 4, 11, 3]]


@pytest.mark.parametrize("answer", [False, True])
def test_chats_are_written_as_transformers_writes_them(answer: bool, tmp_path: Path) -> None:
    made = tokenizer(tmp_path)
    Fast = pytest.importorskip("transformers").PreTrainedTokenizerFast
    chat = [{"role": "user", "content": " a <b> "}, {"role": "assistant", "content": "ü"}]
    theirs = Fast.from_pretrained(tmp_path)
    expected = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=answer)
    assert made.chat(chat, answer) == expected
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}{{ m | tojson }}{{ eos_token }}{% endfor %}")
    theirs = Fast.from_pretrained(tmp_path)
    assert Tokenizer.open(tmp_path).chat(chat) == theirs.apply_chat_template(chat, tokenize=False)


def test_lines_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    made = tokenizer(tmp_path)
    path = tmp_path / "bad.jsonl"
    lines = ['{"text": 5}', "{", '{"messages": []}', "3", '{"messages": [{"role": "system", "content": ""}]}', '{"input_ids": [-1]}']
    path.write_text("\n".join(lines))
    with pytest.raises(CalibrationError) as caught:
        text.documents(path, made)
    told = str(caught.value)
    for number, words in enumerate(("found an object with text", "not JSON", "messages", "found a int", "no system", "input_ids"), 1):
        (line,) = [line for line in told.splitlines() if f"bad.jsonl:{number}:" in line]
        assert words in line
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(CalibrationError, match=r"list.json: give a .jsonl file"):
        text.documents(tmp_path / "list.json", made)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    path.write_text('[{"role": "user", "content": "w1"}]')
    with pytest.raises(CalibrationError, match=r"bad.jsonl:1: there is no chat template in .*chat_template.jinja"):
        text.documents(path, Tokenizer.open(tmp_path))


def test_templates_are_sandboxed(tmp_path: Path) -> None:
    made = tokenizer(tmp_path, config={**CONFIG, "chat_template": "{{ ''.__class__.__mro__ }}{{ messages.append(1) }}"})
    with pytest.raises(CalibrationError, match="refuses it"):
        made.chat([{"role": "user", "content": "w1"}])


def test_beginnings_that_only_the_configuration_names(tmp_path: Path) -> None:
    assert tokenizer(tmp_path).prefix == (2,)
    assert tokenizer(tmp_path, special=False).prefix == ()
    assert tokenizer(tmp_path, special=False, config={**CONFIG, "add_bos_token": True}).prefix == (2,)


@pytest.mark.parametrize(("package", "use"), [("tokenizers", "text"), ("jinja2.sandbox", "chats")])
def test_missing_packages_are_named(package: str, use: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tokenizer(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DependencyError, match=rf"{use} needs? the package {package.partition('.')[0]}; pip install 'onnx-magr\[text\]'"):
        Tokenizer.open(tmp_path).chat([]) if use == "text" else made.chat([])


def classifier(width: int) -> ir.Model:
    """Logits of every token over ``width`` classes."""
    b = Builder()
    ids = b.input("input_ids", ["batch", "time"], ir.DataType.INT64)
    x = b.node("Gather", [b.constant("table", random(len(WORDS), 32)), ids])
    x.dtype = ir.DataType.FLOAT
    return b.model(b.node("MatMul", [x, b.constant("head", random(32, width))], "head"), ["batch", "time", width], "logits")


def test_language_models_are_those_whose_logits_cover_the_vocabulary(tmp_path: Path) -> None:
    tokenizer(tmp_path)
    long_text(tmp_path / "text.txt", 400)
    shapes = []
    for width in (len(WORDS) - 2, 9):
        data = decoders.open_for(classifier(width), tmp_path / "text.txt", reading=text.Reading(folders=[tmp_path]))
        shapes.append({batch["input_ids"].shape[1] for batch in data})
    assert shapes == [{26}, {6}]  # 400 // 16 and the one that begins it; lines of five and the same


def test_a_sequence_that_the_model_has_no_room_for_is_refused_first(tmp_path: Path) -> None:
    made.tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "text.txt").write_text("w1 w2 w3 w4 w5 w6 w7 w8\n" * 200)
    model = classifier(96)
    ir.save(model, tmp_path / "model.onnx")  # its table has fewer rows than the tokenizer words
    (tmp_path / "text.txt").write_text("w90 w91\n" * 200)
    with pytest.raises(CalibrationError, match=r"text.txt: the model fails on tokens of shape \(4, 25\); .*--sequence-length"):
        magr_onnx.optimize(tmp_path / "model.onnx", tmp_path / "text.txt")


def perplexity(path: Path, ids: Array) -> float:
    """Cross-entropy of the next token, by onnxruntime and logarithms of softmax."""
    logits = ort.InferenceSession(str(path)).run(None, {"input_ids": ids})[0].astype(np.float64)[:, :-1]
    probabilities = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities /= probabilities.sum(-1, keepdims=True)
    return -float(np.log(np.take_along_axis(probabilities, ids[:, 1:, None], -1)).mean())


@pytest.mark.slow
def test_the_bundled_model_from_text_to_perplexity(tmp_path: Path) -> None:
    """Text calibrates and measures; the figures are those of the tokens themselves."""
    source = bundled.MODEL
    tool = Tool.from_file(str(bundled.FOLDER / "tokenizer.json"))
    held = np.load(bundled.HELD_OUT)["input_ids"]
    words = tool.decode([int(i) for i in held[:40].ravel()])
    (tmp_path / "text.txt").write_text(words)
    ids = tool.encode(words).ids
    ids = np.array(ids[: len(ids) // 64 * 64]).reshape(-1, 64)
    ids = ids[np.sort(np.random.default_rng(3).choice(len(ids), 24, replace=False))]
    common = ["--samples", "24", "--sequence-length", "64", "--seed", "3"]
    out = tmp_path / "out.onnx"
    arguments = ["optimize", str(source), "-o", str(out), "--calibration", str(tmp_path / "text.txt"), "--effort", "fast", *common]
    made = CliRunner().invoke(app, arguments)
    assert made.exit_code == 0, made.output
    batches = [{"input_ids": ids[at : at + 6]} for at in range(0, 24, 6)]
    again = magr_onnx.optimize(source, batches, output=tmp_path / "again.onnx", effort="fast").model
    for name, value in again.graph.initializers.items():
        np.testing.assert_array_equal(value.const_value.numpy(), ir.load(out).graph.initializers[name].const_value.numpy())
    arguments = ["validate", str(source), str(out), "--text", str(tmp_path / "text.txt"), "--json", *common]
    result = json.loads(CliRunner().invoke(app, arguments).stdout)
    (metrics,) = result["arithmetics"]["default"]
    np.testing.assert_allclose(metrics["cross_entropy"], [perplexity(p, ids) for p in (source, out)], rtol=1e-6)
    assert not result["layers"]
    assert "24 of" in result["notes"][0]
    shown = CliRunner().invoke(app, [a for a in arguments if a != "--json"]).output
    assert f"cross-entropy {metrics['cross_entropy'][0]:.4f} -> {metrics['cross_entropy'][1]:.4f} nats a token" in shown
    assert "sequences of 64 tokens" in " ".join(shown.split())


def test_perplexity_needs_logits_of_tokens(tmp_path: Path) -> None:
    tokenizer(tmp_path)
    long_text(tmp_path / "text.txt", 400)
    b = Builder()
    x = b.node("Gather", [b.constant("table", random(len(WORDS), 32)), b.input("input_ids", ["batch", "time"], ir.DataType.INT64)])
    x.dtype = ir.DataType.FLOAT
    ir.save(b.model(b.node("MatMul", [x, b.constant("w", random(32, 32))]), ["batch", "time", 32], "hidden"), tmp_path / "m.onnx")
    arguments = ["validate", str(tmp_path / "m.onnx"), str(tmp_path / "m.onnx")]
    result = CliRunner().invoke(app, [*arguments, "--text", str(tmp_path / "text.txt")])
    assert "hidden" in str(result.exception)
    assert "no perplexity" in str(result.exception)
    both = CliRunner().invoke(app, [*arguments, "--text", "a", "--data", "b"])
    assert "give --data or --text" in str(both.exception)


def test_reports_replace_no_tokenizer(tmp_path: Path) -> None:
    tokenizer(tmp_path)
    long_text(tmp_path / "text.txt", 400)
    ir.save(classifier(len(WORDS)), tmp_path / "model.onnx")
    arguments = ["optimize", "model.onnx", "--calibration", "text.txt", "--tokenizer", "tokenizer.json", "--report", "tokenizer.json"]
    before = (tmp_path / "tokenizer.json").read_bytes()
    with contextlib.chdir(tmp_path):
        result = CliRunner().invoke(app, arguments)
    assert "tokenizer.json" in str(result.exception)
    assert (tmp_path / "tokenizer.json").read_bytes() == before
    assert not (tmp_path / "model.magr.onnx").exists()
