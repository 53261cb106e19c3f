"""What wins over what in a call, what a call may say, and that a report's call makes the same again."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import magr_onnx
from magr_onnx.config.merge import merge
from magr_onnx.config.recipe import Recipe
from magr_onnx.errors import MagrError, OptionError, OutputError, RecipeError
from magr_onnx.model_io.atomic import write_text
from tests import graphs
from tests.cli.test_cli import run
from tests.graphs import feeds, proto
from tests.helpers import PATIENCE
from tests.model_io.test_writing import small_disk

PIPELINE = "quantize{method=rtn,bits=8},emit-matmulnbits"


def headed() -> ir.Model:
    b = graphs.Builder()
    hidden = b.node("Relu", [b.node("MatMul", [b.input("x", ["batch", 64]), b.constant("w", graphs.random(64, 64))], "up")])
    return b.model(b.node("MatMul", [hidden, b.constant("head", graphs.random(64, 96))], "/lm_head/MatMul"), ["batch", 96])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = headed()
    (tmp_path / "m.onnx").write_bytes(proto(model).SerializeToString())
    np.savez(tmp_path / "c.npz", **feeds(model, rows=100))  # type: ignore[arg-type]
    return tmp_path


def bits(report: magr_onnx.Report) -> dict[str, int | None]:
    return {row.name: row.bits for row in report.layers}


def test_none_that_is_given_wins(folder: Path) -> None:
    recipe: dict[str, Any] = {
        "calibration": str(folder / "c.npz"),
        "output": str(folder / "o.onnx"),
        "mask": "no such input",
        "effort": "fast",
    }
    with pytest.raises(MagrError, match="'no such input' is not an input of the model"):
        magr_onnx.optimize(folder / "m.onnx", recipe=recipe)
    report = magr_onnx.optimize(folder / "m.onnx", recipe=recipe, mask=None, output=None, calibration=None).report
    assert report.output is None
    assert report.calibration == "none (data-free)"
    assert not (folder / "o.onnx").exists()
    assert magr_onnx.optimize(None, recipe={**recipe, "model": str(folder / "m.onnx")}, mask=None).report.output == str(folder / "o.onnx")
    assert bits(magr_onnx.optimize(folder / "m.onnx", recipe={"preset": "llm-int2"}, preset=None).report) == {"up": 4, "/lm_head/MatMul": 4}


@pytest.mark.parametrize(
    ("given", "emitted"),
    [
        ({"preset": "llm-int2", "embeddings": "none"}, "emit-matmulnbits"),
        ({"preset": "llm-int2", "embeddings": "dequantize"}, "emit-matmulnbits{accuracy_level=4},embeddings{form=dequantize}"),
        ({"preset": "llm-int2", "embeddings": "gather-block-quantized"}, "bits=4}"),
        ({"recipe": {"conv_bits": 4, "conv_form": "fold"}, "conv_bits": None}, "emit-matmulnbits"),
        ({"recipe": {"pipeline": PIPELINE}, "preset": "web"}, "block_size=32"),
        ({"recipe": {"preset": "web"}, "pipeline_text": PIPELINE}, "emit-matmulnbits"),
    ],
)
def test_what_belongs_to_an_option_goes_with_it(given: dict[str, Any], emitted: str) -> None:
    report = magr_onnx.optimize(graphs.chain(), **given).report
    assert emitted in report.pipeline
    assert any(note.startswith("preset ") for note in report.notes) == ("pipeline_text" not in given and "preset" in given)


CONTRADICTIONS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"effort": "fast"}, {"quantizer": "gptq"}),
    ({"bits": 3}, {"target_size": "25%"}),
    ({"bits": 3}, {"max_loss": "1%"}),
    ({"target_size": "25%"}, {"max_loss": "1%"}),
    ({"target": "x86-avx2"}, {"accumulator_bits": 16}),
]


@pytest.mark.parametrize(("one", "other"), CONTRADICTIONS, ids=str)
def test_of_two_options_that_contradict_each_other_the_later_stays(one: dict[str, Any], other: dict[str, Any]) -> None:
    beside = {"symmetric": True, "damping": 0.1}
    for first, second in ((one, other), (other, one)):
        assert merge({**first, **beside}, second) == {**beside, **second}
        assert merge(first, {**beside, **second}) == {**beside, **second}
        assert merge(first, beside) == {**first, **beside}


def test_an_accumulator_s_tile_belongs_to_its_bits() -> None:
    assert merge({"accumulator_bits": 16, "accumulator_tile": 64}, {"target": "x86-avx2"}) == {"target": "x86-avx2"}


def test_only_another_value_takes_the_place_of_what_belongs_to_it() -> None:
    assert merge({"embeddings": "dequantize", "embedding_bits": 8}, {"embeddings": "none"}) == {"embeddings": "none"}
    assert merge({"embedding_bits": 4}, {"embeddings": "none"}) == {"embedding_bits": 4, "embeddings": "none"}
    assert merge({"conv_bits": 4, "conv_form": "fold"}, {"conv_bits": 5}) == {"conv_bits": 5, "conv_form": "fold"}
    assert merge({"conv_bits": None}, {"conv_form": "fold"}) == {"conv_form": "fold"}
    assert merge({"preset": "web", "bits": 3}, {"pipeline": "magr"}) == {"pipeline": "magr"}
    lower = {"preset": "avx2-safe", "accumulator_bits": 20}
    assert merge(lower, {"format": "qdq-int8"}) == {**lower, "format": "qdq-int8"}
    assert merge(lower, {"format": "qdq"}) == {"preset": "avx2-safe", "format": "qdq"}
    assert merge({"preset": "llm-int2", "embedding_bits": 8}, {"embeddings": "none"}) == {"preset": "llm-int2", "embeddings": "none"}


@pytest.mark.parametrize(
    ("own", "found"),
    [
        ({"accumulator_bits": 20}, "accumulator_bits=20"),
        ({"target": "x86-vnni"}, "target=x86-vnni"),
        ({"activation_type": "int8"}, "type=int8"),
        ({"activation_range": "percentile"}, "ranges=percentile"),
    ],
)
def test_a_format_that_the_preset_has_changes_nothing(own: dict[str, Any], found: str, folder: Path) -> None:
    recipe = {"preset": "avx2-safe", "calibration": str(folder / "c.npz"), **own}
    without, repeated = (magr_onnx.optimize(headed(), recipe=recipe, **given).report for given in ({}, {"format": "qdq-int8"}))
    assert found in repeated.pipeline
    assert repeated.pipeline == without.pipeline
    assert not any("left out" in note for note in repeated.notes if "of the recipe" in note)


def test_what_is_left_out_is_said(folder: Path) -> None:
    options = {"format": "qdq-int8", "target": "x86-avx2", "conv_bits": 4, "conv_form": "fold"}
    Recipe.from_dict({"model": folder / "m.onnx", **options}).save(folder / "r.toml")
    said = "target=x86-avx2 of the recipe left out: format was given over it"
    report = magr_onnx.optimize(recipe=folder / "r.toml", format="dynamic-int8", conv_bits=None).report
    assert said in report.notes
    assert "conv_form=fold of the recipe left out: conv_bits was given over it" in report.notes
    result = run("optimize", "-r", "r.toml", "--format", "dynamic-int8", "-o", "o.onnx", "--json", "--save-recipe", "s.toml", cwd=folder)
    assert said in json.loads(result.stdout)["notes"]
    assert "target" not in Recipe.load(folder / "s.toml").values
    report = magr_onnx.optimize(headed(), preset="edge-cpu", accumulator_bits=20).report
    assert "target=x86-avx2 of preset edge-cpu left out: accumulator_bits was given over it" in report.notes
    assert not any("left out" in note for note in magr_onnx.optimize(headed(), preset="web", recipe={"bits": 8}, bits=3).report.notes)


def test_a_pipeline_wins_over_all_of_a_recipe(folder: Path) -> None:
    (folder / "r.toml").write_text('version = 1\nmodel = "m.onnx"\nbits = 2\n[[layer]]\nmatch = "up"\nbits = 3\n')
    said = "bits=2, layers up: bits=3 of the recipe left out: a pipeline was given over it"
    asked = ("optimize", "-r", "r.toml", "--pipeline", PIPELINE, "-o", "o.onnx", "--json", "--save-recipe", "s.toml")
    found = json.loads(run(*asked, cwd=folder).stdout)
    assert ({row["bits"] for row in found["layers"]}, said in found["notes"]) == ({8}, True)
    assert Recipe.load(folder / "s.toml").layers == ()
    report = magr_onnx.optimize(recipe=folder / "r.toml", pipeline_text=PIPELINE).report
    assert (set(bits(report).values()), said in report.notes) == ({8}, True)


def test_what_is_given_wins_over_a_presets_table(folder: Path) -> None:
    assert bits(magr_onnx.optimize(headed(), preset="llm-int2").report) == {"up": 2, "/lm_head/MatMul": 4}
    report = magr_onnx.optimize(headed(), preset="llm-int2", bits=8).report
    assert bits(report) == {"up": 8, "/lm_head/MatMul": 8}
    assert [row.low_rank is None for row in report.layers] == [False, True]
    report = magr_onnx.optimize(headed(), recipe={"preset": "llm-int2", "bits": 3}, low_rank=4).report
    assert bits(report) == {"up": 3, "/lm_head/MatMul": 3}
    assert [row.low_rank is None for row in report.layers] == [False, False]
    result = run("optimize", "m.onnx", "--preset", "llm-int4", "--bits", "3", "--json", cwd=folder)
    assert {row["bits"] for row in json.loads(result.stdout)["layers"]} == {3}


def test_a_preset_and_a_pipeline_are_refused() -> None:
    with pytest.raises(RecipeError, match="pipeline replaces preset; give one or the other"):
        magr_onnx.optimize(headed(), recipe={"preset": "llm-int4", "pipeline": PIPELINE})
    with pytest.raises(OptionError, match="preset llm-int4 and a pipeline: a pipeline replaces all options"):
        magr_onnx.optimize(headed(), preset="llm-int4", pipeline_text=PIPELINE)


@pytest.mark.parametrize(
    "given",
    [
        {"preset": "llm-int4"},
        {"recipe": {"preset": "web", "mask": None, "layer": [{"match": "up", "bits": 8}]}, "mask": "auto"},
        {"recipe": Recipe.from_dict({"bits": 3, "block_size": "channel", "include": "up"}), "alpha": None},
        {"bits": 2, "layers": [{"match": ["up"], "bits": 3}]},
    ],
)
def test_the_call_in_a_report_makes_the_same_again(given: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    first = magr_onnx.optimize("m.onnx", "c.npz", effort="fast", output="o.onnx", **given).report
    made = (folder / "o.onnx").read_bytes()
    (folder / "o.onnx").unlink()
    again = eval(first.command, {"magr_onnx": magr_onnx}).report
    assert (folder / "o.onnx").read_bytes() == made
    assert again.command == first.command


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batch_size": 0}, "batch_size = 0: expected 1 or more"),
        ({"recipe": {"batch_size": -1}}, "batch_size = -1: expected 1 or more"),
        ({"decode_steps": -1}, "decode_steps = -1: expected 0 or more"),
        ({"recipe": {"target_size": "30%"}, "max_loss": 0.1}, "max_loss = 0.1: expected a text such as '1%' or '0.01', found a number"),
        ({"preset": 3}, "preset = 3: expected a text"),
        ({"preset": ["web"]}, "expected a text, found a list"),
        ({"recipe": "nul\0x"}, "recipe 'nul\\x00x': cannot be read"),
        ({"recipe": 3}, "recipe = 3: give a file"),
        ({"layers": 3}, "layers = 3: expected a list of tables"),
        ({"bits": True}, "bits = True: expected a whole number"),
        ({"mask": None, "include": [3]}, "include = [3]: expected a text or a list of texts"),
        ({"include": [Path("up")]}, "expected a text or a list of texts, found a list"),
        ({"exclude": Path("up")}, "expected a text or a list of texts, found a"),
        ({"shard_size": math.inf, "output": "o.onnx"}, "shard_size = inf: give a size such as 512MB or 2GB"),
        ({"recipe": {"cache": math.inf}}, "cache = inf: give a size such as 512MB or 2GB"),
        ({"recipe": {"max_memory": math.nan}}, "max_memory = nan: give a size such as 512MB or 2GB"),
        ({"max_memory": f"{'9' * 400}GB"}, "give a size such as 512MB or 2GB"),
        ({"max_memory": 0}, "max_memory = 0: give a size such as 512MB or 2GB"),
        ({"cache": -1}, "cache = -1: give a size such as 512MB or 2GB"),
        ({"gram_budget": "much"}, "gram_budget = 'much': give a size such as 512MB or 2GB"),
        ({"gram_budget": -5}, "gram_budget = -5: give a size such as 512MB or 2GB"),
        ({"gram_budget": None}, "gram_budget = None: give a size such as 512MB or 2GB"),
        ({"pipeline_text": 5}, "pipeline_text = 5: expected a text, a plan, or a list of passes"),
        ({"pipeline_text": [5]}, "pipeline_text = [5]: expected a text, a plan, or a list of passes"),
    ],
)
def test_python_arguments_are_checked_as_recipes_are(given: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as error:
        magr_onnx.optimize(headed(), **given)
    assert message in str(error.value)


def test_values_that_are_good_stay_so() -> None:
    assert bits(magr_onnx.optimize(headed(), bits=np.int64(3), alpha=np.float32(0), include="up", recipe={"mask": None}).report) == {
        "up": 3
    }


def test_words_of_recipes_mean_the_same_in_a_call(folder: Path) -> None:
    data = folder / "c.npz"
    words, values = (
        magr_onnx.optimize(headed(), data, effort="fast", **given).report
        for given in (
            {"block_size": "channel", "conv_bits": "none", "mask": "none"},
            {"block_size": None, "conv_bits": None, "mask": None},
        )
    )
    assert words.pipeline == values.pipeline
    assert {row.block_size for row in words.layers} == {64}
    assert magr_onnx.validate(headed(), headed(), data, mask="none").arithmetics


def test_sizes_may_be_texts(folder: Path) -> None:
    data, texts = folder / "c.npz", ("1GB", "0.001 kB")
    for effort in ("fast", "balanced"):
        reports = [magr_onnx.optimize(headed(), data, effort=effort, gram_budget=size).report for size in (1 << 30, *texts)]
        assert len({tuple(row.error for row in report.layers) for report in reports}) == 1


def test_a_single_text_is_a_list_of_one(folder: Path) -> None:
    assert [row["name"] for row in magr_onnx.inspect(headed(), exclude="up").layers] == ["/lm_head/MatMul"]
    with pytest.raises(OptionError, match="include = 5: expected a text or a list of texts, found a whole number"):
        magr_onnx.inspect(headed(), include=5)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="requantize = 'yes': expected true or false"):
        magr_onnx.inspect(headed(), requantize="yes")  # type: ignore[arg-type]
    with pytest.raises(MagrError, match=r"/none\.so") as error:
        magr_onnx.validate(folder / "m.onnx", folder / "m.onnx", folder / "c.npz", custom_ops="/none.so")
    assert "problems" not in str(error.value)


def test_batches_to_validate_on_hold_something(folder: Path) -> None:
    with pytest.raises(OptionError, match="batch_size = 0: expected 1 or more"):
        magr_onnx.validate(folder / "m.onnx", folder / "m.onnx", folder / "c.npz", batch_size=0)


def test_recipes_with_marks_and_odd_characters(tmp_path: Path) -> None:
    (tmp_path / "bom.toml").write_bytes("\ufeffversion = 1\nbits = 3\n".encode())
    assert Recipe.load(tmp_path / "bom.toml").values == {"bits": 3}
    recipe = Recipe.from_dict({"include": ["a\x7fb\x01\t"], "mask": None})
    recipe.save(tmp_path / "odd.toml")
    assert Recipe.load(tmp_path / "odd.toml") == recipe
    assert 'mask = "none"' in recipe.to_text()


@pytest.mark.skipif(os.name != "posix", reason="links")
def test_a_recipe_saved_through_a_link_finds_its_files(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "er", target_is_directory=True)
    (tmp_path / "alias.onnx").symlink_to(folder / "m.onnx")
    Recipe.from_dict({"model": folder / "alias.onnx"}).save(tmp_path / "link" / "r.toml")
    for place in ("link", "deep/er"):
        found = Recipe.load(tmp_path / place / "r.toml").values["model"]
        assert os.path.samefile(found, folder / "m.onnx")
        assert found.name == "alias.onnx"


def test_texts_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="limits of a process are a thing of POSIX")
    file = tmp_path / "r.toml"
    write_text("first", file, "recipe")
    with pytest.raises(OutputError, match=r"recipe .*r.toml: cannot be written: .* bytes that are no text"):
        write_text("second \udcff", file, "recipe")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))  # as a disk that is full after 64 kB
        with pytest.raises(OutputError, match=r"cannot be written: File too large"):
            write_text("x" * (1 << 20), file, "recipe")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_text() == "first"
    write_text("\udcff", file, "report", "backslashreplace")
    assert file.read_text() == "\\udcff"
    assert [path.name for path in tmp_path.iterdir()] == ["r.toml"]


@pytest.mark.skipif(sys.platform != "linux", reason="names of files that are no text")
def test_a_recipe_that_could_not_be_written_is_refused_before_the_work(folder: Path) -> None:
    name = "c\udcff.npz"
    (folder / "c.npz").rename(folder / name)
    (folder / "mine.toml").write_text("kept")
    asked = ("optimize", "m.onnx", "-c", name, "-o", "o.onnx", "-e", "fast")
    result = run(*asked, "--save-recipe", "mine.toml", cwd=folder)
    assert (result.returncode, (folder / "mine.toml").read_text(), (folder / "o.onnx").exists()) == (1, "kept", False)
    assert "has bytes that are not text" in result.stderr
    assert run(*asked, "--report", "r.json", "-q", cwd=folder).returncode == 0
    assert (folder / "r.json").is_file()


def test_a_recipe_is_saved_over_no_file_of_the_run(folder: Path) -> None:
    before = (folder / "c.npz").read_bytes()
    result = run("optimize", "m.onnx", "-c", "c.npz", "--save-recipe", "c.npz", cwd=folder)
    assert result.returncode == 1
    assert "would overwrite" in result.stderr
    assert "give a name that ends in .toml" in result.stderr
    (folder / "held.toml").write_bytes(before)
    assert "would overwrite" in run("optimize", "m.onnx", "--validation", "held.toml", "--save-recipe", "held.toml", cwd=folder).stderr
    assert (folder / "held.toml").read_bytes() == (folder / "c.npz").read_bytes() == before


def test_digits_are_those_of_ascii(folder: Path) -> None:
    result = run("optimize", "m.onnx", "--block-size", "²", cwd=folder)
    assert result.returncode == 2
    assert "expected a multiple of 16 or 'channel'" in result.stderr


def in_process(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "magr_onnx.cli.main", *arguments]
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, check=False, timeout=PATIENCE
    )


def test_names_that_the_terminal_cannot_show_are_escaped(tmp_path: Path) -> None:
    b = graphs.Builder()
    y = b.node("MatMul", [b.input("x", ["n", 64]), b.constant("w", graphs.random(64, 64))], "层")
    (tmp_path / "m.onnx").write_bytes(proto(b.model(y, ["n", 64])).SerializeToString())
    result = in_process("optimize", "m.onnx", "-o", "o.onnx", "--verbose", cwd=tmp_path, PYTHONIOENCODING="cp1252")
    assert result.returncode == 0
    assert "\\u5c42" in result.stdout
    assert "\\u5c42" in result.stderr
    result = in_process("inspect", "m.onnx", "--include", "层层", cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert result.returncode == 2
    assert "\\u5c42\\u5c42" in result.stderr


def test_messages_say_what_became_of_the_output(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ("optimize", "m.onnx", "-o", "o.onnx", "--report")
    with monkeypatch.context() as patch:
        patch.setattr(magr_onnx.Report, "save", lambda *_: 1 / 0)
        result = run(*asked, "r.json", cwd=folder)
        assert result.returncode == 70
        assert "o.onnx was written before that" in result.stderr
        assert "no output was changed" not in result.stderr
        patch.setattr("magr_onnx.cli.commands.optimize.run", lambda *_: 1 / 0)
        assert "no output was changed" in run(*asked, "r.json", cwd=folder).stderr


def test_long_names_of_reports(folder: Path, tmp_path: Path) -> None:
    asked = ("optimize", "m.onnx", "-o", "o.onnx", "-q", "--report")
    result = run(*asked, "r" * 252 + ".json", "--save-recipe", "s.toml", cwd=folder)
    assert (result.returncode, (folder / "o.onnx").exists()) == (1, False)
    assert "has 257 bytes" in result.stderr
    assert "has 257 bytes" in run(*asked, "r.json", "--save-recipe", "r" * 252 + ".toml", cwd=folder).stderr
    assert run(*asked, "r" * 245 + ".json", "--save-recipe", "s" * 245 + ".toml", cwd=folder).returncode == 0
    assert {len(path.name) for path in folder.iterdir()} == {6, 5, 250} | {
        len(path.name) for path in folder.iterdir() if len(path.name) < 250
    }
    assert sorted(path.name[0] for path in folder.iterdir() if len(path.name) == 250) == ["r", "s"]


def test_what_cannot_be_written_keeps_nothing_else_from_it(folder: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path, 1 << 12) as disk:
        full = [disk / "a.json", disk / "b.json"]
        asked = ("optimize", "m.onnx", "-o", "o.onnx", "--report", full[0], "--report", full[1], "--report", "r.json")
        result = run(*asked, "--save-recipe", "s.toml", cwd=folder)
        assert (result.returncode, list(disk.iterdir())) == (1, [])
    assert all(f"report {path}: cannot be written: No space left on device" in result.stderr for path in full)
    assert all((folder / name).is_file() for name in ("o.onnx", "r.json", "s.toml"))


def test_a_recipe_is_saved_over_nothing_a_folder_has_or_the_run_read(folder: Path) -> None:
    source = folder / "source"
    source.mkdir()
    (folder / "m.onnx").rename(source / "m.onnx")
    for name in ("source/own.toml", "read.toml"):
        (folder / name).write_text("version = 1\nbits = 3\n")
    for name in ("source/own.toml", "read.toml"):
        result = run("optimize", "source", "-o", "out", "-r", "read.toml", "--save-recipe", name, cwd=folder)
        assert f"recipe {name} would overwrite a folder or a file of this run; choose another name" in result.stderr
        assert ((folder / name).read_text(), (folder / "out").exists()) == ("version = 1\nbits = 3\n", False)
    (folder / "earlier.toml").write_text("version = 1\n")
    assert run("optimize", "source", "-o", "out", "-r", "read.toml", "--save-recipe", "earlier.toml", cwd=folder).returncode == 0
    assert "bits = 3" in (folder / "earlier.toml").read_text()
