"""Folders of onnxruntime-genai's model builder: optimized, they generate in onnxruntime-genai what they do in onnxruntime."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import magr_onnx
from magr_onnx.models import bundled
from tests.edge.targets import FOLDER, ROOT, refuse
from tests.graphs import Array
from tests.integrations.test_genai import generate

PYTHON = FOLDER / "genai/bin/python"
SHARED = ROOT.parent / "shared/data/lm"
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
COMMON = {"max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1023, "pad_token_id": 0}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "tied, with norms of heads": ("Qwen3Config", {"vocab_size": 1024, **SIZES, **COMMON, "head_dim": 32, "tie_word_embeddings": True}),
    "with a sliding window": ("Gemma2Config", {"vocab_size": 1024, **SIZES, **COMMON, "head_dim": 32, "sliding_window": 24}),
}
PROMPTS = np.load(bundled.HELD_OUT)["input_ids"][:2, :30]


def build(folder: Path, kind: str, options: Mapping[str, Any], tokenizer: Path, weights: Mapping[str, Array] | None = None) -> Path:
    """The folder that the builder makes of a configuration of transformers."""
    if not PYTHON.exists():
        refuse("genai", f"{PYTHON} is not installed (.ci/edge does it)")
    (folder / "made.json").write_text(json.dumps({"class": kind, "options": options}))
    (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    if weights is not None:
        np.savez(folder / "weights.npz", **weights)  # type: ignore[arg-type]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    builder = ["-m", "onnxruntime_genai.models.builder", "-i", "hf", "-o", "built", "-p", "fp32", "-e", "cpu", "-c", "cache"]
    for arguments in ([str(Path(__file__).with_name("genai.py")), "."], builder):
        done = subprocess.run([PYTHON, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=900, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
    return folder / "built"


def trained() -> tuple[dict[str, Any], dict[str, Array]]:
    """Configuration and parameters of the language model in ../shared, by the names of transformers."""
    model = onnx.load(SHARED / "model.onnx")
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    matrices = [arrays[node.input[1]].T for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in arrays]
    weights = {"model.embed_tokens.weight": arrays["e.weight"], "model.norm.weight": arrays["n.w"], "lm_head.weight": matrices[-1]}
    names = [*(f"self_attn.{p}_proj" for p in "qkvo"), *(f"mlp.{p}_proj" for p in ("gate", "up", "down"))]
    for layer in range(6):
        at = f"model.layers.{layer}"
        weights |= {f"{at}.{name}.weight": matrix for name, matrix in zip(names, matrices[7 * layer :], strict=False)}
        weights |= {f"{at}.{name}_layernorm.weight": arrays[f"b.{layer}.{n}.w"] for name, n in (("input", "n1"), ("post_attention", "n2"))}
    sizes = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4}
    made = {**sizes, **COMMON, "vocab_size": 2048, "eos_token_id": 2047, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
    return made, weights


def check(built: Path, out: Path, prompts: Array, count: int) -> None:
    for prompt in prompts:
        expected = magr_onnx.generate(out, prompt=prompt.tolist(), max_tokens=count).results[0].tokens
        tokens = generate(out, prompt, count)
        assert tokens == list(expected[: len(tokens)])
        assert len(tokens) == count or tokens[-1:] == [json.loads((built / "genai_config.json").read_text())["model"]["eos_token_id"]]


@pytest.mark.parametrize("kind", KINDS)
def test_folders_of_the_builder_generate_the_same(kind: str, tmp_path: Path) -> None:
    """Random weights, in the forms of several families of models."""
    built = build(tmp_path, *KINDS[kind], bundled.FOLDER / "tokenizer.json")
    data = [{"input_ids": np.load(bundled.CALIBRATION)["input_ids"][:16, :64]}]
    for name, options in {"a": {"preset": "llm-int4"}, "b": {"format": "qdq-int8"}}.items():
        magr_onnx.optimize_folder(built, data, output=tmp_path / name, effort="fast", **options)
        check(built, tmp_path / name, PROMPTS, 100)


@pytest.mark.skipif(not SHARED.exists(), reason="needs the trained language model in ../shared")
def test_a_trained_model_of_the_builder(tmp_path: Path) -> None:
    """Its float file is the model it was made from; 256 tokens are the same in both runtimes; its text is hardly worse in 4 bits."""
    options, weights = trained()
    built = build(tmp_path, "LlamaConfig", options, SHARED / "tokenizer.json", weights)
    held = np.load(SHARED / "heldout.npz")["input_ids"]
    judged = magr_onnx.validate(SHARED / "model.onnx", SHARED / "model.onnx", {"input_ids": held[:8]}, layers=False, latency=False)
    out = tmp_path / "out"
    data = [{"input_ids": np.load(SHARED / "calibration.npz")["input_ids"][at : at + 8, :128]} for at in range(0, 32, 8)]
    magr_onnx.optimize_folder(built, data, output=out, effort="fast")
    result = magr_onnx.validate(
        built / "model.onnx", out / "model.onnx", {"input_ids": held[:8]}, decode_steps=0, layers=False, latency=False
    )
    ((expected, _), (before, after)) = (v.arithmetics["default"][0].cross_entropy or (0, 0) for v in (judged, result))
    assert abs(before - expected) < 1e-3
    assert after - before < 0.03
    check(built, out, held[:4, :40], 64)
