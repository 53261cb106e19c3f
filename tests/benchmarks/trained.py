"""Small models with heads, trained on data that comes with scikit-learn or is made here: what people have few calibration samples for.

Each has layers that see one row a sample (classifier, pooler, recommender, tabular columns), and unlike the bundled language model they
are made on first use, with torch and scikit-learn. A made model is kept in a folder with its inputs:

- ``model.onnx``
- ``calibration.npz``: 1,024 samples the model was not trained on
- ``heldout.npz``: at least 2,000 others
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from common import Feeds, progress

CALIBRATION, HELD_OUT, TRAINING = 1024, 4096, 12_000

Array = npt.NDArray[Any]


def digits(count: int, seed: int) -> tuple[Array, Array]:
    """Digits of 28 x 28 pixels from scikit-learn's 8 x 8 ones: enlarged, turned, sheared and moved at random; ``(n, 1, 28, 28)``."""
    from scipy.ndimage import affine_transform
    from sklearn.datasets import load_digits

    rng, source = np.random.default_rng(seed), load_digits()
    # every split takes other originals
    indices = rng.choice(np.flatnonzero(np.arange(len(source.images)) % 3 == seed % 3), count)
    images = np.zeros((count, 1, 28, 28), np.float32)
    for image, index in zip(images[:, 0], indices, strict=True):
        turn, shear, size = rng.uniform(-0.25, 0.25), rng.uniform(-0.2, 0.2), rng.uniform(0.3, 0.42)
        matrix = size * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]) @ np.array([[1, shear], [0, 1]])
        shift = np.full(2, 3.5) - matrix @ (np.full(2, 13.5) + rng.uniform(-2, 2, 2))
        image[:] = affine_transform(source.images[index] / 16, matrix, shift, (28, 28), order=1)
    return images, source.target[indices]


def tabular(count: int, seed: int) -> tuple[Array, Array]:
    """Twenty-four unscaled columns: amounts, years, rates, flags and counts, and four classes of them; ``(n, 24)``."""
    rng, fixed = np.random.default_rng(seed), np.random.default_rng(99)
    base = rng.standard_normal((count, 24))
    base[:, 8:16] += base[:, :8] * fixed.uniform(-1, 1, 8)
    score = np.tanh(base @ fixed.standard_normal((24, 12))) @ fixed.standard_normal((12, 4))
    x = base.copy()
    x[:, 0:4] = np.exp(8 + base[:, 0:4])  # amounts
    x[:, 4:8] = 2000 + np.rint(8 * base[:, 4:8])  # years
    x[:, 8:12] = 0.01 * np.exp(0.5 * base[:, 8:12])  # rates
    x[:, 12:16] = base[:, 12:16] > 0.5  # flags
    x[:, 16:20] = rng.poisson(np.exp(np.clip(base[:, 16:20] + 1, -3, 4)))  # counts
    return x.astype(np.float32), score.argmax(axis=1)


def ratings(count: int, seed: int) -> tuple[tuple[Array, Array], Array]:
    """Users, items and whether they match; two tables of 600 and 400 rows."""
    rng, fixed = np.random.default_rng(seed), np.random.default_rng(98)
    users, items = rng.zipf(1.3, count) % 600, rng.zipf(1.2, count) % 400
    affinity = (fixed.standard_normal((600, 6))[users] * fixed.standard_normal((400, 6))[items]).sum(axis=1)
    return (users.astype(np.int64), items.astype(np.int64)), (affinity + rng.standard_normal(count) > 0).astype(np.int64)


def waves(count: int, seed: int) -> tuple[Array, Array]:
    """Noisy tones, chirps, pulses and noise in 40 steps of 16 channels, and which it was; ``(n, 40, 16)``."""
    rng, mixing = np.random.default_rng(seed), np.random.default_rng(97).standard_normal((4, 16))
    kinds, t = rng.integers(0, 5, count), np.arange(40)
    phase, speed = rng.uniform(0, 6.28, (count, 1, 4)), rng.uniform(0.1, 1.0, (count, 1, 4))
    angle = speed * t[None, :, None] * np.where(kinds == 1, 0.5, 1)[:, None, None] + phase
    angle = np.where((kinds == 1)[:, None, None], angle * (1 + t[None, :, None] / 40), angle)
    signal = np.where((kinds == 2)[:, None, None], np.sign(np.sin(angle)), np.sin(angle))
    signal = np.where((kinds == 3)[:, None, None], np.abs(signal) ** 8, signal) * (kinds != 4)[:, None, None]
    return (signal @ mixing + 0.5 * rng.standard_normal((count, 40, 16))).astype(np.float32), kinds


