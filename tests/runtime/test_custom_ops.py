"""Models with operators of others, which a shared library gives to onnxruntime."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest
from typer.testing import CliRunner

import magr_onnx
from magr_onnx.cli.app import app
from magr_onnx.errors import OptionError, RuntimeFailure
from magr_onnx.models.zoo.trap import constant, model
from magr_onnx.runtime.ort.session import Session, custom_ops

W = constant("w", 32, 8)


def get_library_path() -> str:
    """What the function of this name in the package returns; importing that would change this process's environment."""
    spec = find_spec("onnxruntime_extensions")
    assert spec is not None
    assert spec.submodule_search_locations
    found = Path(spec.submodule_search_locations[0]).glob("_extensions_pydll*")
    return str(next(p for p in found if p.suffix in (".so", ".pyd", ".dylib")))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    proto = model(
        """g (float[n, 32] x, string[m] words) => (float[n, 8] y, string[m] loud) {
            [fc] y = MatMul(x, w)
            [shout] loud = ai.onnx.contrib.StringUpper(words)
        }""",
        domains=("ai.onnx.contrib",),
        w=W,
    )
    onnx.save(proto, tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def feeds(seed: int) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).standard_normal((16, 32), np.float32), "words": np.array(["a", "bc"], object)}


@pytest.mark.parametrize("effort", [None, "balanced"])
def test_the_result_loads_runs_and_keeps_the_operator(path: Path, effort: str | None) -> None:
    out, library = path.with_name("q.onnx"), get_library_path()
    data = None if effort is None else [feeds(seed) for seed in range(8)]
    report = magr_onnx.optimize(path, data, output=out, custom_ops=[library], bits=8, effort=effort).report
    assert [row.name for row in report.layers] == ["fc"]
    assert {("ai.onnx.contrib", "StringUpper", "shout")} == {
        (n.domain, n.op_type, n.name) for n in onnx.load(out).graph.node if n.name == "shout"
    }
    given = feeds(99)
    with custom_ops([library]), Session(out) as session:
        y, loud = session.run(given)
    np.testing.assert_allclose(y, given["x"] @ W, atol=0.05)
    assert list(loud) == ["A", "BC"]
    checked = magr_onnx.validate(path, out, [given], custom_ops=[library], latency=False)
    assert checked.arithmetics["default"][0].cosine > 0.999


def test_without_the_library_the_operator_is_named(path: Path) -> None:
    with pytest.raises(RuntimeFailure, match=r"ai\.onnx\.contrib::StringUpper.*custom_ops"):
        magr_onnx.optimize(path, output=path.with_name("q.onnx"))


def test_files_that_are_no_libraries(path: Path) -> None:
    with pytest.raises(OptionError, match="no such file"):
        magr_onnx.optimize(path, custom_ops=[path.with_name("missing.so")])
    with pytest.raises(RuntimeFailure, match="not a library of custom operators"):
        magr_onnx.optimize(path, output=path.with_name("q.onnx"), custom_ops=[path])


def test_on_the_command_line(path: Path) -> None:
    result = CliRunner().invoke(app, ["optimize", str(path), "--custom-ops", get_library_path(), "--quiet"])
    assert result.exit_code == 0, result.output
    assert len(list(path.parent.glob("m*.onnx"))) == 2
