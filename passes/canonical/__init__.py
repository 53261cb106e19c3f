"""Layers in disguise: float-to-float rewrites to MatMul and Gemm with a constant matrix on the right, which is what layers are found as.

Every form is a file here with a `Form`, and its line in `FORMS`; each may leave the rest to those after it. They are exact in real
arithmetic and keep the name, type and shape of the value a node makes; the layer gets the node's name (``name[0]``, ``name[1]`` ... where
it becomes several). Weights are not computed: what is done to them is written as nodes, which `magr_onnx.passes.graph.constants` sees
through and which go with the weight when a layer is converted. What is not converted in the end is as right as before, written otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from magr_onnx.passes.canonical import batched, casts, constant_lhs, einsum, fused, gemm_bias, matvec, requantize, trans_a
from magr_onnx.passes.canonical.rewriter import Canvas, Edit, Form, Refusal, weight
from magr_onnx.passes.layers.linear import REFUSED, left_out

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


def canonicalize(model: ir.Model, include: Sequence[str] = (), exclude: Sequence[str] = (), *, again: bool = False) -> list[str]:
    """Bring the layers of the main graph and of the bodies in it into the form they are found in; sentences for the report on what changed.

    Args:
        model: Changed in place.
        include: Shell patterns on node or weight names; others are left as they are.
        exclude: Patterns of nodes to leave as they are.
        again: Take weights that are quantized already for the floats they stand for.
    """
    canvas, notes = Canvas(model), []
    names = [pattern.partition("[")[0] for pattern in include]  # a part of a stack, by the name it will have
    for form in (requantize.FORM, *FORMS) if again else FORMS:
        done = []
        for node in list(model.graph.all_nodes()):
            if f"{node.domain}.{node.op_type}".removeprefix(".") not in form.operators:
                continue
            edit = Edit(canvas, node)
            constant = next((found.name for v in node.inputs[:2] if (found := weight(v)) is not None), "")
            why, other = (left_out(node, edit.name, constant, patterns, exclude) for patterns in (include, names))
            if why is not None and other is not None:
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
