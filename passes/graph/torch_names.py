"""The torch module of a node, from the metadata of the exporter (``torch.onnx.export(..., dynamo=True)``).

1. The scopes of a node are module paths from the outside in, and then the node itself: ``['', 'encoder', 'encoder.linear1', 'linear_2']``
   is of the module ``encoder.linear1``.
2. A module may compute with parameters that no module of its own holds, or call none for them (``nn.MultiheadAttention``, with its
   ``in_proj_weight`` and ``out_proj``). The parameter's name tells such layers apart: ``attention.in_proj``. The exporter writes it
   with ``_`` for ``.``, so a path that goes on for more than one step beyond the module has ``_`` there.
3. A layer that a batch normalization was folded into is written as a call of that. The weight's name has the module it is of.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping

import onnx_ir as ir

_SCOPES, _CALL = "pkg.torch.onnx.name_scopes", "pkg.torch.onnx.fx_node"
_PARAMETER = re.compile(r"%p_(\w+)")
_KIND = re.compile(r"_?(?:weight|bias)(?:_[ih]h_l\d+(?:_reverse)?)?$")  # recurrent modules have one a gate, a layer and a direction
_FOLDED = "batch_norm"


def modules_of(node: ir.Node) -> tuple[str, ...]:
    """Return the module path of a node, then the longer path of its parameter if there is one; empty without metadata."""
    properties: Mapping[str, str] = node.metadata_props
    try:
        scopes = ast.literal_eval(properties.get(_SCOPES, "[]"))
    except (SyntaxError, ValueError):
        return ()
    if not (isinstance(scopes, list) and len(scopes) > 1 and isinstance(scopes[-2], str) and scopes[-2]):
        return ()
    module: str = scopes[-2]
    if _FOLDED in str(scopes[-1]):
        owner = next((owner_of(str(value.name)) for value in node.inputs[1:2] if value is not None), "")
        return (module, owner) if owner not in ("", module) else (module,)
    before = re.sub(r"\W", "_", module) + "_"
    for parameter in _PARAMETER.findall(properties.get(_CALL, "")):
        if parameter.startswith(before) and (parameter_path := _KIND.sub("", parameter.removeprefix(before))):
            return module, f"{module}.{parameter_path}"
    return (module,)


def owner_of(weight: str) -> str:
    """Return the module path in the name of a weight; empty if it has none."""
    return weight.rpartition(".")[0]


def scope_of(node: ir.Node) -> str:
    """Return the longest path of `modules_of`; empty if there is none."""
    return next(reversed(modules_of(node)), "")
