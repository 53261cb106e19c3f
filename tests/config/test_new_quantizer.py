"""A new quantizer with an option of its own is a file and a line of the registry; users have both everywhere."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from magr_onnx.core.option_spec import OptionSpec
from magr_onnx.core.quantizers import QUANTIZERS, Quantizer, method_options, rtn
from tests.helpers import ROOT, run_program


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_program("new_quantizer", tmp_path_factory.mktemp("new"))


def test_every_way_of_giving_its_option_gives_the_same_model(results: dict[str, Any]) -> None:
    assert results["python"] == results["recipe"] == results["cli"] == results["pipeline"]
    assert results["text"].startswith("quantize{method=shrunk,shrink=0.5},")
    assert len({results[name] for name in ("python", "default", "layer", "plain")}) == 4


def test_another_quantizer_drops_its_option(results: dict[str, Any]) -> None:
    assert results["dropped"] == results["plain"]


def test_an_effort_drops_its_option_with_the_quantizer(results: dict[str, Any]) -> None:
    assert results["dropped by an effort"] == results["dropped by an effort on the command line"] == results["fast"]


def test_a_layer_that_restates_the_quantizer_keeps_its_option(results: dict[str, Any]) -> None:
    assert results["restated"] == results["restated after its option"] == results["python"]


def test_later_tables_of_layers_drop_its_option(results: dict[str, Any]) -> None:
    assert results["stacked"] == results["stacked on a recipe"] == results["plain"]


def test_an_option_that_is_a_number_or_a_word(results: dict[str, Any]) -> None:
    assert results["margin on the command line"] == results["margin"] == results["python"]
    assert results["margin off"] == results["default"]


def test_its_option_is_checked(results: dict[str, Any]) -> None:
    assert results["wrong type"] == "shrink = 'much': expected a number, found a text"
    assert "shrink = -1.0: expected 0 or more" in results["too small"]
    assert results["unknown quantizer"].endswith("; did you mean 'shrunk'?")
    assert results["other quantizer"] == "shrink is for quantizer shrunk only"


def test_it_is_documented(results: dict[str, Any]) -> None:
    assert "--shrink" in results["help"]
    assert "shrunk" in results["help"]
    assert "shrink=1.0" in results["passes"]
    assert "| `shrink` |" in results["page"]
    assert "Factor of the min-max grid." in results["page"]
    assert "| `shrink`<br>" in results["passes page"]


def test_its_documentation_says_which_quantizer_an_option_is_for(results: dict[str, Any]) -> None:
    assert "For quantizer shrunk only." in " ".join(results["help"].replace("│", " ").split())
    assert "Factor of the min-max grid. For quantizer shrunk only." in results["page"]
    assert "Factor of the min-max grid. For quantizer shrunk only." in results["passes page"]
    assert "shrink=1.0 (quantizer shrunk only)" in results["passes"]


@pytest.mark.parametrize("name", ["beta", "model", "method", "layer"])
def test_an_option_with_a_name_that_is_taken_is_refused(name: str) -> None:
    program = f"""
from magr_onnx.core.option_spec import OptionSpec
from magr_onnx.core.quantizers import QUANTIZERS, rtn
from magr_onnx.core.quantizers.interface import Quantizer
QUANTIZERS["mine"] = Quantizer("mine", "", rtn.QUANTIZER.run, options=(OptionSpec(name={name!r}, help="", types=(float,)),))
import magr_onnx.config.options
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False, timeout=240)
    assert f"ValueError: options have names that are taken: {name!r} of quantizer mine; rename them" in done.stderr


def test_two_quantizers_share_an_option_only_if_it_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    strength = OptionSpec(name="strength", help="Strength.", types=(float,), default=1.0)
    for name, option in (("one", strength), ("two", replace(strength))):
        monkeypatch.setitem(QUANTIZERS, name, Quantizer(name, "", rtn.QUANTIZER.run, options=(option,)))
    assert method_options()["strength"].help == "Strength. For quantizer one or two only."
    monkeypatch.setitem(QUANTIZERS, "three", Quantizer("three", "", rtn.QUANTIZER.run, options=(replace(strength, default=2.0),)))
    with pytest.raises(ValueError, match="quantizers one and three declare different options 'strength'; rename one of them"):
        method_options()
