"""Small graphs with one trap each: what real exports do that a quantizer may get wrong.

Every `Trap` says what must become of its linear layers, and computes its outputs in plain NumPy from their weights, so that a
quantized model can be compared with the codes in its file and not only with itself. A new trap is a function in one of the modules
here and its line in that module's ``TRAPS``.
"""

from __future__ import annotations

from magr_onnx.models.zoo import branches, convolutions, disguised, elsewhere, embeddings, experts, hostile, nested, plain
from magr_onnx.models.zoo.trap import Trap

MODULES = (branches, convolutions, disguised, elsewhere, embeddings, experts, hostile, nested, plain)
ZOO: dict[str, Trap] = {trap.name: trap for module in MODULES for trap in module.TRAPS}

__all__ = ["ZOO", "Trap"]
