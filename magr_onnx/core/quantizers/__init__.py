"""The registry of weight quantizers.

To add one, write its file in this folder with a `Quantizer` object, and add that to `QUANTIZERS`. Its name, summary and
options then appear in pipelines, recipes, per-layer options, ``--help`` and the documentation.
"""

from __future__ import annotations

from dataclasses import replace

from magr_onnx.core.option_spec import OptionSpec
from magr_onnx.core.quantizers import a2q, auto, comq, gptq, hqq, lrq, rtn
from magr_onnx.core.quantizers.interface import Options, Problem, Quantizer, Solution

QUANTIZERS: dict[str, Quantizer] = {
    quantizer.name: quantizer
    for quantizer in (auto.QUANTIZER, rtn.QUANTIZER, gptq.QUANTIZER, comq.QUANTIZER, hqq.QUANTIZER, lrq.QUANTIZER, a2q.A2Q, a2q.A2Q_PLUS)
}


def method_options() -> dict[str, OptionSpec]:
    """Return the options declared by quantizers, by name. Choosing another quantizer drops them.

    Raises:
        ValueError: Two quantizers declare different options under one name.
    """
    declared: dict[str, OptionSpec] = {}
    for quantizer in QUANTIZERS.values():
        for option in quantizer.options:
            if declared.setdefault(option.name, option) != option:
                first = quantizers_with(option.name)[0]
                raise ValueError(f"quantizers {first} and {quantizer.name} declare different options {option.name!r}; rename one of them")
    return {
        name: replace(option, belongs_to="quantizer", help=f"{option.help} For quantizer {' or '.join(quantizers_with(name))} only.")
        for name, option in declared.items()
    }


def quantizers_with(option: str) -> list[str]:
    """Return the names of the quantizers that declare an option."""
    return [quantizer.name for quantizer in QUANTIZERS.values() if any(spec.name == option for spec in quantizer.options)]


__all__ = ["QUANTIZERS", "Options", "Problem", "Quantizer", "Solution", "method_options", "quantizers_with"]
