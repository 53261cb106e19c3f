"""Train and export a Llama-like language model, several times as large as the one in ``DATA/lm``, for benchmarks.

    python tests/benchmarks/llama.py --data DATA --work WORK [--minutes 90] [--width 384] [--layers 8]

RMSNorm, rotary positions, grouped queries, SwiGLU, a head of its own; 14.9 M parameters at the default. Trained with torch on the books
that the model in ``DATA/lm`` was trained on, with its tokenizer; matrices inside blocks by Muon, the rest by AdamW, in bfloat16. The rate
falls to zero over the given minutes, so the model depends on the machine's speed. ``WORK/llama/model.onnx`` is what accuracy.py and
rotations.py call ``llama``; calibration and held-out blocks are those of ``DATA/lm``.

Source of Muon: Jordan, https://kellerjordan.github.io/posts/muon.
"""

from __future__ import annotations

import argparse
import gzip
import time
from pathlib import Path

import numpy as np
import torch
from common import progress
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional

LENGTH, BATCH, HEAD, VOCABULARY = 256, 8, 64, 2048
HELD_OUT = ("jane-austen_emma", "robert-louis-stevenson_treasure-island", "h-g-wells_the-war-of-the-worlds", "wilkie-collins_the-moonstone")


class Block(nn.Module):
    """Attention and a feed-forward part, each behind a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = width * 11 // 4 // 8 * 8
        self.norms = nn.ModuleList(nn.RMSNorm(width, eps=1e-5) for _ in range(2))
        self.q, self.o = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(width, width // 2, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        y = self.norms[0](x)
        q, k, v = (layer(y).unflatten(-1, (-1, HEAD)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        q, k = (_rotate(z, cos, sin) for z in (q, k))
        k, v = (z.repeat_interleave(2, dim=1) for z in (k, v))
        x = x + self.o(functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        y = self.norms[1](x)
        down: Tensor = self.down(functional.silu(self.gate(y)) * self.up(y))
        return x + down


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Llama(nn.Module):
    """Token ids ``(batch, length <= LENGTH)`` to logits ``(batch, length, VOCABULARY)``."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(width, eps=1e-5), nn.Linear(width, VOCABULARY, bias=False)
        angles = torch.outer(torch.arange(LENGTH), 10_000.0 ** (-torch.arange(0, HEAD, 2) / HEAD))
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, input_ids: Tensor) -> Tensor:
        x, length = self.table(input_ids), input_ids.shape[1]
        for block in self.blocks:
            x = block(x, self.cos[:length], self.sin[:length])
        logits: Tensor = self.head(self.norm(x))
        return logits


def orthogonal(x: Tensor) -> Tensor:
    """The nearest matrix with singular values near one, by five Newton-Schulz steps of fifth order."""
    wide = len(x) > x.shape[1]
    y = (x.T if wide else x).bfloat16()
    y = y / (y.norm() + 1e-7)
    for _ in range(5):
        gram = y @ y.T
        y = 3.4445 * y + (-4.7750 * gram + 2.0315 * gram @ gram) @ y
    return (y.T if wide else y).float()


def tokens(data: Path, work: Path) -> np.ndarray:
    """Ids of all training books, one after the other."""
    kept = work / "llama" / "tokens.npy"
    if not kept.is_file():
        tokenizer = Tokenizer.from_file(str(data / "lm" / "tokenizer.json"))
        books = [path for path in sorted((data / "books").glob("*.txt.gz")) if path.name.split(".")[0] not in HELD_OUT]
        texts = [gzip.decompress(path.read_bytes()).decode() for path in books]
        np.save(kept, np.concatenate([np.array(tokenizer.encode(text).ids, np.int16) for text in texts]))
    found: np.ndarray = np.load(kept)
    return found


def train(model: Llama, ids: np.ndarray, minutes: float) -> None:
    """Follow random blocks of the text until the minutes are over."""
    rng, begin = np.random.default_rng(0), time.monotonic()
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    momenta = [torch.zeros_like(p) for p in matrices]
    among = {id(p) for p in matrices}
    adam = torch.optim.AdamW([p for p in model.parameters() if id(p) not in among], lr=0.0, betas=(0.9, 0.95))
    step, smooth = 0, 8.0
    while (share := (time.monotonic() - begin) / (60 * minutes)) < 1:
        at = rng.integers(0, len(ids) - LENGTH - 1, BATCH)
        block = torch.from_numpy(np.stack([ids[i : i + LENGTH + 1] for i in at]).astype(np.int64))
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(block[:, :-1])
        loss = functional.cross_entropy(logits.float().flatten(0, 1), block[:, 1:].flatten())
        loss.backward()
        rate = min((step + 1) / 50, 1.0) * min(1.0, 1.6 * (1 - share))
        adam.param_groups[0]["lr"] = 3e-3 * rate
        adam.step()
        with torch.no_grad():
            for parameter, momentum in zip(matrices, momenta, strict=True):
                gradient = parameter.grad
                assert gradient is not None
                momentum.lerp_(gradient, 0.05)
                change = orthogonal(gradient.lerp(momentum, 0.95)) * max(1, len(parameter) / parameter.shape[1]) ** 0.5
                parameter.mul_(1 - 0.02 * rate * 0.1).sub_(0.02 * rate * change)
        model.zero_grad()
        smooth += 0.05 * (loss.item() - smooth)
        if step % 50 == 0:
            progress(f"step {step}, loss {smooth:.3f}, {100 * share:.0f}%")
        step += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of books and lm")
    parser.add_argument("--work", type=Path, required=True, help="folder to write llama/model.onnx to")
    parser.add_argument("--minutes", type=float, default=90)
    parser.add_argument("--width", type=int, default=384, help=f"a multiple of {2 * HEAD}")
    parser.add_argument("--layers", type=int, default=8)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = Llama(args.width, args.layers)
    folder = args.work / "llama"
    folder.mkdir(parents=True, exist_ok=True)
    train(model, tokens(args.data, args.work), args.minutes)
    torch.save(model.state_dict(), folder / "model.pt")
    dynamic = {"input_ids": {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", min=2, max=LENGTH)}}
    example = torch.zeros(2, 16, dtype=torch.int64)
    names = {"input_names": ["input_ids"], "output_names": ["logits"]}
    program = torch.onnx.export(model.eval(), (example,), dynamo=True, dynamic_shapes=dynamic, **names)
    assert program is not None
    program.save(folder / "model.onnx")
    print(f"{folder / 'model.onnx'}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")


if __name__ == "__main__":
    main()
