"""`onnx-magr passes`."""

from __future__ import annotations

from typing import Any

from magr_onnx.cli import console
from magr_onnx.cli.options import Json
from magr_onnx.core.quantizers import quantizers_with
from magr_onnx.passes.registry import stages

EPILOG = "[bold]Example[/bold]\n\nonnx-magr passes --json"


def passes(as_json: Json = False) -> None:
    """List the passes a pipeline may name, with their options and defaults."""
    lines, value = [], []
    for name, kind in stages().items():
        options = kind.options()
        lines.append(f"{name}: {kind.summary}")
        lines += [f"    {option}={_text(default)}{_only_for(option)}" for option, (_, default) in options.items()]
        value.append({"name": name, "summary": kind.summary, "options": {o: d for o, (_, d) in options.items()}})
    lines += ["", "example: 'magr{alpha=1e-3},quantize{method=gptq,bits=4},compensate-bias,emit-matmulnbits'"]
    console.show(value, "\n".join(lines), as_json)


def _only_for(option: str) -> str:
    names = " or ".join(quantizers_with(option))
    return f" (quantizer {names} only)" if names else ""


def _text(value: Any) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
