"""Layers in disguise: float-to-float rewrites to MatMul and Gemm with a constant matrix on the right, which is what layers are found as.

Every form is a file here with a `Form`, and its line in `FORMS`; each may leave the rest to those after it. They are exact in real
arithmetic and keep the name, type and shape of the value a node makes; the layer gets the node's name (``name[0]``, ``name[1]`` ... where
it becomes several). Weights are not computed: what is done to them is written as nodes, which `magr_onnx.passes.graph.constants` sees
through and which go with the weight when a layer is converted. What is not converted in the end is as right as before, written otherwise.
"""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir

from magr_onnx.passes.canonical import batched, casts, constant_lhs, einsum, fused, gemm_bias, matvec, requantize, trans_a
from magr_onnx.passes.canonical.rewriter import Canvas, Edit, Form, Refusal, weight
from magr_onnx.passes.layers.linear import REFUSED
from magr_onnx.passes.layers.selection import ALL, Selection

FORMS: tuple[Form, ...] = (
    fused.FORM,
    einsum.FORM,
    gemm_bias.FORM,
    trans_a.FORM,
    constant_lhs.FORM,
    matvec.FORM,
    batched.FORM,
    casts.FORM,
)


def canonicalize(model: ir.Model, selection: Selection = ALL, *, requantized: bool = False) -> list[str]:
    """Bring the layers of the main graph and of the bodies in it into the form they are found in; sentences for the report on what changed.

    Args:
        model: Changed in place.
        selection: The layers to convert; others are left as they are.
        requantized: Take weights that are quantized already for the floats they stand for.
    """
    canvas, notes = Canvas(model), []
    stacks = replace(selection, include=[pattern.partition("[")[0] for pattern in selection.include])  # a part, by the name it will have
    for form in (requantize.FORM, *FORMS) if requantized else FORMS:
        done = []
        for node in list(model.graph.all_nodes()):
            if f"{node.domain}.{node.op_type}".removeprefix(".") not in form.operators:
                continue
            edit = Edit(canvas, node)
            constant = next((found.name for v in node.inputs[:2] if (found := weight(v)) is not None), "")
            why = selection.leaves_out(node, edit.name, constant)
            if why is not None and stacks.leaves_out(node, edit.name, constant) is not None:
                if constant:
                    node.meta[REFUSED] = Refusal(why)
                continue
            outcome = form.rewrite(edit)
            if isinstance(outcome, Refusal):
                node.meta[REFUSED] = outcome
            elif outcome:
                done.append(edit.name)
        if done:
            some = ", ".join(done[:3]) + (f" and {len(done) - 3} more" if len(done) > 3 else "")
            notes.append(f"{form.summary}: {some}")
    if notes:
        model.graph.sort()
    return notes


__all__ = ["FORMS", "Form", "canonicalize"]
