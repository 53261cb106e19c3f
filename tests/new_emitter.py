"""An output format as a contributor would add it: the emitter and the object below, and an entry in the registry.

Run as a program it does what users can do with it, and prints the results as JSON.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from magr_onnx.core.layer import LayerProblem, LayerSolution
from magr_onnx.core.types import Array, WeightSpec
from magr_onnx.passes.base import Emitted, Emitter
from magr_onnx.passes.emit import FORMATS, Format
from magr_onnx.passes.emit.format import Reader, only_reader, stored_array
from magr_onnx.passes.emit.linear import replace_layer
from magr_onnx.passes.layers.linear import LinearLayer
from magr_onnx.passes.layers.weight_constants import WeightConstants


@dataclass(frozen=True)
class EmitScaled(Emitter):
    """Replace quantized layers by ``MatMul(x, Cast(codes)) -> Mul(scales)``, with an Add for the bias."""

    name: ClassVar[str] = "emit-scaled"
    summary: ClassVar[str] = "write quantized layers as float products of their codes, scaled afterwards"

    def problems(self, spec: WeightSpec | None) -> list[str]:
        if spec is None:
            return [f"{self.name} needs a quantize pass before it"]
        return [] if spec.group_size is None and spec.symmetric else [f"{self.name} scales columns; use block size 'channel' and symmetric"]

    def emit(self, layer: LinearLayer, problem: LayerProblem, solution: LayerSolution, constants: WeightConstants) -> Emitted | None:
        del problem
        weight = solution.quantized
        if weight is None:
            return None
        codes = constants.add(layer, "_codes", weight.raw().astype(np.int8))
        scales = constants.add(layer, "_scales", weight.scales[0].astype(np.float32))
        floats = ir.node("Cast", [codes], {"to": ir.DataType.FLOAT}, name=f"{layer.name}_float")
        product = ir.node("MatMul", [layer.x, floats.outputs[0]], name=f"{layer.name}_product")
        nodes = [floats, product, ir.node("Mul", [product.outputs[0], scales], name=f"{layer.name}_scaled")]
        if solution.bias is not None:
            bias = layer.constant("_bias", solution.bias.astype(np.float32))
            nodes.append(ir.node("Add", [nodes[-1].outputs[0], bias], name=f"{layer.name}_bias"))
        for node in nodes[:-1]:
            node.outputs[0].name, node.outputs[0].dtype = f"{node.name}_out", ir.DataType.FLOAT
        replace_layer(layer, nodes, solution.factors, constants)
        return Emitted(str(product.name), 8, constants.bytes)


def read(product: ir.Node) -> Array | None:
    cast, scaled = product.inputs[1].producer() if product.inputs[1] is not None else None, only_reader(product, "Mul")
    codes = None if cast is None or cast.op_type != "Cast" else stored_array(cast.inputs[0])
    scales = None if scaled is None else stored_array(scaled.inputs[1])
    return None if codes is None or scales is None else codes.astype(np.float32) * scales


SCALED = Format(
    "scaled",
    "float products of the codes, scaled afterwards",
    EmitScaled,
    {("", "MatMul"): Reader(read, ("Mul",))},
    {4: (None,), 8: (None,)},
    bits=8,
    block_size=None,
    symmetric=True,
    effort="fast",
)


def results(folder: Path) -> dict[str, Any]:
    """What every way of asking for the format gives, and the texts that name it."""
    import magr_onnx
    from docs.extensions.generated import GENERATORS
    from magr_onnx.cli.app import app
    from magr_onnx.passes.emit.readback import read_weights
    from tests import graphs
    from tests.graphs import feeds, proto

    model = graphs.chain()
    source, data, recipe = folder / "model.onnx", folder / "inputs.npz", folder / "recipe.toml"
    ir.save(model, source)
    np.savez(data, **feeds(model))
    recipe.write_text('version = 1\nformat = "scaled"\n')

    def written(**arguments: Any) -> Any:
        out = folder / "out.onnx"
        report = magr_onnx.optimize(source, data, output=out, progress=False, **arguments).report
        result = ir.load(out)
        assert report.verified == len(report.layers) == len(read_weights(result))
        return {
            "pipeline": report.pipeline,
            "operators": [node.op_type for node in result.graph],
            "codes": [
                int(np.abs(v.const_value.numpy().astype(np.int64)).sum()) for n, v in result.graph.initializers.items() if "codes" in n
            ],
            "bits": [row.bits for row in report.layers],
        }

    def command(*arguments: object) -> str:
        text = io.StringIO()
        with contextlib.redirect_stdout(text):
            app([str(a) for a in arguments], standalone_mode=False)
        return text.getvalue()

    validated = magr_onnx.optimize(proto(model), [feeds(model)], validation_data=[feeds(model)], format="scaled", progress=False).report
    assert validated.validation is not None
    command("optimize", source, "-c", data, "-o", folder / "cli.onnx", "--format", "scaled", "--quiet")
    return {
        "python": written(format="scaled"),
        "recipe": written(recipe=recipe),
        "pipeline": written(pipeline_text=written(format="scaled")["pipeline"]),
        "cli": [node.op_type for node in ir.load(folder / "cli.onnx").graph],
        "budget": written(format="scaled", target_size="60%"),
        "refused": _message(lambda: magr_onnx.optimize(source, data, format="scaled", block_size=32)),
        "wrong": _message(lambda: magr_onnx.optimize(source, data, format="scald")),
        "sqnr": min(output.sqnr_db for outputs in validated.validation.arithmetics.values() for output in outputs),
        "help": command("optimize", "--help"),
        "passes": command("passes"),
        "pages": {name: "\n".join(generate()) for name, generate in GENERATORS.items()},
    }


def _message(call: Any) -> str:
    try:
        call()
    except Exception as error:
        return str(error)
    return ""


if __name__ == "__main__":
    FORMATS[SCALED.name] = SCALED  # the registry line
    print(json.dumps(results(Path(sys.argv[1]))))
