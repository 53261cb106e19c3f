"""What options of the command line may be where the values can be listed: the choices of `magr_onnx.config.schema`, as types that typer
reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from magr_onnx.config.schema import KEYS, WORDS

if TYPE_CHECKING:  # type checkers know no types that are made when a program runs
    Activation = str
    Bias = str
    Bits = int
    ConvBits = int | str
    ConvForm = str
    Effort = str
    EmbeddingBits = int
    Embeddings = str
    Format = str
    Quantizer = str
    Range = str
else:

    def _literal(name: str) -> Any:
        return Literal[(*KEYS[name].choices, *([WORDS[name]] if name in WORDS else []))]

    Activation = _literal("activation_type")
    Bias = _literal("bias")
    Bits = _literal("bits")
    ConvBits = _literal("conv_bits")
    ConvForm = _literal("conv_form")
    Effort = _literal("effort")
    EmbeddingBits = _literal("embedding_bits")
    Embeddings = _literal("embeddings")
    Format = _literal("format")
    Quantizer = _literal("quantizer")
    Range = _literal("activation_range")
