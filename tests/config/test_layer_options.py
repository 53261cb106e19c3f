"""Options of single layers: what each layer gets, in files that onnxruntime runs; what is refused, and in which words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import magr_onnx
from magr_onnx.config.layer_options import LAYER_OPTIONS, LayerOptions, problems_of
from magr_onnx.config.options import OPTIONS
from magr_onnx.errors import ModelError, OptionError
from magr_onnx.models.zoo.trap import constant, model
from magr_onnx.report.data import Report
from magr_onnx.runtime.ort.session import Session
from tests import graphs
from tests.graphs import Builder, feeds, random

DATA = feeds(graphs.chain(), rows=200)


def optimized(layers: Any, output: Path | None = None, source: ir.Model | None = None, **options: Any) -> magr_onnx.Optimized:
    options = {"effort": "fast", **options}
    return magr_onnx.optimize(source or graphs.chain(), [DATA], output=output, layers=layers, **options)


def bits_of(report: Report) -> dict[str, int | None]:
    return {row.name: row.bits for row in report.layers}


def nodes_of(path: Path) -> dict[str, dict[str, Any]]:
    """Attributes of the MatMulNBits nodes of a file, by the layer they were made of."""
    found = onnx.load(path).graph.node
    return {n.name.rsplit("_q", 1)[0]: {a.name: a.i for a in n.attribute} for n in found if n.op_type == "MatMulNBits"}


def test_every_option_is_a_layer_s_or_the_whole_run_s() -> None:
    for name in OPTIONS:
        said = problems_of({"match": "*", name: object()})
        assert len(said) == 1
        assert ("cannot differ by layer" in said[0][1]) == (name not in LAYER_OPTIONS)


@pytest.mark.parametrize(
    ("match", "options"),
    [
        ("*", {"bits": 99}),
        ("*", {"bits": "four"}),
        ("*", {"block": 32}),
        ("*", {"format": "qdq"}),
        ("*", {}),
        ((), {"bits": 4}),
        ((1,), {"bits": 4}),
    ],
)
def test_the_constructor_refuses_what_tables_may_not_have(match: Any, options: Any) -> None:
    with pytest.raises(OptionError) as made:
        LayerOptions(match, options)
    with pytest.raises(OptionError) as read:
        LayerOptions.of({**options, "match": match})
    assert made.value.problems == read.value.problems


def test_the_constructor_makes_what_a_table_makes() -> None:
    assert LayerOptions("*", {"block_size": "channel"}) == LayerOptions.of({"match": "*", "block_size": None})  # type: ignore[arg-type,typeddict-item]


@pytest.mark.parametrize("effort", ["fast", "balanced"])
def test_layers_get_their_options_in_the_file(effort: str, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    report = optimized([{"match": "do*", "bits": 8, "block_size": 16, "accuracy_level": 4}], out, bits=4, effort=effort).report
    nodes = nodes_of(out)
    assert (nodes["up"]["bits"], nodes["up"]["block_size"]) == (4, 32)
    assert (nodes["down"]["bits"], nodes["down"]["block_size"], nodes["down"]["accuracy_level"]) == (8, 16, 4)
    assert "accuracy_level" not in nodes["up"] or nodes["up"]["accuracy_level"] == 0
    notes = {row.name: " ".join(row.notes) for row in report.layers}
    assert "options of its own: bits=8, block_size=16, accuracy_level=4" in notes["down"]
    assert "options of its own" not in notes["up"]
    stored = {p.key: p.value for p in onnx.load(out).metadata_props}
    assert stored["onnx_magr.layers"] == "do*: bits=8, block_size=16, accuracy_level=4"
    with Session(graphs.chain(), "cpu") as a, Session(out, "cpu") as b:
        exact, got = a.run(DATA)[0], b.run(DATA)[0]
    assert np.linalg.norm(got - exact) < 0.2 * np.linalg.norm(exact)


def test_a_layer_alone_is_solved_as_in_a_run_of_its_options() -> None:
    """Without error feedback no layer sees what others get."""
    special = optimized([{"match": "down", "bits": 3, "quantizer": "gptq", "symmetric": True}], bits=6).report
    gptq = optimized([], bits=3, quantizer="gptq", symmetric=True, effort=None).report
    six = optimized([], bits=6).report
    errors = [{row.name: row.estimate for row in report.layers} for report in (special, gptq, six)]
    assert errors[0] == {"up": errors[2]["up"], "down": errors[1]["down"]}


def test_later_tables_win_option_by_option() -> None:
    tables = [LayerOptions.of({"match": "*", "bits": 8, "symmetric": True}), LayerOptions.of({"match": "w2", "bits": 3})]
    rows = {row.name: row for row in optimized(tables).report.layers}
    assert (rows["up"].bits, rows["down"].bits) == (8, 3)
    assert "options of its own: bits=3, symmetric=True" in rows["down"].notes


def test_the_opset_is_raised_as_far_as_a_layer_needs(tmp_path: Path) -> None:
    """8 bits a channel are written at opset 20, 4 bits need 21."""
    plain, mixed = tmp_path / "plain.onnx", tmp_path / "mixed.onnx"
    for path, layers in ((plain, []), (mixed, [{"match": "down", "bits": 4}])):
        optimized(layers, path, format="qdq", bits=8, block_size=None)
    assert [onnx.load(path).opset_import[0].version for path in (plain, mixed)] == [20, 21]


def test_a_budget_is_shared_by_the_layers_that_have_a_choice(tmp_path: Path) -> None:
    b = Builder()
    x = b.input("x", ["batch", 64])
    first = b.node("Relu", [b.node("MatMul", [x, b.constant("w0", random(64, 96))], "first")])
    second = b.node("Relu", [b.node("MatMul", [first, b.constant("w1", random(96, 96, seed=1))], "second")])
    source = b.model(b.node("MatMul", [second, b.constant("w2", random(96, 64, seed=2))], "third"), ["batch", 64])
    batches = [feeds(source, rows=32, seed=i) for i in range(8)]
    out = tmp_path / "out.onnx"
    size = ir.to_proto(source).ByteSize()
    layers = [{"match": "third", "bits": 8, "block_size": 16}]
    report = magr_onnx.optimize(source, batches, output=out, target_size=f"{size * 3 // 10 / 1e3} kB", effort="fast", layers=layers).report
    rows = {row.name: row for row in report.layers}
    assert (rows["third"].bits, rows["third"].block_size) == (8, 16)
    assert out.stat().st_size <= size * 3 // 10
    assert report.assignment is not None
    assert {name for row in report.assignment.rows for name in row.layers} == {"first", "second"}
    assert len(set(bits_of(report).values())) > 1
    with pytest.raises(OptionError, match="under a budget a layer's own options keep it out of the choice; give its bits too"):
        magr_onnx.optimize(source, batches, target_size="30%", layers=[{"match": "third", "symmetric": True}])
    with pytest.raises(OptionError, match="every layer has bits of its own"):
        magr_onnx.optimize(source, batches, target_size="30%", layers=[{"match": "*", "bits": 4}])


def test_layers_of_one_weight_have_the_same_options() -> None:
    b = Builder()
    x = b.input("x", ["batch", 48])
    weight = b.constant("w", random(48, 48))
    source = b.model(b.node("MatMul", [b.node("MatMul", [x, weight], "once"), weight], "twice"), ["batch", 48])
    with pytest.raises(OptionError, match="once, twice have one weight, w, and so the same options"):
        optimized([{"match": "once", "bits": 8}], source=source)
    report = optimized([{"match": "w", "bits": 8}], source=source).report
    assert bits_of(report) == {"once": 8, "twice": 8}


def test_patterns_that_match_nothing_are_all_named_with_what_is_like_them() -> None:
    with pytest.raises(OptionError) as error:
        optimized([{"match": "*donw*", "bits": 8}, {"match": ["up", "zebra"], "bits": 8}])
    assert "'*donw*' matches no layer that is converted; did you mean 'down'?" in str(error.value)
    assert "'zebra' matches no layer that is converted; there are up, down" in str(error.value)
    assert "'up'" not in str(error.value)
    with pytest.raises(OptionError, match="'down' matches no layer that is converted"):
        optimized([{"match": "down", "bits": 8}], exclude=["down"])


def test_patterns_to_include_and_exclude_match_something() -> None:
    for work in (magr_onnx.inspect, magr_onnx.optimize):
        with pytest.raises(OptionError) as error:
            work(graphs.chain(), include=["*donw*", "down"], exclude=["zebra"])
        assert "include '*donw*' matches no layer; did you mean 'down'?" in str(error.value)
        assert "exclude 'zebra' matches no layer; there are up, down" in str(error.value)
        assert "'down' matches" not in str(error.value)


def test_a_quantized_file_says_so_and_what_to_do() -> None:
    fused, standard = (magr_onnx.optimize(graphs.chain(), effort="fast", format=form).model for form in ("matmulnbits", "qdq"))
    with pytest.raises(
        ModelError, match=r"2 nodes such as up_q4 \(MatMulNBits\): weight is quantized already.*; give the float model.*no other"
    ):
        magr_onnx.optimize(fused, requantize=True)
    with pytest.raises(ModelError, match=r"2 nodes such as up.* \(MatMul\): weight is quantized already.*; requantize \(--requantize\)"):
        magr_onnx.optimize(standard)
    assert len(magr_onnx.optimize(standard, requantize=True).report.layers) == 2


def test_convolutions_are_not_layers_of_a_pattern() -> None:
    text = """g (float[n, 3, 8] x) => (float[n, 4] y) {
        [stem] a = Conv(x, k)
        p = GlobalAveragePool(a)
        f = Flatten(p)
        [stem_fc] y = MatMul(f, w)
    }"""
    source = model(text, k=constant("k", 16, 3, 3), w=constant("w", 16, 4))
    with pytest.raises(OptionError, match=r"'stem' matches convolutions only \(stem\), and their bits are conv_bits"):
        magr_onnx.optimize(source, layers=[{"match": "stem", "bits": 3}])
    report = magr_onnx.optimize(source, layers=[{"match": "stem*", "bits": 3}]).report
    assert bits_of(report) == {"stem": 8, "stem_fc": 3}
    assert any("it matches some (stem): see conv_bits" in note for note in report.notes)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"bits": 8}, "match is missing"),
        ({"match": "*"}, "no options; give some of bits, block_size"),
        ({"match": [], "bits": 8}, "expected a pattern or a list of patterns"),
        ({"match": "*", "bit": 8}, "unknown key 'bit'; did you mean 'bits'?"),
        ({"match": "*", "bits": "8"}, "bits = '8': expected a whole number, found a text"),
        ({"match": "*", "bits": True}, "bits = True: expected a whole number, found true or false"),
        ({"match": "*", "bits": 9}, "choose one of 2, 3, 4, 5, 6, 7, 8"),
        ({"match": "*", "quantizer": "gtpq"}, "did you mean 'gptq'"),
        ({"match": "*", "format": "qdq"}, "format cannot differ by layer: a file has one format"),
        ({"match": "*", "effort": "best"}, "effort cannot differ by layer"),
    ],
)
def test_tables_are_checked(table: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as error:
        LayerOptions.of(table)
    assert message in str(error.value)


def test_kernels_are_asked_before_the_model_is_read() -> None:
    with pytest.raises(OptionError, match="layers down: 2 bits"):
        magr_onnx.optimize("there-is-none.onnx", format="qdq", layers=[{"match": "down", "bits": 2}])
    with pytest.raises(ModelError):
        magr_onnx.optimize("there-is-none.onnx", layers=[{"match": "down", "bits": 2}])


def test_a_pipeline_has_no_options_to_start_from() -> None:
    with pytest.raises(OptionError, match="need the run's options to start from"):
        magr_onnx.optimize(graphs.chain(), pipeline_text="quantize,emit-matmulnbits", layers=[{"match": "down", "bits": 8}])


def test_text_form() -> None:
    table = LayerOptions.parse("MatMul:a*:bits=8,block_size=channel,symmetric=true,beta=0.9,quantizer=rtn")
    assert table.match == ("MatMul:a*",)
    assert table.options == {"bits": 8, "block_size": None, "symmetric": True, "beta": 0.9, "quantizer": "rtn"}
    assert LayerOptions.of(table.table) == table
    for text in ("down", "down:", ":bits=8", "down:bits"):
        with pytest.raises(OptionError, match="give PATTERN:option=value"):
            LayerOptions.parse(text)
    with pytest.raises(OptionError, match=r"--layer 'l0:bits=8, bits=4': bits is given twice"):
        LayerOptions.parse("l0:bits=8, bits=4")


def test_finished_layers_are_told_as_the_report_has_them() -> None:
    seen = []
    report = magr_onnx.optimize(graphs.chain(), [DATA], effort="fast", on_layer=seen.append).report
    assert [(row.name, row.error) for row in seen] == [(row.name, row.estimate) for row in report.layers]


def test_models_too_large_for_memory_and_job_directories_know_options_of_layers(tmp_path: Path) -> None:
    source = tmp_path / "model.onnx"
    source.write_bytes(graphs.proto(graphs.chain()).SerializeToString())
    layers = [{"match": "down", "bits": 8}]
    made = []
    for name, options in (("plain", {}), ("job", {"resume": tmp_path / "job"}), ("again", {"resume": tmp_path / "job"})):
        report = optimized(layers, tmp_path / f"{name}.onnx", source, **options).report  # type: ignore[arg-type]
        assert bits_of(report) == {"up": 4, "down": 8}
        made.append((tmp_path / f"{name}.onnx").read_bytes())
    assert made[0] == made[1] == made[2]
    with pytest.raises(OptionError, match="option layers: was down: bits=8, is none"):
        optimized([], tmp_path / "other.onnx", source, resume=tmp_path / "job")  # type: ignore[arg-type]
    small = optimized(layers, tmp_path / "small.onnx", source, max_memory="30 kB").report  # type: ignore[arg-type]
    assert bits_of(small) == {"up": 4, "down": 8}