def sentences(count: int, seed: int) -> tuple[Array, Array]:
    """Sentences of 8 to 32 of 300 words, the rest zeros, and which of six languages they are in: each has its own likely successors."""
    rng, fixed = np.random.default_rng(seed), np.random.default_rng(96)
    successors, languages = fixed.integers(1, 300, (6, 300, 4)), rng.integers(0, 6, count)
    ids = np.zeros((count, 32), np.int64)
    ids[:, 0] = rng.integers(1, 300, count)
    for at in range(1, 32):
        likely = successors[languages, ids[:, at - 1], rng.integers(0, 4, count)]
        ids[:, at] = np.where(rng.random(count) < 0.5, likely, rng.zipf(1.3, count) % 299 + 1)
    ids[np.arange(32) >= rng.integers(8, 33, count)[:, None]] = 0
    return ids, languages


def make_vit() -> Any:
    """A vision transformer: patches of 7 x 7, six blocks of width 64, a head of two layers behind the first token."""
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(64), nn.LayerNorm(64)
            self.qkv, self.out, self.up, self.down = nn.Linear(64, 192), nn.Linear(64, 64), nn.Linear(64, 128), nn.Linear(128, 64)

        def forward(self, x: Any) -> Any:
            q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4).unbind(0)
            attended = ((q @ k.transpose(-1, -2)) / 4).softmax(-1) @ v
            x = x + self.out(attended.transpose(1, 2).flatten(2))
            return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))

    class Transformer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch, self.blocks, self.norm = nn.Linear(49, 64), nn.ModuleList([Block() for _ in range(6)]), nn.LayerNorm(64)
            self.first, self.places = nn.Parameter(torch.zeros(1, 1, 64)), nn.Parameter(0.02 * torch.randn(1, 17, 64))
            self.head1, self.head2 = nn.Linear(64, 128), nn.Linear(128, 10)

        def forward(self, images: Any) -> Any:
            patches = images.unflatten(2, (4, 7)).unflatten(4, (4, 7)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
            x = self.patch(patches)
            x = torch.cat([self.first.expand(x.shape[0], -1, -1), x], 1) + self.places
            for block in self.blocks:
                x = block(x)
            return self.head2(self.head1(self.norm(x)[:, 0]).relu())

    return Transformer()


def make_bert() -> Any:
    """A text encoder: four blocks of width 96, normalized behind them, with a mask of the padding, a pooler and a classifier."""
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(96), nn.LayerNorm(96)
            self.q, self.k, self.v, self.out = (nn.Linear(96, 96) for _ in range(4))
            self.up, self.down = nn.Linear(96, 384), nn.Linear(384, 96)

        def forward(self, x: Any, mask: Any) -> Any:
            q, k, v = (layer(x).unflatten(-1, (4, 24)).transpose(1, 2) for layer in (self.q, self.k, self.v))
            attended = ((q @ k.transpose(-1, -2)) / 24**0.5 + mask).softmax(-1) @ v
            x = self.norm1(x + self.out(attended.transpose(1, 2).flatten(2)))
            return self.norm2(x + self.down(nn.functional.gelu(self.up(x))))

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.places, self.norm = nn.Embedding(300, 96), nn.Parameter(0.02 * torch.randn(1, 32, 96)), nn.LayerNorm(96)
            self.blocks = nn.ModuleList([Block() for _ in range(4)])
            self.pooler, self.head = nn.Linear(96, 96), nn.Linear(96, 6)

        def forward(self, ids: Any) -> Any:
            mask = -1e4 * (ids == 0).float()[:, None, None]
            x = self.norm(self.words(ids) + self.places)
            for block in self.blocks:
                x = block(x, mask)
            return self.head(self.pooler(x[:, 0]).tanh())

    return Encoder()


def make_cnn() -> Any:
    """A CNN with plain and depthwise convolutions, pooled to one row a sample, and a head of two layers."""
    from torch import nn

    def stage(a: int, b: int, stride: int) -> list[Any]:
        depthwise = [nn.Conv2d(a, a, 3, stride, 1, groups=a), nn.BatchNorm2d(a), nn.ReLU()]
        return [*depthwise, nn.Conv2d(a, b, 1), nn.BatchNorm2d(b), nn.ReLU()]

    stem = [nn.Conv2d(1, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 10)]
    return nn.Sequential(*stem, *stage(16, 32, 2), *stage(32, 64, 2), *stage(64, 64, 1), *head)


def make_mlp() -> Any:
    """A classifier of unscaled columns, normalized by a BatchNorm at its front that an export folds into the first layer."""
    from torch import nn

    norm = nn.BatchNorm1d(24)
    layers = [nn.Linear(24, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 4)]
    return nn.Sequential(norm, *layers)


def make_recommender() -> Any:
    """Two tables and three dense layers: one row a sample in all of them."""
    import torch
    from torch import nn

    class Recommender(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.users, self.items = nn.Embedding(600, 32), nn.Embedding(400, 32)
            self.dense = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 2))

        def forward(self, users: Any, items: Any) -> Any:
            return self.dense(torch.cat([self.users(users), self.items(items)], -1))

    return Recommender()


