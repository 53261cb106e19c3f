"""Recipes and presets: what is read, what wins, what is refused and in which line, and that a saved recipe makes the same file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import magr_onnx
from magr_onnx.config.layer_options import LayerOptions
from magr_onnx.config.merge import merge
from magr_onnx.config.options import KEYS, PANELS
from magr_onnx.config.presets import PRESETS
from magr_onnx.config.recipe import Recipe
from magr_onnx.errors import OptionError, RecipeError
from magr_onnx.models import bundled
from magr_onnx.runtime.ort.session import Session
from tests import graphs
from tests.cli.test_cli import run
from tests.graphs import feeds, proto

RECIPE = """version = 1
model = "model.onnx"
calibration = "data/inputs.npz"
output = "out.onnx"
effort = "fast"
bits = 3

[[layer]]
match = "down"
bits = 8
block_size = "channel"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = graphs.chain()
    (tmp_path / "model.onnx").write_bytes(proto(model).SerializeToString())
    (tmp_path / "data").mkdir()
    np.savez(tmp_path / "data" / "inputs.npz", **feeds(model, rows=200))
    (tmp_path / "r.toml").write_text(RECIPE)
    return tmp_path


def optimized(*arguments: object, cwd: Path) -> dict[str, Any]:
    result = run("optimize", *arguments, "--json", cwd=cwd)
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def rows(report: dict[str, Any]) -> dict[str, tuple[int, int]]:
    return {row["name"]: (row["bits"], row["block_size"]) for row in report["layers"]}


def test_a_recipe_alone_is_a_run_wherever_it_is_started_from(folder: Path) -> None:
    assert rows(optimized("--recipe", folder / "r.toml", cwd=Path.cwd())) == {"up": (3, 32), "down": (8, 64)}
    from_shell = (folder / "out.onnx").read_bytes()
    magr_onnx.optimize(recipe=folder / "r.toml")
    assert (folder / "out.onnx").read_bytes() == from_shell
    report = magr_onnx.optimize(graphs.chain(), recipe=Recipe.load(folder / "r.toml"), output=None, calibration=None).report
    assert {row.name: row.bits for row in report.layers} == {"up": 3, "down": 8}


def test_what_is_given_wins(folder: Path) -> None:
    assert rows(optimized("-r", "r.toml", "--bits", "6", "--layer", "down:bits=5", cwd=folder)) == {"up": (6, 32), "down": (5, 64)}
    (folder / "out.onnx").unlink()
    report = optimized("-r", "r.toml", "--quantizer", "rtn", "-o", "other.onnx", cwd=folder)
    assert "quantize{method=rtn" in report["pipeline"]
    assert (folder / "other.onnx").is_file()
    assert not (folder / "out.onnx").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("-r", "r.toml"),
        (
            "model.onnx",
            "-c",
            "data/inputs.npz",
            "-o",
            "out.onnx",
            "--preset",
            "llm-int4",
            "--layer",
            "*own:bits=6,low_rank=2",
            "--no-act-order",
        ),
        (
            "model.onnx",
            "-o",
            "out.onnx",
            "--include",
            "u*",
            "--include",
            "down",
            "--alpha",
            "1e-05",
            "--conv-bits",
            "none",
            "--cache",
            "1GB",
        ),
        ("model.onnx", "-c", "data/inputs.npz", "-o", "out.onnx", "--pipeline", "quantize{method=gptq,bits=5},emit-matmulnbits"),
    ],
)
def test_a_saved_recipe_makes_the_same_file(arguments: tuple[str, ...], folder: Path) -> None:
    (folder / "saved").mkdir()
    first = optimized(*arguments, "--save-recipe", "saved/again.toml", cwd=folder)
    made = (folder / "out.onnx").read_bytes()
    (folder / "out.onnx").unlink()
    again = optimized("--recipe", "saved/again.toml", cwd=folder)
    assert (folder / "out.onnx").read_bytes() == made
    assert rows(again) == rows(first)
    text = (folder / "saved" / "again.toml").read_text()
    assert f"Written by onnx-magr {first['versions']['onnx-magr']}" in text
    assert first["pipeline"] in text
    assert 'model = "../model.onnx"' in text


