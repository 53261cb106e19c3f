"""Schemas of operators that onnxruntime defines in ONNX's domain, for ONNX's checker and converter, which reject unknown ones."""

from __future__ import annotations

import functools

from onnx import defs

_FLOATS = [f"tensor({kind})" for kind in ("float", "float16", "bfloat16", "double")]


@functools.cache
def register() -> None:
    """Register SimplifiedLayerNormalization, which onnxruntime-genai's builder writes into every Llama-like model.

    It is registered with this process's `onnx`, unless ONNX defines the operator itself.
    """
    if defs.has("SimplifiedLayerNormalization"):
        return
    schema = defs.OpSchema
    one, optional = schema.FormalParameter, schema.FormalParameterOption.Optional
    defs.register_schema(
        schema(
            "SimplifiedLayerNormalization",
            "",
            1,
            "Root mean square normalization, as onnxruntime computes it.",
            inputs=[one("X", "T"), one("scale", "V")],
            outputs=[one("Y", "V"), one("inv_std_var", "U", param_option=optional)],
            type_constraints=[("T", _FLOATS, ""), ("U", _FLOATS, ""), ("V", _FLOATS, "")],
            attributes=[
                schema.Attribute("axis", schema.AttrType.INT, required=False),
                schema.Attribute("epsilon", schema.AttrType.FLOAT, required=False),
                schema.Attribute("stash_type", schema.AttrType.INT, required=False),
            ],
        )
    )
