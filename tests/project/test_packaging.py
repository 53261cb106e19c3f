"""The wheel holds what it must and nothing else; the public names are those documented."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import magr_onnx
from tests.helpers import PATIENCE

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=PATIENCE)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_wheel_has_every_module_and_the_bundled_model(wheel: zipfile.ZipFile) -> None:
    names = {n for n in wheel.namelist() if ".dist-info/" not in n}
    sources = [p for folder in ("magr_onnx", "passes", "runtime", "models") for p in (ROOT / folder).rglob("*.py") if not p.is_symlink()]
    expected = {
        str(p.relative_to(ROOT)) if p.is_relative_to(ROOT / "magr_onnx") else f"magr_onnx/{p.relative_to(ROOT)}"
        for p in sources
        if not any(part in {"__pycache__"} for part in p.parts)
    }
    data = {f"magr_onnx/models/tiny_lm/{n}" for n in ("model.onnx", "calibration.npz", "heldout.npz", "tokenizer.json")}
    pages = {str(p.relative_to(ROOT)) for p in (ROOT / "magr_onnx" / "report" / "html").rglob("*") if p.suffix in {".jinja", ".css", ".js"}}
    assert len(pages) > 2
    assert names == expected | data | pages | {"magr_onnx/py.typed", "magr_onnx/models/README.md"}
    assert not any(n.startswith(("passes/", "runtime/", "models/", "tests/")) for n in names)


def test_wheel_needs_no_torch(wheel: zipfile.ZipFile) -> None:
    metadata = wheel.read(next(n for n in wheel.namelist() if n.endswith("METADATA"))).decode()
    required = [m for m in re.findall(r"^Requires-Dist: (.*)$", metadata, re.M) if "extra ==" not in m]
    assert required
    assert not [r for r in required if r.startswith(("torch", "transformers", "scipy", "matplotlib"))]
    assert f"Version: {magr_onnx.__version__}\n" in metadata


def test_import_is_light() -> None:
    heavy = ("torch", "matplotlib", "scipy", "transformers", "jinja2", "tokenizers", "vl_convert")
    code = f"import sys, magr_onnx.cli.main; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=PATIENCE)
    assert result.stdout.strip() == "[]"


def test_all_is_the_truth() -> None:
    assert all(hasattr(magr_onnx, name) for name in magr_onnx.__all__)
    assert len(set(magr_onnx.__all__)) == len(magr_onnx.__all__)


def test_sizes_of_modules() -> None:
    """Modules stay within a few hundred lines, and the bundled model within its budget."""
    long = [p.name for f in ("magr_onnx", "passes", "runtime") for p in (ROOT / f).rglob("*.py") if len(p.read_text().splitlines()) > 450]
    assert long == []
    assert (ROOT / "models" / "tiny_lm" / "model.onnx").stat().st_size <= 8_000_000


def test_citation_has_the_version() -> None:
    assert f"\nversion: {magr_onnx.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_registries_are_where_the_page_on_the_code_says() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\|.*\| (?:`(.+)/NAME\.py` )?\| `([A-Z_]+)` in (that folder's )?`(.+\.py)`.*\|$", page, re.M)
    assert len(rows) >= 8
    for folder, name, beside, path in rows:
        file = ROOT / folder / path if beside else ROOT / path
        assert re.search(rf"^{name}\b", file.read_text(), re.M), f"{name} is not in {file}"
