"""The options of `magr_onnx.optimize`, and the pipeline they stand for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypedDict, Unpack

from magr_onnx.errors import OptionError, raise_all
from magr_onnx.passes import CompensateBias, EmitMatMulNBits, EmitQDQ, LayerPass, MagR, Quantize, check

Format = Literal["matmulnbits", "qdq"]
FORMATS: dict[str, Callable[[int], LayerPass]] = {
    "matmulnbits": lambda level: EmitMatMulNBits(level),
    "qdq": lambda level: EmitQDQ(),
}
BIAS = {"auto": None, "any": "any", "existing": "existing", "none": "none"}


class Options(TypedDict, total=False):
    """What `build_pipeline` understands; every one has a good default.

    Attributes:
        bits: 2, 3, 4 (default) or 8.
        block_size: Rows that share a scale (default 32); None for one grid a channel.
        quantizer: ``comq`` (default: GPTQ refined by coordinate descent), ``gptq`` or ``rtn``.
        format: ``matmulnbits`` (default) or ``qdq``.
        symmetric: Fix the zero point in the middle (default False).
        alpha: Strength of MagR, relative to the layer; None (default) for 1e-3 per channel, 1e-4 per block; 0 for none.
        beta: Shrink of the min-max grid; None (default) searches it per group.
        damping: Multiple of the Gram matrix's diagonal added to it; None (default) for one that follows from the number of rows.
        act_order: Round inputs in descending power (default True).
        sweeps: Most coordinate-descent sweeps (default 8).
        bias: ``auto`` (default: existing biases, and the bias input that MatMulNBits has anyway), ``existing``, ``any`` or
            ``none``.
        accuracy_level: MatMulNBits' compute type: 0 (default) unset, 1 float32, 4 int8.
    """

    bits: int
    block_size: int | None
    quantizer: str
    format: Format
    symmetric: bool
    alpha: float | None
    beta: float | None
    damping: float | None
    act_order: bool
    sweeps: int
    bias: str
    accuracy_level: int


def build_pipeline(**options: Unpack[Options]) -> tuple[LayerPass, ...]:
    """The passes for a set of options: MagR, quantize, compensate the bias, emit.

    Raises:
        OptionError: Unknown options or values the target kernel rejects, all of them at once.
    """
    problems = [f"unknown option {o!r}; there are {', '.join(Options.__annotations__)}" for o in options.keys() - Options.__annotations__]
    form, bias = options.get("format", "matmulnbits"), options.get("bias", "auto")
    if form not in FORMATS:
        problems.append(f"format {form!r} is not known; choose one of {', '.join(FORMATS)}")
    if bias not in BIAS:
        problems.append(f"bias={bias!r} is not known; choose one of {', '.join(BIAS)}")
    block: int | None = options.get("block_size", 32)
    alpha, damping = options.get("alpha"), options.get("damping")
    if alpha is None:
        alpha = 1e-3 if block is None else 1e-4
    quantize = Quantize(
        options.get("quantizer", "comq"),
        options.get("bits", 4),
        block,
        options.get("symmetric", False),
        options.get("beta"),
        damping,
        options.get("act_order", True),
        options.get("sweeps", 8),
    )
    policy = BIAS.get(bias) or ("any" if form == "matmulnbits" else "existing")
    passes: list[LayerPass] = [MagR(alpha, True, block, damping)] if alpha != 0 else []
    passes.append(quantize)
    if policy != "none":
        passes.append(CompensateBias(policy))  # type: ignore[arg-type]
    if form in FORMATS:
        passes.append(FORMATS[form](options.get("accuracy_level", 0)))
    try:
        check(passes)
    except OptionError as error:
        problems.append(str(error))
    raise_all(OptionError, problems)
    return tuple(passes)
