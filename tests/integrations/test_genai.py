"""onnxruntime-genai loads what was a folder of its builder, and generates from it what onnxruntime does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

import magr_onnx
from magr_onnx.models import bundled
from tests import decoders
from tests.graphs import Array

og = pytest.importorskip("onnxruntime_genai")
HELD = np.load(bundled.HELD_OUT)["input_ids"]


def generate(folder: Path, prompt: Array, count: int) -> list[int]:
    """The most likely tokens, by onnxruntime-genai."""
    model = og.Model(str(folder))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + count, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(prompt.astype(np.int32)[None])
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)[len(prompt) :]]


def plain(folder: Path, prompt: Array, count: int) -> list[int]:
    """The same by onnxruntime, step by step, with the cache passed on by hand."""
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    presents = [o.name for o in session.get_outputs() if o.name.startswith("present")]
    past = {name.replace("present", "past_key_values"): np.zeros((1, 5, 0, 32), np.float32) for name in presents}
    seen, new = 0, prompt.astype(np.int64)[None]
    tokens: list[int] = []
    while len(tokens) < count:
        seen += new.shape[1]
        feed = {"input_ids": new, "attention_mask": np.ones((1, seen), np.int64)}
        logits, *values = session.run(["logits", *presents], {**feed, "position_ids": np.arange(seen - new.shape[1], seen)[None], **past})
        past = dict(zip(past, values, strict=True))
        tokens.append(int(logits[0, -1].argmax()))
        new = np.array([tokens[-1:]])
    return tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("genai") / "tiny"
    decoders.bundled_folder(path)
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer

    path = tmp_path_factory.mktemp("text") / "text.txt"
    tool = Tokenizer.from_file(str(bundled.FOLDER / "tokenizer.json"))
    path.write_text(tool.decode(np.load(bundled.CALIBRATION)["input_ids"][:40].ravel().tolist()))
    return path


def test_the_folder_is_the_bundled_model(folder: Path) -> None:
    """The graph of these tests computes what the file in the package does."""
    ids = HELD[:2, :60]
    expected = onnxruntime.InferenceSession(str(bundled.MODEL)).run(None, {"input_ids": ids})[0]
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    feed: dict[str, Any] = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.tile(np.arange(60), (2, 1))}
    feed |= {i.name: np.zeros((2, 5, 0, 32), np.float32) for i in session.get_inputs() if i.name.startswith("past")}
    np.testing.assert_allclose(session.run(["logits"], feed)[0], expected, atol=2e-3)


OPTIONS: list[Any] = [
    {},
    {"preset": "llm-int4"},
    {"embeddings": "gather-block-quantized", "embedding_bits": 4, "external_data": True},
    {"embeddings": "dequantize", "format": "qdq", "bits": 8},
    pytest.param({"format": "dynamic-int8"}, marks=pytest.mark.slow),
    pytest.param({"format": "qdq-int8"}, marks=pytest.mark.slow),
    {"bits": 2, "low_rank": 8, "accuracy_level": 4},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(map(str, options.values())) or "default")
def test_tokens_are_those_of_onnxruntime(options: dict[str, Any], folder: Path, text: Path, tmp_path: Path) -> None:
    """256 tokens of four prompts, all the same."""
    out = tmp_path / "out"
    made = magr_onnx.optimize_folder(folder, text, output=out, effort="fast", samples=32, sequence_length=64, **options)
    names = ("chat_template.jinja", "genai_config.json", "tokenizer.json", "tokenizer_config.json")
    assert set(names) == set(made.carried)
    assert all((out / name).read_bytes() == (folder / name).read_bytes() for name in names)
    for row in range(4):
        prompt = HELD[row, :40]
        assert generate(out, prompt, 64) == plain(out, prompt, 64)


def test_tokens_are_mostly_those_of_the_float_model(folder: Path, text: Path, tmp_path: Path) -> None:
    """One step after the float model's own text, so that a difference does not change what follows."""
    out = tmp_path / "out"
    magr_onnx.optimize_folder(folder, text, output=out, samples=32, sequence_length=64)
    same = 0
    for row in range(4):
        tokens = generate(folder, HELD[row, :40], 64)
        assert tokens == plain(folder, HELD[row, :40], 64)
        for at in range(0, 64, 4):
            same += generate(out, np.array([*HELD[row, :40], *tokens[:at]]), 1) == tokens[at : at + 1]
    assert same >= 0.85 * 64


def test_text_and_chats_are_read_by_both_tokenizers(folder: Path) -> None:
    """What calibration reads are the tokens that onnxruntime-genai feeds."""
    from magr_onnx.runtime.data.tokenizer import Tokenizer

    theirs, ours = og.Tokenizer(og.Model(str(folder))), Tokenizer.open(folder)
    for text in ("She said that it was so.", "“No!” cried he; and 1,000 of them — naïve ones —\n\nwent on."):
        assert theirs.encode(text).tolist() == ours.encode([text])[0]
    messages = '[{"role": "user", "content": "Who was it?"}]'
    assert theirs.apply_chat_template(messages, add_generation_prompt=False) == ours.chat([{"role": "user", "content": "Who was it?"}])
