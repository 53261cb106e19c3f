"""Train the small language model that ships with onnx-magr and export it to ONNX.

A development script: it needs the ``dev`` extra (torch, tokenizers) and a folder of plain-text books
(``*.txt.gz``, one book a file; the shipped model used 27 CC0 texts from Standard Ebooks)::

    python models/train_tiny_lm.py --books path/to/books

It writes ``tiny_lm/model.onnx`` (fp32), ``tokenizer.json``, ``calibration.npz`` (training books) and ``heldout.npz``
(books the model never saw). The model is a pre-LayerNorm GPT with biases, so that its export holds every linear-layer
form a quantizer must handle with a bias, and its width (160) is deliberately not a power of two.
"""

from __future__ import annotations

import argparse
import gzip
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.nn import functional as F

HELD_OUT = (
    "jane-austen_emma",
    "robert-louis-stevenson_treasure-island",
    "h-g-wells_the-war-of-the-worlds",
    "wilkie-collins_the-moonstone",
)
CALIBRATION_BLOCKS = 128
HELD_OUT_BLOCKS = 256


@dataclass(frozen=True)
class Config:
    """Shape of the network; the defaults are those of the shipped model (1.9 M parameters, 7.6 MB in fp32)."""

    vocabulary: int = 1024
    context: int = 128
    width: int = 160
    layers: int = 5
    heads: int = 5


class Block(nn.Module):
    """Pre-LayerNorm transformer block: causal attention, then a GELU MLP of four times the width."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        d = config.width
        self.heads = config.heads
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, d = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(batch, length, d))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class TinyLM(nn.Module):
    """Token and position embeddings, blocks, final LayerNorm, untied head. ``(B, T)`` ids to ``(B, T, V)`` logits."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        d = config.width
        self.tokens = nn.Embedding(config.vocabulary, d)
        self.positions = nn.Embedding(config.context, d)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, config.vocabulary, bias=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                std = 0.02 / math.sqrt(2 * config.layers) if name.endswith(("proj.weight", "down.weight")) else 0.02
                nn.init.normal_(p, std=std)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(input_ids) + self.positions(torch.arange(input_ids.shape[1], device=input_ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def read_books(folder: Path) -> tuple[list[str], list[str]]:
    """Texts of the training books and of the held-out books, in name order."""
    paths = sorted(folder.glob("*.txt.gz"))
    if not paths:
        raise SystemExit(f"{folder}: no *.txt.gz files")
    texts = {p.name.removesuffix(".txt.gz"): gzip.decompress(p.read_bytes()).decode() for p in paths}
    train = [t for n, t in texts.items() if not n.startswith(HELD_OUT)]
    held = [t for n, t in texts.items() if n.startswith(HELD_OUT)]
    return train, held


def train_tokenizer(texts: list[str], vocabulary: int) -> Tokenizer:
    """Byte-level BPE, trained on the first 400,000 characters of every training book."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator((t[:400_000] for t in texts), trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """One flat array of ids, books one after the other."""
    paragraphs = [[p + "\n" for p in text.split("\n")] for text in texts]
    ids = [e.ids for book in paragraphs for e in tokenizer.encode_batch(book)]
    return np.concatenate([np.asarray(i, dtype=np.int64) for i in ids if i])


def blocks(ids: np.ndarray, count: int, length: int, rng: np.random.Generator) -> np.ndarray:
    """``count`` non-overlapping windows ``(count, length)`` spread over the text."""
    starts = rng.choice(len(ids) // length - 1, size=count, replace=False) * length
    return np.stack([ids[s : s + length] for s in np.sort(starts)])


def loss_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    logits = model(ids[:, :-1]).float()
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def train(model: TinyLM, ids: np.ndarray, held: np.ndarray, config: Config, steps: int, batch: int, lr: float) -> None:
    """AdamW, warm-up then cosine decay, bf16 autocast."""
    decay = [p for p in model.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if p.dim() != 2]
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=lr, betas=(0.9, 0.95))
    data = torch.from_numpy(ids)
    windows = torch.arange(config.context + 1)
    generator = torch.Generator().manual_seed(1)
    validation = torch.from_numpy(held[:64])
    start, running = time.monotonic(), 0.0
    for step in range(1, steps + 1):
        factor = min(1.0, step / 200) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = lr * factor
        at = torch.randint(len(data) - config.context - 1, (batch, 1), generator=generator)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, data[at + windows])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        running = 0.99 * running + 0.01 * loss.item() if step > 1 else loss.item()
        if step % 500 == 0:
            with torch.no_grad():
                val = loss_of(model, validation).item()
            seconds = time.monotonic() - start
            print(f"step {step:6d}  {seconds:6.0f} s  train {running:.4f}  held-out {val:.4f}", flush=True)


def export(model: nn.Module, path: Path, config: Config) -> None:
    """Export with ``torch.onnx`` (dynamo), both axes of ``input_ids`` dynamic, weights inside the file."""
    ids = torch.zeros(2, config.context, dtype=torch.int64)
    batch, length = torch.export.Dim("batch", min=1), torch.export.Dim("length", min=2, max=config.context)
    program = torch.onnx.export(
        model, (ids,), dynamo=True, opset_version=20, dynamic_shapes=({0: batch, 1: length},),
        input_names=["input_ids"], output_names=["logits"], verbose=False,
    )  # fmt: skip
    for node in program.model.graph:
        node.metadata_props.clear()  # the exporter records stack traces with the paths of the training machine
    program.save(str(path), external_data=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--books", type=Path, required=True, help="folder of *.txt.gz books")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "tiny_lm")
    parser.add_argument("--steps", type=int, default=9000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-3)
    args = parser.parse_args()

    torch.manual_seed(0)
    config, rng = Config(), np.random.default_rng(0)
    args.out.mkdir(parents=True, exist_ok=True)
    train_texts, held_texts = read_books(args.books)
    tokenizer = train_tokenizer(train_texts, config.vocabulary)
    tokenizer.save(str(args.out / "tokenizer.json"))
    train_ids, held_ids = encode(tokenizer, train_texts), encode(tokenizer, held_texts)
    held = blocks(held_ids, HELD_OUT_BLOCKS, config.context, rng)
    np.savez_compressed(args.out / "heldout.npz", input_ids=held)
    calibration = blocks(train_ids, CALIBRATION_BLOCKS, config.context, rng)
    np.savez_compressed(args.out / "calibration.npz", input_ids=calibration)

    model = TinyLM(config)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, {len(train_ids):,} training tokens, {torch.get_num_threads()} threads", flush=True)
    train(model, train_ids, held, config, args.steps, args.batch, args.lr)
    model.eval()
    with torch.no_grad():
        loss = np.mean([loss_of(model, torch.from_numpy(held[i : i + 32])).item() for i in range(0, len(held), 32)])
    characters = sum(len(tokenizer.decode(row[1:])) for row in held.tolist()) / (len(held) * (config.context - 1))
    print(f"held-out: {loss:.4f} nats/token, perplexity {math.exp(loss):.2f}, {loss / characters:.4f} nats/character")
    torch.save(model.state_dict(), args.out.parent / "tiny_lm.pt")
    export(model, args.out / "model.onnx", config)


if __name__ == "__main__":
    main()
