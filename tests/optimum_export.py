"""Folders as ``optimum-cli export onnx`` leaves them, of tiny models with random weights, and what optimum makes of the optimized ones.

Run by `test_folders` in a process of its own, since transformers and torch change much for those who come after:
``python -m tests.optimum_export check FOLDER`` prints what it found as JSON; ``sentences FOLDER`` only exports an encoder.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from optimum.exporters.onnx import main_export
from optimum.onnxruntime import ORTModelForSeq2SeqLM, ORTModelForSequenceClassification
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from magr_onnx.cli.app import app

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "many", "small", "words", "make", "one", "sentence"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
SMALL = {"vocab_size": len(WORDS) + len(SPECIAL)}


def tokenizer() -> Any:
    """Whole words, with the usual tokens around them."""
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*SPECIAL, *WORDS])}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=32, **names)


def export(model: Any, folder: Path, task: str) -> Path:
    """Export to ``folder``."""
    with tempfile.TemporaryDirectory() as source:
        model.save_pretrained(source)
        tokenizer().save_pretrained(source)
        main_export(source, folder, task=task, do_validation=False)
    return folder


def bert() -> Any:
    return BertConfig(**SMALL, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, max_position_embeddings=32)


def classifier(folder: Path, texts: Path) -> dict[str, Any]:
    """The command of the guide on a single model; logits before and after."""
    source = export(BertForSequenceClassification(bert()), folder / "classifier", "text-classification")
    out = folder / "classifier-int4"
    command = ["optimize", source, "-o", out, "--calibration", texts, "--batch-size", 4, "--report", folder / "report.json", "--quiet"]
    app(list(map(str, command)), standalone_mode=False)
    words = AutoTokenizer.from_pretrained(out)(["the lazy fox jumps over one small dog"], return_tensors="pt")
    logits = [ORTModelForSequenceClassification.from_pretrained(f)(**words).logits.numpy() for f in (source, out)]
    difference = float(np.linalg.norm(logits[1] - logits[0]) / np.linalg.norm(logits[0]))
    return {"source": str(source), "out": str(out), "report": str(folder / "report.json"), "difference": difference}


def translator(folder: Path) -> dict[str, Any]:
    """Several models in one folder, data-free; the same lengths of generated text say that all of them load."""
    config = T5Config(**SMALL, d_model=64, d_ff=96, num_layers=1, num_heads=4, d_kv=16, decoder_start_token_id=0, pad_token_id=0)
    source = export(T5ForConditionalGeneration(config), folder / "translator", "text2text-generation-with-past")
    out = folder / "translator-int4"
    app(["optimize", str(source), "-o", str(out), "--report", str(folder / "several.json"), "--quiet"], standalone_mode=False)
    words = AutoTokenizer.from_pretrained(out)(["the lazy fox"], return_tensors="pt", return_token_type_ids=False)
    loaded = ORTModelForSeq2SeqLM.from_pretrained(out)
    tokens = loaded.generate(**words, min_new_tokens=5, max_new_tokens=5)
    return {"source": str(source), "out": str(out), "report": str(folder / "several.json"), "tokens": tokens.shape[1]}


def main(what: str, folder: Path) -> None:
    torch.manual_seed(0)
    if what == "sentences":
        export(BertModel(bert()), folder, "feature-extraction")
        return
    texts = folder / "texts.txt"
    rng = np.random.default_rng(0)
    texts.write_text("\n".join(" ".join(rng.choice(WORDS, rng.integers(3, 12))) for _ in range(32)))
    print(json.dumps({"classifier": classifier(folder, texts), "translator": translator(folder)}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
