"""A quantizer with an option of its own, as a contributor would add it: the object below, and its entry in the registry.

Run as a program it does what users can do with it, and prints the results as JSON.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import sys
from pathlib import Path
from types import NoneType
from typing import Any

from magr_onnx.core.option_spec import OptionSpec
from magr_onnx.core.quantizers import QUANTIZERS, rtn
from magr_onnx.core.quantizers.interface import Options, Problem, Quantizer, Solution


def run(problem: Problem, options: Options) -> Solution:
    shrink, margin = options.method_options["shrink"], options.method_options["margin"]
    beta = shrink if margin is None else shrink * margin
    return Solution(rtn.quantize(problem.weights, problem.gram.diagonal(), problem.spec, beta=beta), figures={"shrink": shrink})


QUANTIZER = Quantizer(
    "shrunk",
    "round to nearest on a smaller grid",
    run,
    options=(
        OptionSpec(name="shrink", help="Factor of the min-max grid.", types=(float,), default=1.0, least=0, metavar="X"),
        OptionSpec(name="margin", help="Another factor.", types=(float, NoneType), none_word="off", least=0, metavar="X"),
    ),
)


def results(folder: Path) -> dict[str, Any]:
    """Digests of what every way of giving the option writes, errors of those that cannot be, and texts that name it."""
    import magr_onnx
    from docs.extensions.generated import GENERATORS
    from magr_onnx.cli.app import app
    from magr_onnx.core.quantizers import QUANTIZERS as registered
    from tests import graphs

    assert "shrunk" in registered
    source = folder / "model.onnx"
    import onnx_ir as ir

    ir.save(graphs.chain(), source)

    def written(**arguments: Any) -> str:
        out = folder / "out.onnx"
        magr_onnx.optimize(source, output=out, progress=False, **arguments)
        return digest(out)

    def digest(out: Path) -> str:
        loaded = ir.load(out)
        values = loaded.graph.initializers.values()
        return hashlib.sha256(b"".join(v.name.encode() + v.const_value.tobytes() for v in values)).hexdigest()

    def command(*arguments: object) -> str:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            app(list(map(str, arguments)), standalone_mode=False)
        return out.getvalue()

    def refusal(**arguments: Any) -> str:
        try:
            written(**arguments)
        except magr_onnx.OptionError as error:
            return str(error)
        return ""

    def optimized(*arguments: object) -> str:
        command("optimize", source, "-o", folder / "cli.onnx", "--quiet", *arguments)
        return digest(folder / "cli.onnx")

    (folder / "r.toml").write_text('version = 1\nquantizer = "shrunk"\nshrink = 0.5\n')
    pipeline = str(magr_onnx.build_pipeline(quantizer="shrunk", shrink=0.5, alpha=0))
    layer = {"match": "up", "quantizer": "shrunk", "shrink": 0.5}
    (folder / "layers.toml").write_text('version = 1\n[[layer]]\nmatch = "*"\nquantizer = "shrunk"\nshrink = 0.5\n')
    return {
        "python": written(quantizer="shrunk", shrink=0.5, alpha=0),
        "default": written(quantizer="shrunk", alpha=0),
        "recipe": written(recipe=folder / "r.toml", alpha=0),
        "cli": optimized("--quantizer", "shrunk", "--shrink", "0.5"),
        "pipeline": written(pipeline_text=pipeline),
        "layer": written(quantizer="shrunk", alpha=0, layers=[layer]),
        "plain": written(quantizer="rtn", alpha=0),
        "dropped": written(recipe=folder / "r.toml", quantizer="rtn", alpha=0),
        "dropped by an effort": written(recipe=folder / "r.toml", effort="fast"),
        "dropped by an effort on the command line": optimized("--recipe", folder / "r.toml", "--effort", "fast"),
        "fast": written(effort="fast"),
        "restated": written(quantizer="shrunk", shrink=0.5, alpha=0, layers=[{"match": "up", "quantizer": "shrunk"}]),
        "restated after its option": written(
            quantizer="shrunk", alpha=0, layers=[{"match": "*", "shrink": 0.5}, {"match": "*", "quantizer": "shrunk"}]
        ),
        "stacked": written(alpha=0, layers=[{**layer, "match": "*"}, {"match": "*", "quantizer": "rtn"}]),
        "stacked on a recipe": optimized("--recipe", folder / "layers.toml", "--alpha", "0", "--layer", "*:quantizer=rtn"),
        "margin": written(quantizer="shrunk", margin=0.5, alpha=0),
        "margin on the command line": optimized("--quantizer", "shrunk", "--alpha", "0", "--margin", "5e-1"),
        "margin off": optimized("--quantizer", "shrunk", "--alpha", "0", "--margin", "off"),
        "text": pipeline,
        "wrong type": refusal(quantizer="shrunk", shrink="much"),
        "too small": refusal(pipeline_text="quantize{method=shrunk,shrink=-1}"),
        "unknown quantizer": refusal(quantizer="shrnk"),
        "other quantizer": refusal(quantizer="rtn", shrink=0.5),
        "help": command("optimize", "--help"),
        "passes": command("passes"),
        "page": "\n".join(GENERATORS["options"]()),
        "passes page": "\n".join(GENERATORS["passes"]()),
    }


if __name__ == "__main__":
    QUANTIZERS[QUANTIZER.name] = QUANTIZER  # the registry line
    print(json.dumps(results(Path(sys.argv[1]))))
