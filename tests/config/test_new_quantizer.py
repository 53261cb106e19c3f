"""A new quantizer with an option of its own is a file and a line of the registry; users have both everywhere."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.new_quantizer", str(tmp_path_factory.mktemp("new"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


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
    assert results["other quantizer"] == "shrink is for quantizer shrunk only"


def test_it_is_documented(results: dict[str, Any]) -> None:
    assert "--shrink" in results["help"]
    assert "shrunk" in results["help"]
    assert "shrink=1.0" in results["passes"]
    assert "| `shrink` |" in results["page"]
    assert "Factor of the min-max grid." in results["page"]
    assert "| `shrink`<br>" in results["passes page"]
