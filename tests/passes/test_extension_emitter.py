"""A new output format is a file and a line of the registry; users have it everywhere."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers import run_program


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_program("new_emitter", tmp_path_factory.mktemp("new"))


def test_every_way_of_asking_for_it_gives_the_same_model(results: dict[str, Any]) -> None:
    assert results["python"] == results["recipe"] == results["pipeline"]
    assert results["python"]["operators"].count("Cast") == 2
    assert results["cli"] == results["python"]["operators"]
    assert results["python"]["pipeline"].endswith("compensate-bias,emit-scaled")
    assert results["python"]["bits"] == [8, 8]


def test_its_usual_options_and_kernels_are_known(results: dict[str, Any]) -> None:
    assert "method=comq,bits=8,block_size=none,symmetric=true" in results["python"]["pipeline"]
    assert set(results["budget"]["bits"]) <= {4, 8}
    assert "emit-scaled scales columns" in results["refused"]
    assert "'scald'" in results["wrong"]
    assert "scaled" in results["wrong"]


def test_the_file_is_run_and_compared(results: dict[str, Any]) -> None:
    assert results["sqnr"] > 30


def test_it_is_documented(results: dict[str, Any]) -> None:
    assert "scaled" in results["help"]
    assert "emit-scaled: write quantized layers as float products" in results["passes"]
    assert "## emit-scaled" in results["pages"]["passes"]
    assert "In Python: `__main__.EmitScaled`." in results["pages"]["passes"]  # where it is; magr_onnx.passes does not export it
    assert "In Python: `magr_onnx.passes.EmitMatMulNBits`." in results["pages"]["passes"]
    assert all("`scaled`" in results["pages"][name] for name in ("command line", "options") if name in results["pages"])