def make_lstm() -> Any:
    """An LSTM of width 64 and a dense head on its last state."""
    from torch import nn

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.lstm = nn.Linear(16, 48), nn.LSTM(48, 64, batch_first=True)
            self.head = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5))

        def forward(self, frames: Any) -> Any:
            return self.head(self.lstm(self.norm(frames).relu())[0][:, -1])

    return Recurrent()


def cross_entropy(scores: Any, targets: Any) -> Any:
    import torch

    return torch.nn.functional.cross_entropy(scores, targets)


@dataclass(frozen=True, slots=True)
class Kind:
    """A model, its data, the names of its inputs and the epochs it is trained, its loss, and which outputs are right."""

    make: Callable[[], Any]
    data: Callable[[int, int], tuple[Any, Array]]
    inputs: tuple[str, ...]
    epochs: int
    loss: Callable[[Any, Any], Any] = cross_entropy
    right: Callable[[Any, Any], Any] = lambda outputs, targets: outputs.argmax(-1) == targets


KINDS = {
    "vit": Kind(make_vit, digits, ("images",), 8),
    "cnn": Kind(make_cnn, digits, ("images",), 5),
    "bert": Kind(make_bert, sentences, ("ids",), 4),
    "tabular": Kind(make_mlp, tabular, ("columns",), 25),
    "recommender": Kind(make_recommender, ratings, ("users", "items"), 20),
    "lstm": Kind(make_lstm, waves, ("frames",), 8),
}


def trained(name: str, work: Path, kinds: Mapping[str, Kind] = KINDS) -> Path:
    """The folder of a model, made on first use (minutes on two cores)."""
    folder = work / name
    if (folder / "heldout.npz").is_file():
        return folder
    progress(f"training {name}")
    import torch

    torch.manual_seed(0)
    kind = kinds[name]
    model, (inputs, targets) = kind.make(), kind.data(TRAINING, 0)
    arrays = inputs if isinstance(inputs, tuple) else (inputs,)
    tensors, classes = [torch.from_numpy(a) for a in arrays], torch.from_numpy(np.asarray(targets, np.int64))
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    steps = kind.epochs * TRAINING // 64
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for _ in range(steps):
        pick = torch.randint(0, TRAINING, (64,))
        loss = kind.loss(model(*(t[pick] for t in tensors)), classes[pick])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    export(model, [t[:2] for t in tensors], kind.inputs, folder / "model.onnx")
    for split, count, seed in (("calibration", CALIBRATION, 1), ("heldout", HELD_OUT, 2)):
        inputs, targets = kind.data(count, seed)
        feeds: Feeds = dict(zip(kind.inputs, inputs if isinstance(inputs, tuple) else (inputs,), strict=True))
        with torch.no_grad():
            outputs = model(*(torch.from_numpy(a) for a in feeds.values()))
        accuracy = kind.right(outputs, torch.from_numpy(np.asarray(targets, np.int64))).double().mean()
        progress(f"{name}: {split} accuracy {accuracy:.4f}")
        np.savez(folder / f"{split}.npz", **feeds)  # type: ignore[arg-type]
    return folder


def export(model: Any, example: Sequence[Any], names: Sequence[str], path: Path) -> None:
    """Write a model in evaluation mode as ONNX, with any batch size."""
    import torch

    path.parent.mkdir(parents=True, exist_ok=True)
    batch = torch.export.Dim("batch")
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            tuple(example),
            path,
            input_names=list(names),
            output_names=["scores"],
            dynamic_shapes=tuple({0: batch} for _ in names),
            external_data=False,
        )
