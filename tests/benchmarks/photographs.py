"""Crops of the photographs that scikit-image and scikit-learn ship: images of the world without a download.

The files are read with Pillow. Crops of different parts of the photographs' width share no pixel.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
FILES = {
    "skimage": "astronaut.png chelsea.png coffee.png rocket.jpg motorcycle_left.png hubble_deep_field.jpg retina.jpg ihc.png camera.png "
    "brick.png grass.png gravel.png coins.png page.png",
    "sklearn": "china.jpg flower.jpg",
}
COUNT = sum(len(names.split()) for names in FILES.values())
PARTS = ((0, 0.5), (0.5, 0.75), (0.75, 1))
"""Of the photographs' width, for training, calibration and hold-out (their seeds are 0, 1 and 2)."""


@functools.cache
def photographs() -> tuple[Any, ...]:
    """All of them, as RGB images of Pillow."""
    from PIL import Image

    images = []
    for package, names in FILES.items():
        found = importlib.util.find_spec(package)
        if found is None or found.origin is None:
            raise SystemExit(f"photographs come from {package}; pip install scikit-image scikit-learn pillow")
        root = Path(found.origin).parent
        folders = (root / "data", root / "datasets" / "images")
        images += [Image.open(next(f / name for f in folders if (f / name).is_file())).convert("RGB") for name in names.split()]
    return tuple(images)


def crops(count: int, shape: tuple[int, int], seed: int, smallest: int = 64) -> tuple[Array, Array]:
    """Random crops of the proportions of ``shape (h, w)``, half of them mirrored, at least ``smallest`` pixels long, resized to it.

    Returns:
        ``(n, 3, h, w)`` of 0 to 255, and the number of the photograph of each.
    """
    rng, (begin, end) = np.random.default_rng(seed), PARTS[seed]
    images, labels = np.empty((count, 3, *shape), np.float32), rng.integers(0, COUNT, count)
    for image, label in zip(images, labels, strict=True):
        picture = photographs()[label]
        left, room = int(begin * picture.width), np.array([picture.height, int((end - begin) * picture.width)])
        most = (room / shape).min()
        height, width = (rng.uniform(min(smallest / max(shape), most), most) * np.array(shape)).astype(int)
        y, x = rng.integers(0, room - (height, width) + 1)
        box = (left + x, y, left + x + width, y + height)
        pixels = np.asarray(picture.resize(shape[::-1], box=box, reducing_gap=2.0), np.float32)
        image[:] = pixels.transpose(2, 0, 1)[..., :: int(rng.choice([-1, 1]))]
    return images, labels
