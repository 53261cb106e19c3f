"""Names that options of the command line may take."""

from __future__ import annotations

from enum import StrEnum


class Bits(StrEnum):
    two = "2"
    three = "3"
    four = "4"
    five = "5"
    six = "6"
    seven = "7"
    eight = "8"


class EffortName(StrEnum):
    fast = "fast"
    balanced = "balanced"
    best = "best"


class QuantizerName(StrEnum):
    auto = "auto"
    rtn = "rtn"
    gptq = "gptq"
    comq = "comq"
    hqq = "hqq"
    a2q = "a2q"
    a2q_plus = "a2q+"


class FormatName(StrEnum):
    matmulnbits = "matmulnbits"
    qdq = "qdq"
    qdq_int8 = "qdq-int8"
    dynamic_int8 = "dynamic-int8"


class ActivationName(StrEnum):
    uint8 = "uint8"
    int8 = "int8"


class RangeName(StrEnum):
    auto = "auto"
    min_max = "min-max"
    percentile = "percentile"
    min_error = "min-error"


class ConvBits(StrEnum):
    none = "none"
    three = "3"
    four = "4"
    five = "5"
    six = "6"
    seven = "7"
    eight = "8"


class ConvFormName(StrEnum):
    fold = "fold"
    dequantize = "dequantize"


class EmbeddingsName(StrEnum):
    none = "none"
    gather_block_quantized = "gather-block-quantized"
    dequantize = "dequantize"


class EmbeddingBits(StrEnum):
    four = "4"
    eight = "8"


class BiasName(StrEnum):
    auto = "auto"
    existing = "existing"
    any = "any"
    none = "none"
