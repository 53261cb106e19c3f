"""The small language model that ships with the package; see models/README.md for how it was trained."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "tiny_lm"
MODEL = FOLDER / "model.onnx"
CALIBRATION = FOLDER / "calibration.npz"
HELD_OUT = FOLDER / "heldout.npz"