def test_every_key_survives_being_written_and_read(tmp_path: Path) -> None:
    values: dict[str, Any] = {}
    for name, key in KEYS.items():
        kinds = {"path": "a b.onnx", "paths": ["x.so", 'quo"te.so'], "patterns": ["*é", "\\d"], "size": "1.5 GB"}
        types: dict[type, Any] = {bool: True, int: 3, float: 1e-05, str: "tëxt\n"}
        values[name] = kinds.get(key.kind) or (key.choices[0] if key.choices else next(types[t] for t in key.types if t in types))
    values.pop("pipeline")
    recipe = Recipe.from_dict({**values, "layer": [{"match": ["a", "b"], "block_size": "channel", "bits": 2}]})
    recipe.save(tmp_path / "r.toml", ["a comment"])
    found = Recipe.load(tmp_path / "r.toml")
    assert found.layers == recipe.layers
    read = {
        name: str(Path(v).relative_to(tmp_path)) if KEYS[name].kind == "path" and Path(v).is_relative_to(tmp_path) else v
        for name, v in found.values.items()
    }
    assert set(read) == set(values)
    assert {n: v for n, v in read.items() if KEYS[n].kind == "value"} == {n: recipe.values[n] for n in read if KEYS[n].kind == "value"}
    assert found.values["include"] == ("*é", "\\d")
    assert {option.panel for option in KEYS.values()} == set(PANELS)


BAD = """modell = "x"
bits = "4"
bias = "som"
block-size = 32
version = 2
quiet = true

# [[layer]]
[[layer]]
match = "*"
bits = 8

[[layer]]
bit = 8
format = "qdq"
"""


