"""Small convolutional networks of the kinds that run on devices, trained on crops of photographs (`trained`, `photographs`).

``resnet``, ``darknet`` and ``mobile`` tell which photograph a crop of 32 x 32 pixels is from. ``yolo`` finds the digit that was pasted
into one of 64 x 64; its only output has the boxes in pixels and the scores of all cells in one tensor, as those of YOLOv5 to v11 do.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from photographs import COUNT, crops
from torch import nn
from torch.nn import functional as F
from trained import Array, Kind, digits

DIGITS = 10
SIDE = 64  # of the images for `yolo`


# --- Data ---------------------------------------------------------------------------------------------------------------------


def textures(count: int, seed: int) -> tuple[Array, Array]:
    """Crops ``(n, 3, 32, 32)`` of -1 to 1, and the numbers of their photographs."""
    images, labels = crops(count, (32, 32), seed)
    return images / np.float32(127.5) - 1, labels


def scenes(count: int, seed: int) -> tuple[Array, Array]:
    """Crops ``(n, 3, 64, 64)`` of 0 to 1 with a digit in each, and its class, center and size in pixels ``(n, 5)``."""
    rng, (images, _), (masks, classes) = np.random.default_rng(seed), crops(count, (SIDE, SIDE), seed), digits(count, seed)
    boxes = np.empty((count, 4), np.int64)
    for image, mask, box in zip(images, masks[:, 0], boxes, strict=True):
        x, y = rng.integers(0, SIDE - mask.shape[0], 2)
        place = image[:, y : y + mask.shape[0], x : x + mask.shape[1]]
        place += np.clip(mask, 0, 1) * (rng.uniform(0, 255, (3, 1, 1)).astype(np.float32) - place)
        rows, columns = (np.flatnonzero((mask > 0.3).any(axis)) for axis in (1, 0))
        box[:] = x + np.median(columns), y + np.median(rows), np.ptp(columns) + 1, np.ptp(rows) + 1
    return images / np.float32(255), np.column_stack([classes, boxes])


# --- Networks -----------------------------------------------------------------------------------------------------------------


def conv(a: int, b: int, kernel: int, activation: nn.Module | None, stride: int = 1, groups: int = 1) -> nn.Sequential:
    layers = [nn.Conv2d(a, b, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(b)]
    return nn.Sequential(*layers, *([] if activation is None else [activation]))


class Residual(nn.Module):
    def __init__(self, body: nn.Module, shortcut: nn.Module | None = None, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.body, self.shortcut, self.activation = body, shortcut or nn.Identity(), activation or nn.Identity()

    def forward(self, x: Any) -> Any:
        return self.activation(self.body(x) + self.shortcut(x))


def make_resnet() -> nn.Module:
    """A stem and three stages of two blocks of two convolutions, with Relu."""
    blocks: list[nn.Module] = []
    for a, b, stride in ((24, 24, 1), (24, 24, 1), (24, 48, 2), (48, 48, 1), (48, 96, 2), (96, 96, 1)):
        body = nn.Sequential(conv(a, b, 3, nn.ReLU(), stride), conv(b, b, 3, None))
        blocks.append(Residual(body, None if a == b else conv(a, b, 1, None, stride), nn.ReLU()))
    return nn.Sequential(conv(3, 24, 3, nn.ReLU()), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, COUNT))


def make_darknet() -> nn.Module:
    """As Darknet: LeakyRelu, max pooling, residual blocks of a narrow 1 x 1 and a 3 x 3 convolution, a convolution as the last layer."""
    leaky = nn.LeakyReLU(0.1)
    layers: list[nn.Module] = [conv(3, 16, 3, leaky)]
    for a, b in ((16, 32), (32, 64), (64, 128)):
        narrow = nn.Sequential(conv(b, b // 2, 1, leaky), conv(b // 2, b, 3, leaky))
        layers += [nn.MaxPool2d(2), conv(a, b, 3, leaky), Residual(narrow)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Conv2d(128, COUNT, 1), nn.Flatten())


class SqueezeExcite(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        layers = (nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, width // 4, 1), nn.ReLU(), nn.Conv2d(width // 4, width, 1), nn.Hardsigmoid())
        self.gates = nn.Sequential(*layers)

    def forward(self, x: Any) -> Any:
        return x * self.gates(x)


def make_mobile() -> nn.Module:
    """As MobileNetV3: depthwise convolutions in inverted residuals, squeeze-and-excite, HardSwish."""
    layers: list[nn.Module] = [conv(3, 16, 3, nn.Hardswish())]
    for a, b, wide, kernel, stride in ((16, 16, 32, 3, 1), (16, 24, 64, 3, 2), (24, 24, 72, 5, 1), (24, 40, 96, 5, 2), (40, 40, 160, 3, 1)):
        depthwise = conv(wide, wide, kernel, nn.Hardswish(), stride, groups=wide)
        body = nn.Sequential(conv(a, wide, 1, nn.Hardswish()), depthwise, SqueezeExcite(wide), conv(wide, b, 1, None))
        layers.append(Residual(body) if a == b else body)
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(160, 128), nn.Hardswish(), nn.Linear(128, COUNT))
    return nn.Sequential(*layers, conv(40, 160, 1, nn.Hardswish()), *head)


class Yolo(nn.Module):
    """Two scales with strides 8 and 16 and SiLU: the coarse one is enlarged and joined to the fine one, and so are their outputs."""

    def __init__(self) -> None:
        super().__init__()
        silu = nn.SiLU()
        block = Residual(nn.Sequential(conv(32, 32, 3, silu), conv(32, 32, 3, silu)))
        self.fine = nn.Sequential(conv(3, 16, 3, silu, 2), conv(16, 32, 3, silu, 2), block, conv(32, 64, 3, silu, 2))
        self.coarse, self.up, self.join = conv(64, 96, 3, silu, 2), conv(96, 64, 1, silu), conv(128, 64, 3, silu)
        self.heads = nn.ModuleList([nn.Conv2d(width, 4 + DIGITS, 1) for width in (64, 96)])
        for head in self.heads:  # few cells have a digit
            nn.init.constant_(head.bias[4:], -4)
        centers, strides = [], []
        for stride in (8, 16):
            at = (torch.arange(SIDE // stride) + 0.5) * stride
            centers.append(torch.stack(torch.meshgrid(at, at, indexing="xy")).flatten(1))
            strides.append(torch.full((1, centers[-1].shape[1]), float(stride)))
        self.register_buffer("centers", torch.cat(centers, 1))
        self.register_buffer("strides", torch.cat(strides, 1))

    def forward(self, images: Any) -> Any:
        """Centers, sizes and scores ``(n, 4 + 10, 80)``."""
        fine = self.fine(images)
        coarse = self.coarse(fine)
        fine = self.join(torch.cat([F.interpolate(self.up(coarse), scale_factor=2.0), fine], 1))
        raw = torch.cat([head(x).flatten(2) for head, x in zip(self.heads, (fine, coarse), strict=True)], 2).sigmoid()
        places = (raw[:, :2] * 2 - 1) * self.strides + self.centers
        return torch.cat([places, (raw[:, 2:4] * 2) ** 2 * self.strides * 2, raw[:, 4:]], 1)


def detection_loss(outputs: Any, targets: Any) -> Any:
    """Cross-entropy of all scores, and the distance of the boxes of the cells nearest to the digits, one on each scale."""
    boxes, scores = targets[:, None, 1:].float(), outputs[:, 4:].transpose(1, 2)
    cells = [(boxes[..., 1] // stride * (SIDE // stride) + boxes[..., 0] // stride).long() for stride in (8, 16)]
    picks = torch.cat([cells[0], (SIDE // 8) ** 2 + cells[1]], 1)
    wanted = torch.zeros_like(scores)
    wanted[torch.arange(len(targets))[:, None], picks, targets[:, :1]] = 1
    predicted = outputs[:, :4].transpose(1, 2).gather(1, picks[..., None].expand(-1, -1, 4))
    return 200 * F.binary_cross_entropy(scores.clamp(1e-6, 1 - 1e-6), wanted) + (predicted - boxes).abs().mean() / 16


def detected(outputs: Any, targets: Any) -> Any:
    """Whether the best score of an image is that of its digit."""
    return outputs[:, 4:].amax(2).argmax(1) == targets[:, 0]


CONVNETS = {
    "resnet": Kind(make_resnet, textures, ("images",), 2),
    "darknet": Kind(make_darknet, textures, ("images",), 4),
    "mobile": Kind(make_mobile, textures, ("images",), 2),
    "yolo": Kind(Yolo, scenes, ("images",), 8, detection_loss, detected),
}
