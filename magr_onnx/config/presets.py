"""Options that go well together, by name.

**A new preset**: a line in `PRESETS`.
"""

from __future__ import annotations

from dataclasses import dataclass

from magr_onnx.config.layer_options import LayerOptions, described
from magr_onnx.config.options import Options
from magr_onnx.errors import OptionError, choose_one

_HEAD = ("*lm_head*", "*output_projection*")


@dataclass(frozen=True, slots=True)
class Preset:
    """Options for a purpose.

    Attributes:
        name: What users call it.
        summary: What it is for, and why these options.
        options: What it sets; whatever is given beside it wins.
        layers: Options of single layers, where a model has them.
    """

    name: str
    summary: str
    options: Options
    layers: tuple[LayerOptions, ...] = ()

    def __str__(self) -> str:
        return "; ".join([described(self.options), *(f"layers {table}" for table in self.layers)])


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            "edge-cpu",
            "Small CPUs, x86 or ARM: 8-bit integers in standard operators with ranges found at run time, so that it needs no "
            "calibration data (but gains from some) and converts to .ort. Codes obey the rule of x86 without VNNI, and so give the "
            "same sums on every processor we tested.",
            {"format": "dynamic-int8", "target": "x86-avx2", "embeddings": "dequantize"},
        ),
        Preset(
            "web",
            "Browsers: 4 bits in MatMulNBits, which onnxruntime-web has for WebAssembly and WebGPU, in blocks of 32, since the "
            "download is what counts. The compute type is float32: WebAssembly has no int8 kernel, and where there is one browsers "
            "would differ.",
            {"format": "matmulnbits", "bits": 4, "block_size": 32, "accuracy_level": 1},
        ),
        Preset(
            "llm-int4",
            "Language models in 4 bits: asymmetric blocks of 32 with int8 activations inside the kernel, which is what makes 4 bits "
            "fast on CPUs; a last layer called lm_head and token tables get 8 bits.",
            {"format": "matmulnbits", "bits": 4, "block_size": 32, "accuracy_level": 4, "embeddings": "gather-block-quantized"},
            (LayerOptions(_HEAD, {"bits": 8}, optional=True),),
        ),
        Preset(
            "llm-int2",
            "Language models in 2 bits: blocks of 32, and a float branch of rank 16 beside every layer, which pays at so few bits; the "
            "CPU kernel of 2 bits is fast with int8 activations only. A last layer called lm_head and token tables get 4 bits.",
            {
                "format": "matmulnbits",
                "bits": 2,
                "block_size": 32,
                "accuracy_level": 4,
                "low_rank": 16,
                "embeddings": "gather-block-quantized",
                "embedding_bits": 4,
            },
            (LayerOptions(_HEAD, {"bits": 4, "low_rank": 0}, optional=True),),
        ),
        Preset(
            "avx2-safe",
            "8-bit integers with ranges from calibration whose sums no x86 processor without VNNI can saturate, proved for every "
            "input: the same answers with and without VNNI.",
            {"format": "qdq-int8", "target": "x86-avx2"},
        ),
    )
}


def find_preset(name: str) -> Preset:
    """Look a preset up by name.

    Raises:
        OptionError: There is none; the message lists them.
    """
    if name not in PRESETS:
        raise OptionError(f"unknown preset {name!r}; {choose_one(name, PRESETS)}")
    return PRESETS[name]