def test_every_mistake_is_named_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(BAD)
    with pytest.raises(RecipeError) as error:
        Recipe.load(file)
    said = [line.removeprefix(f"  - {file}:") for line in str(error.value).splitlines()[1:]]
    assert said == [
        "1: unknown key 'modell'; did you mean 'model' or 'models'?",
        "2: bits = '4': expected a whole number, found a text",
        "3: bias = 'som': choose one of auto, any, existing, none",
        "4: unknown key 'block-size'; did you mean 'block_size' or 'batch_size'?",
        "5: version = 2: this onnx-magr reads version 1",
        "6: quiet is about what is shown, not about the run: give it on the command line",
        "14: unknown key 'bit'; did you mean 'bits'?",
        "15: format cannot differ by layer: a file has one format",
        "13: match is missing: give the pattern of the layers these options are for",
    ]


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('exclude = """\nbits = 3\n"""\nversion = 1\nbits = "four"', "5: bits ="),
        ("exclude = '''\n[[layer]]\nbits = 3\n'''\nversion = 1\nbits = 'four'", "6: bits ="),
        ('version = 1\ninclude = [\n  "a", # bits = 3\n  "b",\n]\n\n# bits = 3\n"bits" = "four"', "8: bits ="),
        ("version = 1\ninclude = [\n  'a',\n  3,\n]", "2: include ="),
        ("version = 1\nbits.of.all = 3", "2: bits ="),
        ("version = 1\nlayer = [{match = '*', bits = 3}, {bits = 'four'}]\nbits = 3", "2: bits ="),
        ("version = 1\nlayer = [\n  {match = 'x', bits = 'four'},\n]", "2: bits ="),
        ("version = 1\nx = {bits = 'four'}\nbits = 'four'", "3: bits ="),
        (
            "version = 1\n[[layer]]\nmatch = [\n'[[layer]]',\n]\nbits = 3\n[[ 'layer' ]]  # [[layer]]\nmatch = 'b'\nbits = 'four'",
            "9: bits =",
        ),
        ("version = 1\n[[layer]]\nmatch = 'a'\nbits = 3\n[layer.alpha]\nbits = 'four'", "5: alpha ="),
        ("version = 1\n[extra]\nbits = 3", "2: unknown key 'extra'"),
        ("version = 1\r\nexclude = '''a\u2028\u0085b'''\r\nbits = 'four'", "3: bits ="),
    ],
)
def test_lines_of_statements_are_the_parsers(text: str, place: str, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(text, encoding="utf-8", newline="")
    with pytest.raises(RecipeError) as error:
        Recipe.load(tmp_path / "r.toml")
    assert f"r.toml:{place}" in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bits = 4", "version is missing; begin with version = 1"),
        ("version = 1\nbits = ", "not TOML: Invalid value (at end of document)"),
        ("version = 1\n[layer]\nmatch = '*'", "begin each with [[layer]], in two brackets"),
        ("version = 1\nbits = 4\npipeline = 'magr'", "pipeline replaces bits; give one or the other"),
        ("version = 1\ncache = 'much'", "cache = 'much': give a size such as 512MB or 2GB"),
        ("version = 1\ncache = inf", "cache = inf: give a size such as 512MB or 2GB"),
        ("version = 1\nmax_memory = nan", "max_memory = nan: give a size such as 512MB or 2GB"),
        ("version = 1\ninclude = 3", "expected a text or a list of texts, found a whole number"),
        ("version = 1\nsymmetric = 1", "symmetric = 1: expected true or false, found a whole number"),
        ("version = 1\nblock_size = 'big'", "expected a multiple of 16 or 'channel', found a text"),
    ],
)
def test_what_a_recipe_may_not_be(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(RecipeError) as error:
        Recipe.load(tmp_path / "r.toml")
    assert message in str(error.value)
    assert "r.toml" in str(error.value)


def test_files_that_are_none(folder: Path) -> None:
    (folder / "bytes.toml").write_bytes(b"\xff\xfe")
    for name in ("none.toml", "bytes.toml", "."):
        with pytest.raises(RecipeError, match="cannot be read"):
            Recipe.load(folder / name)
    assert "no model: give one, or a recipe that names one" in run("optimize", "--bits", "4").stderr
    for target in ("model.onnx", "none/r.toml", "out.onnx"):
        result = run("optimize", "-r", "r.toml", "--save-recipe", target, cwd=folder)
        assert (result.returncode, (folder / "out.onnx").exists()) == (1, False)
    assert "would overwrite" in run("optimize", "-r", "r.toml", "--report", "r.toml", cwd=folder).stderr


def test_later_options_take_the_place_of_those_they_contradict() -> None:
    assert merge({"effort": "best", "bits": 4}, {"quantizer": "gptq"}) == {"bits": 4, "quantizer": "gptq"}
    assert merge({"bits": 4, "block_size": 32}, {"target_size": "25%"}) == {"block_size": 32, "target_size": "25%"}
    assert merge({"target": "x86-avx2", "format": "qdq-int8"}, {"format": "qdq"}) == {"format": "qdq"}
    assert merge({"accuracy_level": 4}, {"format": "matmulnbits"}) == {"accuracy_level": 4, "format": "matmulnbits"}
    assert merge({"bits": 4, "include": ("a",)}, {"pipeline": "magr"}) == {"include": ("a",), "pipeline": "magr"}
    assert merge({"pipeline": "magr"}, {"bits": 4}) == {"bits": 4}
    assert merge({"effort": "best"}, {"quantizer": None}) == {"effort": "best", "quantizer": None}


def test_recipes_add_their_layers_in_order() -> None:
    a, b = LayerOptions(("a",), {"bits": 4}), LayerOptions(("b",), {"bits": 8})
    assert Recipe({"bits": 2}, (b,)).over(Recipe({"bits": 3, "effort": "fast"}, (a,))) == Recipe({"bits": 2, "effort": "fast"}, (a, b))


def test_a_recipe_for_a_folder_is_refused_for_one_model() -> None:
    with pytest.raises(RecipeError, match="models: for a folder of models"):
        magr_onnx.optimize(graphs.chain(), recipe={"models": "encoder*"})


def test_a_recipe_that_overwrites_folders_is_good_for_one_model(tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    out.write_text("an earlier result")
    magr_onnx.optimize(graphs.chain(), recipe={"overwrite": True}, output=out)
    assert onnx.load(out).graph.node


EXPECTED = {
    "edge-cpu": ("MatMulInteger", {}),
    "web": ("MatMulNBits", {"bits": 4, "block_size": 32, "accuracy_level": 1}),
    "llm-int4": ("MatMulNBits", {"bits": 4, "block_size": 32, "accuracy_level": 4}),
    "llm-int2": ("MatMulNBits", {"bits": 2, "block_size": 32, "accuracy_level": 4}),
    "avx2-safe": ("QuantizeLinear", {}),
}


@pytest.mark.long
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in ("web", "llm-int2"))) for name in PRESETS])
def test_presets_on_the_bundled_model(name: str, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    with np.load(bundled.CALIBRATION) as data:
        few = {key: value[:64] for key, value in data.items()}
    layers = ["node_MatMul_7", "node_MatMul_81", "node_MatMul_83", "node_linear_20", "node_embedding*"]
    report = magr_onnx.optimize(bundled.MODEL, [few], output=out, preset=name, effort="fast", include=layers).report
    assert report.notes[0].startswith(f"preset {name} sets ")
    op, attributes = EXPECTED[name]
    nodes = [node for node in onnx.load(out).graph.node if node.op_type == op]
    assert nodes
    for node in nodes:
        assert attributes.items() <= {a.name: a.i for a in node.attribute}.items()
    with np.load(bundled.HELD_OUT) as data, Session(bundled.MODEL, "cpu") as a, Session(out, "cpu") as b:
        batch = {key: value[:4] for key, value in data.items()}
        exact, got = (session.run(batch)[0] for session in (a, b))
    cosine = np.vdot(exact, got) / np.linalg.norm(exact) / np.linalg.norm(got)
    assert cosine > (0.9 if name == "llm-int2" else 0.99)
    if "target" in PRESETS[name].options:
        assert report.proof is not None
        assert report.proof.proved == report.proof.total > 0


@pytest.mark.parametrize("name", sorted(set(PRESETS) - {"avx2-safe"}))
def test_presets_work_without_data_tables_or_a_last_layer(name: str, tmp_path: Path) -> None:
    report = magr_onnx.optimize(graphs.chain(), output=tmp_path / "out.onnx", preset=name).report
    assert len(report.layers) == 2
    missed = [note for note in report.notes if note.startswith("no layer has a name like *lm_head*")]
    assert bool(missed) == bool(PRESETS[name].layers)


@pytest.mark.parametrize(("name", "bits"), [("llm-int4", 8), ("llm-int2", 4)])
def test_a_last_layer_has_more_bits_unless_told_otherwise(name: str, bits: int) -> None:
    b = graphs.Builder()
    hidden = b.node("Relu", [b.node("MatMul", [b.input("x", ["n", 64]), b.constant("w", graphs.random(64, 64))], "model.up")])
    source = b.model(b.node("MatMul", [hidden, b.constant("head", graphs.random(64, 96))], "/lm_head/MatMul"), ["n", 96])
    found = {row.name: row.bits for row in magr_onnx.optimize(source, preset=name).report.layers}
    assert found == {"model.up": PRESETS[name].options["bits"], "/lm_head/MatMul": bits}
    found = {row.name: row.bits for row in magr_onnx.optimize(source, preset=name, layers=[{"match": "*head*", "bits": 3}]).report.layers}
    assert found["/lm_head/MatMul"] == 3


def test_a_presets_table_is_only_for_the_layers_it_matches() -> None:
    report = magr_onnx.optimize(graphs.chain(), preset="llm-int4", accumulator_bits=17).report
    assert {row.bits for row in report.layers} == {4}
    assert report.proof is not None
    b = graphs.Builder()
    headed = b.model(b.node("MatMul", [b.input("x", ["n", 64]), b.constant("w", graphs.random(64, 64))], "/lm_head/MatMul"), ["n", 64])
    with pytest.raises(OptionError, match=r"/lm_head/MatMul: accumulator_bits=17: .* 8-bit codes need 21"):
        magr_onnx.optimize(headed, preset="llm-int4", accumulator_bits=17)


def test_options_win_over_presets(folder: Path) -> None:
    report = optimized("model.onnx", "--preset", "web", "--bits", "8", "--symmetric", "-o", "p.onnx", cwd=folder)
    assert {bits for bits, _ in rows(report).values()} == {8}
    report = optimized("model.onnx", "--preset", "llm-int4", "--format", "qdq", "-o", "p.onnx", cwd=folder)
    assert report["pipeline"].endswith("emit-qdq,embeddings")
    with pytest.raises(OptionError, match=r"unknown preset 'wep'; choose one of edge-cpu, web, .*; did you mean 'web'"):
        magr_onnx.optimize(graphs.chain(), preset="wep")


def test_presets_are_listed_with_what_they_set() -> None:
    shown = run("presets")
    assert max(map(len, shown.stdout.splitlines())) <= 80
    listed = json.loads(run("presets", "--json").stdout)
    assert [preset["name"] for preset in listed] == list(PRESETS)
    for preset in PRESETS.values():
        assert f"\n{preset.name}\n" in f"\n{shown.stdout}"
        for name, value in preset.options.items():
            assert f"{name}={value}" in shown.stdout


@pytest.mark.parametrize(
    "values", [{"bits": 99}, {"batch_size": 0}, {"colour": "red"}, {"include": 3}, {"pipeline": "magr", "bits": 4}, {"version": 2}]
)
def test_the_constructor_refuses_what_a_file_may_not_have(values: dict[str, Any]) -> None:
    with pytest.raises(RecipeError) as made:
        Recipe(values)
    with pytest.raises(RecipeError) as read:
        Recipe.from_dict(values)
    assert made.value.problems == read.value.problems
