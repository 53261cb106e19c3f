"""Shape inference for each of ONNX's operators, behind an operator that nobody knows and on an input without a type.

A program, since a crash ends the process; the last line that it prints names the operator.
"""

from __future__ import annotations

import onnx
import onnx_ir as ir
from onnx import defs, helper

from magr_onnx.passes.canonical.rewriter import RewriteContext
from magr_onnx.passes.graph.inference import inferred_types

VALUES = {"INT": 1, "FLOAT": 1.0, "STRING": "a", "INTS": [1], "FLOATS": [1.0], "STRINGS": ["a"]}
"""Of required attributes, by type."""


def model(schema: defs.OpSchema, known: bool) -> onnx.ModelProto:
    attributes = {name: VALUES[a.type.name] for name, a in schema.attributes.items() if a.required and a.type.name in VALUES}
    if schema.name == "LabelEncoder":
        attributes |= {"keys_strings": ["a"], "values_floats": [1.0]}
    inputs = [f"x{i}" for i in range(max(schema.min_input, min(schema.max_input, 3)))]
    nodes = [helper.make_node(schema.name, inputs, ["y"], domain=schema.domain, **attributes)]
    nodes.append(helper.make_node("Neg", ["z"], ["last"]))
    if not known:
        nodes.insert(0, helper.make_node("Unknown", ["z"], inputs, domain="another"))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("z", 1, [3]), *(onnx.ValueInfoProto(name=name) for name in inputs if known)],
        [onnx.ValueInfoProto(name="last")],
    )
    versions = {"": defs.onnx_opset_version(), "another": 1}
    versions[schema.domain] = max(versions.get(schema.domain, 1), schema.since_version)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid(*item) for item in versions.items()])


def main() -> None:
    for schema in defs.get_all_schemas():
        for known in (False, True):
            print(schema.domain, schema.name, flush=True)
            read = ir.from_proto(model(schema, known))
            RewriteContext(read).shape(read.graph.outputs[0])
            inferred_types(read)
    print("all")


if __name__ == "__main__":
    main()
