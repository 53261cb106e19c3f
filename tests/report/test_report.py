"""Reports: what they record is true, JSON gives them back as they were, and pages that cannot be made are refused before the work."""

from __future__ import annotations

import json
import re
import urllib.parse
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import magr_onnx
from magr_onnx import Report
from magr_onnx.core import histograms, magr
from magr_onnx.core.grid import minmax
from magr_onnx.core.overflow.accumulator import Accumulator, Budget, log2_gap
from magr_onnx.core.types import WeightSpec
from magr_onnx.errors import OptionError, OutputError, ReportError
from magr_onnx.models.zoo.trap import constant, model
from magr_onnx.passes.instrument.segments import depths
from magr_onnx.report.data import SCHEMA, layer_table
from magr_onnx.report.html import side_by_side, summary
from magr_onnx.report.layer_row import LayerRow
from magr_onnx.report.reasons import Reason, Skip, TableReason
from magr_onnx.report.serialization import decode
from magr_onnx.report.validation import Latency, OutputMetrics, Validation
from magr_onnx.report.verdicts import verdicts
from magr_onnx.workflow.directory import OptimizedFolder
from tests import graphs
from tests.cli.test_cli import run
from tests.graphs import Builder, proto, random
from tests.helpers import layer, random_quantized

RUNS: dict[str, dict[str, Any]] = {
    "fast": {"effort": "fast"},
    "balanced": {"bits": 3},
    "integer": {"format": "qdq-int8", "bits": 4, "accumulator_bits": 16, "accumulator_tile": 16},
    "mixed": {"effort": "fast", "target_size": "70%"},
    "magr": {"pipeline_text": "magr{alpha=1e-3}"},
    "nothing": {"pipeline_text": "magr{alpha=0}"},
}


def samples(count: int = 8, seed: int = 0) -> list[dict[str, Any]]:
    return [graphs.feeds(graphs.chain(), seed=seed + i) for i in range(count)]


@pytest.fixture(scope="module")
def reports() -> dict[str, Report]:
    """One of every kind, with validation."""
    return {n: magr_onnx.optimize(graphs.chain(), samples(), validation_data=samples(3, 50), **o).report for n, o in RUNS.items()}


@pytest.mark.parametrize("name", RUNS)
def test_json_gives_the_report_back(reports: dict[str, Report], name: str, tmp_path: Path) -> None:
    report = reports[name]
    assert Report.from_json(report.to_json()) == report
    report.save(tmp_path / "r.json")
    assert Report.load(tmp_path / "r.json") == report
    assert json.loads(report.to_json()) == report.to_dict()
    assert report.schema == SCHEMA
    assert (name == "nothing") == (report.validation is not None and report.validation.arithmetics["default"][0].sqnr_db == np.inf)
    assert (report.assignment is not None) == (name == "mixed")
    assert (report.proof is not None) == (name == "integer")


def test_arrays_of_numbers_take_a_line(reports: dict[str, Report]) -> None:
    text = reports["fast"].to_json()
    counts = reports["fast"].layers[0].weights
    assert counts is not None
    assert json.dumps(counts["before"]) in text


def test_reports_of_older_versions_load(reports: dict[str, Report]) -> None:
    old = reports["integer"].to_dict()
    for name in ("schema", "command", "recipe", "options"):
        del old[name]
    del old["proof"]["by_node"]
    for row in old["layers"]:
        for name in ("weights", "errors", "tiles", "depth", "output"):
            del row[name]
        row["magr"].pop("trace", None)
    found = Report.from_json(json.dumps(old))
    assert found.schema == 1
    assert found.command == ""
    assert [row.name for row in found.layers] == [row.name for row in reports["integer"].layers]
    assert found.layers[0].weights is None
    assert "<html" in found.to_html()


@pytest.mark.parametrize(("milliseconds", "ending"), [(6.0, "SLOWER: a batch takes 3.00 times as long"), (1.9, None)])
def test_a_result_slower_than_float_is_said_at_the_end(reports: dict[str, Report], milliseconds: float, ending: str | None) -> None:
    timed = Validation("a batch", 1, "cpu", {}, latency=Latency(2.0, milliseconds, 9))
    for name in ("check", "validation"):
        report = replace(next(iter(reports.values())), **{"check": None, "validation": None, name: timed})
        verdict = report.to_text().rpartition("\n\n")[2]
        assert verdict.startswith(ending) if ending else "SLOWER" not in verdict
        assert any("3.00 times its time" in f.text for f in summary.findings(report, summary.lines_of(report))) is (ending is not None)


def test_the_text_says_what_its_columns_and_marks_are(reports: dict[str, Report]) -> None:
    text = magr_onnx.optimize(graphs.chain(), [graphs.feeds(graphs.chain(), rows=30)] * 2, effort="fast").report.to_text()
    assert ": 60 samples, 60 rows" in text
    assert "*: the largest error" in text
    validation = reports["fast"].validation
    assert validation is not None
    assert "the given batches: 36 samples, provider cpu" in reports["fast"].to_text()
    assert "36 samples of the given batches" in reports["fast"].to_html()
    assert "3 batches of the given batches" in replace(reports["fast"], validation=replace(validation, samples=None)).to_html()
    net = "g (int64[n] i) => (float[n, 8] y) { [rows] x = Gather(table, i) y = MatMul(x, w) }"
    gather = model(net, table=constant("table", 300, 64), w=constant("w", 64, 8))
    text = magr_onnx.optimize(gather).report.to_text()
    assert "tables of embeddings stay float (option embeddings quantizes them), 0.08" in text
    assert re.search(r"table of embeddings rows stays float and is \d+% of the result", text)
    skipped = magr_onnx.inspect(gather).skipped
    assert [(s.name, s.bytes) for s in skipped] == [("rows", 300 * 64 * 4)]


def logarithm() -> tuple[ir.Model, list[dict[str, Any]]]:
    """``log(x W - c)`` with c just below the least product: any error at the least is the logarithm of what is none."""
    x, w = random(64, 16, seed=1), random(16, 8, seed=2)
    least = np.float32((x @ w).min() - 1e-3)
    b = Builder()
    product = b.node("MatMul", [b.input("x", ["batch", 16]), b.constant("w", w)], "product")
    model = b.model(b.node("Log", [b.node("Sub", [product, b.constant("c", least)])], "log"), ["batch", 8])
    return model, [{"x": x}]


def test_a_result_that_is_not_a_number_is_called_one() -> None:
    model, data = logarithm()
    report = magr_onnx.optimize(model, data, validation_data=data, bits=2).report
    assert report.validation is not None
    m = report.validation.arithmetics["default"][0]
    assert np.isnan([m.sqnr_db, m.cosine, m.max_error]).all()
    assert m.nonfinite[0] == 0 < m.nonfinite[1]
    said = "values that are NaN or infinite in the result and not in the float model"
    assert said in " ".join(report.to_text().split())
    assert next((f.tone, said in f.text) for f in summary.findings(report, summary.lines_of(report))) == ("bad", True)
    card = next(c for c in summary.cards(report) if c.title == "Cosine")
    assert (card.value, card.tone) == ("not a number", "bad")
    assert "no difference" not in report.to_html()
    value = json.loads(report.to_json())
    assert value["validation"]["arithmetics"]["default"][0]["sqnr_db"] == "nan"
    assert Report.from_json(report.to_json()).to_dict() == value
    rows = {row.name: row for row in side_by_side.compared(replace(report, validation=exact(report)), report)}
    assert (rows["SQNR"].first, rows["SQNR"].second, rows["SQNR"].tone) == ("no difference", "not a number", "bad")


def exact(report: Report) -> Any:
    """Its validation, as if nothing differed."""
    assert report.validation is not None
    return replace(report.validation, arithmetics={"default": (OutputMetrics("y", np.inf, 1, 0),)})


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_json_tells_numbers_that_are_not_finite_apart(reports: dict[str, Report], value: float) -> None:
    report = reports["fast"]
    row = replace(
        report.layers[0], error=value, magr={"gap": value, "trace": [1.0, value]}, solver={"sweeps": value}, name="nan", scope="inf"
    )
    found = Report.from_json(replace(report, layers=(row,), options={"include": "inf"}).to_json())
    np.testing.assert_equal(asdict(found.layers[0]), asdict(row))
    assert found.options == {"include": "inf"}
    assert "<html" in found.to_html()


@pytest.mark.parametrize(("decibels", "alarm"), [((25.0, 40.0), False), ((25.0, 5.0), True), ((np.nan,), True), ((), True)])
def test_layers_are_no_alarm_where_the_outputs_are_sound(reports: dict[str, Report], decibels: tuple[float, ...], alarm: bool) -> None:
    """The output of a layer may be small, and its errors those of the layers before it."""
    report = reports["fast"]
    assert report.validation is not None
    first, *rest = report.layers
    rows = (replace(first, name="off", scope="", error=1.25), *rest)
    outputs = tuple(OutputMetrics(f"y{i}", db, 1, 0) for i, db in enumerate(decibels))
    compared = replace(report.validation, arithmetics={"default": outputs}, latency=None)
    lines = verdicts(rows, [compared])
    (line,) = [line for line in lines if "off" in line and "125%" in line]
    assert line.startswith("RUINED") == alarm
    broken = (replace(rows[0], error=np.nan), *rest)
    assert any(line.startswith("RUINED: layers") for line in verdicts(broken, [compared]))


def test_an_output_that_no_layer_explains_is_ruined_with_a_remedy(reports: dict[str, Report]) -> None:
    report = reports["fast"]
    assert report.validation is not None
    compared = replace(report.validation, arithmetics={"default": (OutputMetrics("y", 5.0, 1, 0),)}, latency=None)
    sound = [replace(row, error=0.01) for row in report.layers]
    assert [line for line in verdicts(sound, [compared]) if "RUINED: output y" in line and "--exclude" in line]
    integers = [replace(row, activation={"error": 0.01}) for row in sound]
    assert [line for line in verdicts(integers, [compared]) if "RUINED: output y" in line and "--wide-activations" in line]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_the_worst_error_is_one_that_is_no_number(reports: dict[str, Report], value: float) -> None:
    first, *rest = reports["fast"].layers
    report = replace(reports["fast"], layers=(*rest, replace(first, name="broken", error=value)))
    assert [line.split()[0] for line in report.to_text(1).splitlines() if f"{value:.2%}" in line and "RUINED" not in line] == ["broken"]
    assert "RUINED: layers that lose most of their output: broken" in report.to_text(1)
    assert {line.row.name: line.share for line in summary.lines_of(report)} == {"broken": 1, **{row.name: 1 for row in rest}}
    assert [f.text for f in summary.findings(report, summary.lines_of(report)) if f.tone == "bad"] == [
        f"The error in the running model is {'not a number' if np.isnan(value) else 'inf%'}."
    ]


def test_infinities_of_older_reports_are_read(reports: dict[str, Report]) -> None:
    old = reports["nothing"].to_dict()
    old["schema"] = 2
    for outputs in old["validation"]["arithmetics"].values():
        outputs[0]["sqnr_db"] = None
        del outputs[0]["nonfinite"]
    assert Report.from_json(json.dumps(old)).validation == reports["nothing"].validation


def test_what_is_no_report_is_refused(reports: dict[str, Report], tmp_path: Path) -> None:
    good = reports["fast"].to_dict()
    with pytest.raises(ReportError, match=r"newer onnx-magr \(schema 99, this one reads up to 3\)"):
        Report.from_json(json.dumps({**good, "schema": 99}))
    with pytest.raises(ReportError, match="report: source, bytes_before missing"):
        Report.from_json(json.dumps({k: v for k, v in good.items() if k not in ("source", "bytes_before")}))
    with pytest.raises(ReportError, match=r"report.layers\[0\].k: found 'many', expected int"):
        Report.from_json(json.dumps({**good, "layers": [{**good["layers"][0], "k": "many"}]}))
    with pytest.raises(ReportError, match=r"report.layers: found 3, expected tuple"):
        Report.from_json(json.dumps({**good, "layers": 3}))
    with pytest.raises(ReportError, match=r"found \[\], expected Report"):
        Report.from_json("[]")
    with pytest.raises(ReportError, match=r"report.seconds.a: found \[1\], expected float"):
        Report.from_json(json.dumps({**good, "seconds": {"a": [1]}}))
    with pytest.raises(ReportError, match=r"report.layers\[0\].error: found \[1\], expected float"):
        Report.from_json(json.dumps({**good, "layers": [{**good["layers"][0], "error": [1]}]}))
    nested: dict[str, Any] = {}
    for _ in range(5000):
        nested = {"a": nested}
    with pytest.raises(ReportError, match="report: nested too deeply"):
        decode(Report, {**good, "options": nested}, "report")
    for text in ("{", "[" * 200_000):
        with pytest.raises(ReportError, match="not JSON"):
            Report.from_json(text)
    with pytest.raises(ReportError, match="No such file"):
        Report.load(tmp_path / "none.json")


def test_every_field_is_documented() -> None:
    for kind in (Report, LayerRow):
        assert kind.__doc__ is not None
        assert [f.name for f in fields(kind) if f"        {f.name}: " not in kind.__doc__] == []


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group", [None, 16, 7])
def test_histograms_count_every_weight_where_it_is(bits: int, group: int | None) -> None:
    spec = WeightSpec(bits, group)
    weight = random_quantized(45, 30, spec)
    before = weight.dequantize() + random(45, 30, seed=1, scale=0.05)
    after = before * np.float32(0.9)
    found = histograms.sketch(before, after, weight)
    assert found["of"] == before.size
    for name, values in (("before", before), ("after", after)):
        expected = np.histogram(values, histograms.BINS, (found["low"], found["high"]))[0]
        assert sum(found[name]) == values.size
        assert np.abs(np.array(found[name]) - expected).sum() <= 4  # edges fall to one side or the other in float32
        units = values / weight.scales[spec.group_of_row(45)] + weight.zero_points[spec.group_of_row(45)]
        grid = found["grid"]
        inside = units[(units > grid["low"]) & (units < grid["high"])]
        expected = np.histogram(inside, len(grid[name]), (grid["low"], grid["high"]))[0]
        expected[[0, -1]] += [(units <= grid["low"]).sum(), (units >= grid["high"]).sum()]
        assert np.abs(np.array(grid[name]) - expected).sum() <= 4
    assert len(grid["before"]) <= histograms.BINS
    assert grid["low"] < -0.5
    assert grid["high"] > grid["top"] + 0.5
    assert sum(grid["codes"]) == before.size
    if bits <= 6:
        assert grid["codes"] == np.bincount(weight.codes.ravel(), minlength=2**bits).tolist()


def test_weights_on_the_grid_are_in_the_bins_of_its_codes() -> None:
    weight = random_quantized(64, 20, WeightSpec(4, 16))
    grid = histograms.sketch(weight.dequantize(), None, weight)["grid"]
    edges = np.linspace(grid["low"], grid["high"], len(grid["before"]) + 1)
    middles = (edges[1:] + edges[:-1]) / 2
    by_code = [int(np.array(grid["before"])[np.abs(middles - code) < 0.5].sum()) for code in range(16)]
    assert by_code == grid["codes"]
    assert grid["after"] is None


def test_large_weights_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(histograms, "SAMPLE", 100)
    found = histograms.sketch(random(10, 35), None, None)
    assert found["of"] == sum(found["before"]) == 90  # every fourth column


def test_a_constant_weight_has_a_histogram() -> None:
    found = histograms.sketch(np.full((4, 3), 2.0, np.float32), None, None)
    assert sum(found["before"]) == 12
    assert found["low"] < 2 < found["high"]


EXTREMES = st.sampled_from([0.0, 1.0, 1e-45, -1e-45, 1e-40, 1.2e-38, 3e38, -3e38, 1e15])


@settings(max_examples=60, deadline=None)
@given(
    arrays(np.float32, (8, 3), elements=EXTREMES | st.floats(width=32, allow_nan=False, allow_infinity=False)), st.sampled_from([2, 4, 8])
)
@pytest.mark.filterwarnings("ignore:overflow")  # of the grid, not of the histogram: weights above 1e15 are refused before
def test_every_finite_weight_has_histograms(weights: Any, bits: int) -> None:
    grid = minmax(np.clip(weights, -1e30, 1e30), WeightSpec(bits, 4))
    found = histograms.sketch(weights, weights[::-1], grid.weight(grid.codes(weights)))
    assert found["low"] < found["high"]
    for place in (found, found["grid"]):
        assert sum(place["before"]) == sum(place["after"]) == weights.size
    assert json.loads(json.dumps(found, allow_nan=False)) == found


@pytest.mark.parametrize("value", [0.0, 3e38, -3e38, 1e-45])
def test_one_value_is_in_the_middle_of_its_histogram(value: float) -> None:
    found = histograms.sketch(np.full((4, 3), value, np.float32), None, None)
    assert np.flatnonzero(found["before"]).tolist() == [histograms.BINS // 2]


def test_a_dead_layer_is_converted() -> None:
    b = Builder()
    x = b.input("x", ["batch", 8])
    h = b.node("MatMul", [x, b.constant("w", random(8, 8))], "first")
    model = b.model(b.node("MatMul", [h, b.constant("dead", random(8, 4) * np.float32(1e-40))], "dead"), ["batch", 4])
    report = magr_onnx.optimize(model, [{"x": random(16, 8, seed=i)} for i in range(2)], bits=4, include=["*"]).report
    assert [row.name for row in report.layers] == ["first", "dead"]
    assert Report.from_json(report.to_json()) == report


def test_durations_are_rounded_once() -> None:
    expected = {0.04: "0.0 s", 59.97: "1 min 0 s", 119.7: "2 min 0 s", 61.2: "1 min 1 s", 3599.7: "1 h 0 min", 7199.0: "2 h 0 min"}
    assert {seconds: summary.duration(seconds) for seconds in expected} == expected


def test_long_curves_know_their_steps() -> None:
    long = [{"x": random(64, 24, seed=i)} for i in range(3)]  # too few to hold any out and solve without MagR
    b = Builder()
    model = b.model(b.node("MatMul", [b.input("x", ["batch", 24]), b.constant("w", random(24, 8))], "only"), ["batch", 8])
    row = magr_onnx.optimize(model, long, pipeline_text="magr{method=authors,relative=false},quantize,emit-qdq").report.layers[0]
    assert row.magr is not None
    assert len(row.magr["trace"]) == len(row.magr["steps"]) == histograms.POINTS
    assert (row.magr["steps"][0], row.magr["steps"][-1]) == (0, row.magr["iterations"]) == (0, 200)
    assert (row.errors, row.sweeps, summary.sweeps_of(row)) == ((), (), None)
    swept = replace(row, errors=tuple(histograms.subsample(range(80))), sweeps=tuple(histograms.sampled_steps(80)))
    assert summary.sweeps_of(swept) == 79
    assert swept.errors == swept.sweeps
    assert summary.sweeps_of(replace(swept, sweeps=())) == 49  # an older report


def test_scales_of_a_table_are_along_its_rows(reports: dict[str, Report]) -> None:
    def block(op: str, size: int | None) -> str:
        row = replace(reports["fast"].layers[0], op=op, k=30, n=64, block_size=size)
        return row.block

    assert [block("Gather", 64), block("Gather", 32), block("MatMul", 30), block("MatMul", 16)] == ["row", "32", "channel", "16"]
    assert block("MatMul", None) == ""


def test_a_quantizer_without_sweeps_has_no_chart_of_them(reports: dict[str, Report]) -> None:
    _, report = magr_onnx.optimize(graphs.chain(), samples(), pipeline_text="magr,quantize,emit-qdq")
    assert all(row.magr and not row.errors for row in report.layers)
    assert 'data-chart="convergence"' not in report.to_html()
    assert 'data-chart="convergence"' in reports["fast"].to_html()


def test_a_choice_without_attempts_can_be_shown(reports: dict[str, Report]) -> None:
    assignment = reports["mixed"].assignment
    assert assignment is not None
    for bare in (replace(assignment, attempts=()), replace(assignment, attempts=(), curve=(), uniform=())):
        report = replace(reports["mixed"], assignment=bare)
        assert assignment.goal in report.to_text()
        assert 'data-chart="tradeoff"' in report.to_html()


def test_curves_keep_their_ends() -> None:
    assert histograms.subsample([3.0, 2.0, 1.0]) == [3, 2, 1]
    long = histograms.subsample(np.linspace(1, 0, 999).tolist())
    assert len(long) == histograms.POINTS
    assert (long[0], long[-1]) == (1, 0)
    assert long == sorted(long, reverse=True)


@pytest.mark.parametrize("method", ["fista", "authors"])
def test_the_trace_of_magr_is_its_objective(method: Any) -> None:
    weights, gram = layer(40, 12)
    whole = magr.reduce(weights, gram, alpha=1e-2, method=method)
    assert whole.trace[0] == whole.start
    assert whole.trace[-1] == whole.objective
    assert len(whole.trace) == whole.iterations + 1
    for steps in (1, 3):  # the same run, ended early
        early = magr.reduce(weights, gram, alpha=1e-2, method=method, max_iterations=steps, tolerance=0)
        assert early.trace == pytest.approx(whole.trace[: steps + 1], rel=1e-5)
        difference = (early.weights - weights).astype(np.float64)
        value = 0.5 * np.sum(difference * (gram @ difference)) + early.penalty * np.abs(early.weights).max(axis=0).sum()
        assert early.trace[-1] == pytest.approx(value, rel=1e-3)


@pytest.mark.parametrize("tile", [None, 16, 7])
def test_headroom_by_tile_is_that_of_the_worst_column(tile: int | None) -> None:
    weight = random_quantized(50, 9, WeightSpec(4, None))
    budget = Budget(Accumulator(20, tile), -128, 127)
    found = histograms.tile_headroom(weight, budget)
    size = tile or 50
    expected = []
    for at in range(0, 50, size):
        codes = weight.raw()[at : at + size].astype(int)
        highest = np.maximum(codes * 127, codes * -128).sum(axis=0).max()
        lowest = np.minimum(codes * 127, codes * -128).sum(axis=0).min()
        expected.append(log2_gap(int(lowest), int(highest), 20))
    assert found["headroom"] == pytest.approx(expected, rel=1e-6)
    assert (found["bits"], found["tile"], found["tiles"]) == (20, tile, len(expected))


def test_what_a_run_records_of_its_layers(reports: dict[str, Report]) -> None:
    for name in ("fast", "balanced", "integer", "mixed"):
        for row in reports[name].layers:
            assert row.weights is not None
            assert sum(row.weights["before"]) == sum(row.weights["grid"]["codes"]) == row.k * row.n
            assert (row.weights["after"] is None) == (row.magr is None)
            if row.magr is not None:
                assert row.magr["trace"][-1] == pytest.approx(row.magr["objective"], rel=1e-6)
    fast = reports["fast"]
    assert [row.depth for row in fast.layers] == list(range(len(fast.layers)))
    assert fast.validation is not None
    assert {row.output for row in fast.layers} == {m.layer for m in fast.validation.layers}
    assert all(row.errors and row.errors[-1] <= row.errors[0] for row in fast.layers)
    integer = reports["integer"]
    assert integer.proof is not None
    assert {row.emitted for row in integer.layers} == set(integer.proof.by_node)
    for row in integer.layers:
        assert row.tiles is not None
        assert row.emitted is not None
        assert min(row.tiles["headroom"]) == pytest.approx(integer.proof.by_node[row.emitted], abs=1e-6)
    only = reports["magr"].layers[0]
    assert only.weights is not None
    assert "grid" not in only.weights


def test_codes_of_the_report_are_those_of_the_file(tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    _, report = magr_onnx.optimize(graphs.chain(), samples(), output=out, effort="fast", format="qdq", block_size=16)
    stored = [
        node.inputs[0].const_value for node in ir.load(out).graph if node.op_type == "DequantizeLinear" and node.inputs[0] is not None
    ]
    codes = [array.numpy().astype(int) for array in stored if array is not None]
    assert len(codes) == len(report.layers)
    for row, own in zip(report.layers, codes, strict=True):
        assert row.weights is not None
        assert np.bincount(own.ravel(), minlength=16).tolist() == row.weights["grid"]["codes"]


@pytest.mark.parametrize("group", [1, 2, 8])
def test_convolutions_and_tables_have_histograms_too(group: int) -> None:
    b = Builder()
    ids = b.input("ids", ["batch", 6], ir.DataType.INT64)
    rows = b.node("Gather", [b.constant("table", random(400, 32)), ids], "gather")
    turned = b.node("Transpose", [rows], "turn", perm=[0, 2, 1])
    model = b.model(b.node("Conv", [turned, b.constant("kernel", random(8, 32 // group, 3))], "conv", group=group), ["batch", 8, 4])
    data = [{"ids": np.random.default_rng(i).integers(0, 400, (4, 6))} for i in range(4)]
    _, report = magr_onnx.optimize(model, data, effort="fast", embeddings="dequantize", conv_bits=4)
    assert [row.op for row in report.layers] == ["Gather", "Conv"]
    for row in report.layers:
        assert row.weights is not None
        assert row.weights["of"] == sum(row.weights["grid"]["codes"]) == row.k * row.n * row.groups


def test_depth_is_the_longest_way() -> None:
    b = Builder()
    x = b.input("x", ["batch", 8])
    one = b.node("MatMul", [x, b.constant("a", random(8, 8))], "one")
    two = b.node("MatMul", [b.node("Relu", [one]), b.constant("b", random(8, 8))], "two")
    beside = b.node("MatMul", [x, b.constant("c", random(8, 8))], "beside")
    last = b.node("MatMul", [b.node("Add", [two, beside]), b.constant("d", random(8, 8))], "last")
    model = b.model(last, ["batch", 8])
    assert depths(model, {"one", "two", "beside", "last"}) == {"one": 0, "two": 1, "beside": 0, "last": 2}
    assert depths(model, {"two", "last"}) == {"two": 0, "last": 1}


def test_the_call_of_a_report_does_the_same_again(tmp_path: Path) -> None:
    onnx.save(proto(graphs.chain()), tmp_path / "model.onnx")
    np.savez(tmp_path / "inputs.npz", **graphs.feeds(graphs.chain(), rows=32))  # type: ignore[arg-type]
    out = tmp_path / "out.onnx"
    _, report = magr_onnx.optimize(tmp_path / "model.onnx", tmp_path / "inputs.npz", output=out, bits=3, effort="fast", exclude=["up"])
    first = out.read_bytes()
    out.unlink()
    eval(report.command, {"magr_onnx": magr_onnx})
    assert out.read_bytes() == first
    assert report.options["bits"] == 3
    assert report.options["exclude"] == ["up"]
    assert "progress" not in report.options


def test_options_of_layers_are_in_the_call() -> None:
    report = magr_onnx.optimize(graphs.chain(), samples(), effort="fast", layers=[{"match": "*down*", "bits": 8}]).report
    assert report.options["layers"] == [{"match": "*down*", "bits": 8}]
    assert "layers=[{'match': '*down*', 'bits': 8}]" in report.command


def test_numbers_of_numpy_are_numbers_in_the_call() -> None:
    given: dict[str, Any] = {"bits": np.int64(8), "alpha": np.float32(0.5)}
    layers = [{"match": "*down*", "bits": np.int64(3)}]
    report = magr_onnx.optimize(graphs.chain(), effort="fast", layers=layers, **given).report
    assert {name: report.options[name] for name in given} == {"bits": 8, "alpha": 0.5}
    assert report.options["layers"] == [{"match": "*down*", "bits": 3}]
    assert report.command.endswith("bits=8, alpha=0.5)")
    assert "[{'match': '*down*', 'bits': 3}]" in report.command


def test_calls_name_the_type_of_what_has_no_text() -> None:
    report = magr_onnx.optimize(graphs.chain(), samples(), effort="fast", progress=lambda *_: None).report
    assert report.command == "magr_onnx.optimize(model=<Model>, calibration=<list>, effort='fast')"
    assert report.options == {"model": "<Model>", "calibration": "<list>", "effort": "fast"}


def test_defaults_that_are_spelled_out_are_not_in_the_call() -> None:
    given: dict[str, Any] = {"validation_data": None, "batch_size": 16, "include": (), "mask": "auto"}
    report = magr_onnx.optimize(graphs.chain(), samples(), effort="fast", **given).report
    assert report.command == "magr_onnx.optimize(model=<Model>, calibration=<list>, effort='fast')"
    report = magr_onnx.optimize(graphs.chain(), samples(), effort="fast", batch_size=8, mask=None).report
    assert report.command.endswith("mask=None, batch_size=8, effort='fast')")


def test_reports_of_the_command_line(tmp_path: Path) -> None:
    onnx.save(proto(graphs.chain()), tmp_path / "m.onnx")
    done = run("optimize", "m.onnx", "-o", "o.onnx", "-q", "--report", "r.html", "--report", "r.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = Report.load(tmp_path / "r.json")
    assert report.command == "onnx-magr optimize m.onnx -o o.onnx -q --report r.html --report r.json"
    assert (tmp_path / "r.html").read_text() == report.to_html()
    (tmp_path / "again.toml").write_text(report.recipe)
    first = (tmp_path / "o.onnx").read_bytes()
    (tmp_path / "o.onnx").unlink()
    assert run("optimize", "--recipe", "again.toml", "-q", cwd=tmp_path).returncode == 0
    assert (tmp_path / "o.onnx").read_bytes() == first
    again = run("report", "r.json", "-o", "again.html", cwd=tmp_path)
    assert again.stdout == "again.html\n"
    assert (tmp_path / "again.html").read_text() == report.to_html()
    both = run("report", "r.json", "r.json", cwd=tmp_path)
    assert both.stdout == "r_r.html\n"
    assert "onnx-magr comparison" in (tmp_path / "r_r.html").read_text()


def test_the_page_is_opened_when_asked_for(reports: dict[str, Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reports["fast"].save(tmp_path / "r.json")
    browser = tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\necho "$1" > {tmp_path}/opened\n')
    browser.chmod(0o755)
    monkeypatch.setenv("BROWSER", str(browser))
    done = run("report", "r.json", "--open", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "opened").read_text().strip() == (tmp_path / "r.html").as_uri()


def test_several_models_of_a_folder_have_a_page_of_links(reports: dict[str, Report], tmp_path: Path) -> None:
    both = {"encoder.onnx": reports["fast"], "sub/decoder one.onnx": reports["integer"]}
    OptimizedFolder("in", "out", both, ()).save(tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    links = re.findall(r'href="([^"]+\.html)">([^<]+)<', text)
    assert [name for _, name in links] == list(both)
    for (link, _), report in zip(links, both.values(), strict=True):
        assert (tmp_path / urllib.parse.unquote(link)).read_text() == report.to_html()
    OptimizedFolder("in", "out", both, ()).save(tmp_path / "r.json")
    assert list(json.loads((tmp_path / "r.json").read_text())["models"]) == list(both)
    assert Report.load(tmp_path / "r.encoder.json") == reports["fast"]


def test_reports_of_models_in_a_folder_have_names_of_their_own(reports: dict[str, Report], tmp_path: Path) -> None:
    names = ["a.b.2.onnx", "a.b.onnx", "a/b.onnx", "a/b/2.onnx", "c.onnx"]
    folder = OptimizedFolder("in", "out", dict.fromkeys(names, reports["fast"]), ())
    folder.save(tmp_path / "r.json")
    found = sorted(p.name for p in tmp_path.iterdir())
    assert found == sorted(p.name for p in folder.files(tmp_path / "r.json"))
    assert len(found) == len(names) + 1
    assert {"r.a.b.json", "r.c.json"} <= set(found)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("optimize", "m.onnx", "--report", "r.txt"), 2, "report r.txt: give a name that ends in .html (a page) or .json (data)"),
        (("optimize", "m.onnx", "--report", "m.onnx"), 1, "would overwrite"),
        (("report", "m.onnx"), 1, "m.onnx: not JSON"),
        (("report", "none.json"), 1, "No such file"),
        (("report", "a.json", "b.json", "c.json"), 2, "3 reports given"),
        (("report", "a.json", "-o", "page.pdf"), 2, "page.pdf: give a name that ends in .html"),
    ],
)
def test_wrong_names_are_explained(arguments: tuple[str, ...], code: int, said: str, tmp_path: Path) -> None:
    onnx.save(proto(graphs.matmul()), tmp_path / "m.onnx")
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == code
    assert said in " ".join(done.stderr.split())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx"]


def test_without_the_extra_pages_are_refused_before_the_work_and_json_is_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    report = magr_onnx.optimize(graphs.matmul()).report
    monkeypatch.setitem(__import__("sys").modules, "vl_convert", None)
    with pytest.raises(OptionError, match=r"vl_convert not installed\): pip install 'onnx-magr\[report\]', or .*; JSON needs none"):
        magr_onnx.report.html.check([tmp_path / "r.html"])
    with pytest.raises(OptionError, match="a page needs the extra"):
        report.to_html()
    report.save(tmp_path / "r.json")
    assert Report.load(tmp_path / "r.json") == report


def test_a_report_that_cannot_be_written_is_explained(tmp_path: Path) -> None:
    report = magr_onnx.optimize(graphs.matmul()).report
    with pytest.raises(OutputError, match=r": folder .* does not exist"):
        report.save(tmp_path / "no" / "r.json")
    with pytest.raises(OptionError, match=r"ends in \.html"):
        report.save(tmp_path / "r.pdf")


def test_names_cannot_break_out_of_a_page() -> None:
    b = Builder()
    bad = "</script><script>alert(1)</script><b>&amp;"
    x = b.input("x", ["batch", 8])
    model = b.model(b.node("MatMul", [x, b.constant("w", random(8, 8))], bad), ["batch", 8])
    report = magr_onnx.optimize(model, include=["*"]).report
    assert report.layers[0].name == bad
    page = report.to_html()
    assert "<script>alert" not in page
    assert asdict(report)["layers"][0]["name"] == bad


def test_the_largest_weight_left_float_is_looked_at_first() -> None:
    report = magr_onnx.optimize(graphs.chain(), samples(), effort="fast").report
    small = Skip("small", "Gather", TableReason.UNASKED, bytes=report.bytes_after // 20)
    table = Skip("table", "Gather", TableReason.UNASKED, bytes=report.bytes_after // 2)
    codes = Skip("codes", "MatMulNBits", Reason.QUANTIZED, bytes=report.bytes_after)
    lstm = Skip("lstm", "LSTM", Reason.RECURRENT, bytes=report.bytes_after)

    def first(*skipped: Skip) -> list[str]:
        found = replace(report, skipped=skipped)
        return [f.text for f in summary.findings(found, summary.lines_of(found)) if "stays float" in f.text]

    assert first(small, codes) == []
    (text,) = first(small, table, codes)
    assert text.startswith("table (Gather) stays float:")
    assert 'embeddings="gather-block-quantized"' in text
    (text,) = [f.text for f in summary.findings(replace(report, skipped=(table,), command="onnx-magr optimize"), []) if "stays" in f.text]
    assert "--embeddings gather-block-quantized" in text
    (text,) = first(table, lstm)
    assert text.endswith('recurrent="dynamic-quantize-lstm" converts it.')
    (text,) = first(table, replace(lstm, reason=Reason.FUSED))
    assert text.endswith(f"Why: {Reason.FUSED}.")


def test_magr_alone_shows_the_largest_weights(reports: dict[str, Report]) -> None:
    report = reports["magr"]
    head, *lines = layer_table(report.layers)
    assert head.endswith("largest weight")
    for row, line in zip(report.layers, lines, strict=True):
        assert row.magr is not None
        before, after = (float(text) for text in line.split()[-3::2])
        assert (before, after) == pytest.approx((row.magr["max_before"], row.magr["max_after"]), rel=1e-3)
        assert after < before
    assert "largest weight" not in reports["nothing"].to_text() + reports["fast"].to_text()


def test_codes_that_no_pass_writes_are_told_of() -> None:
    text = "no pass of the pipeline writes codes: 2 weights are stored as the floats"
    pipeline = "quantize{method=rtn,bits=4}"
    made, report = magr_onnx.optimize(graphs.chain(), samples(), pipeline_text=pipeline)
    assert any(text in note and "emit-matmulnbits" in note for note in report.notes)
    assert {node.op_type for node in made.graph} == {node.op_type for node in graphs.chain().graph}
    report = magr_onnx.optimize(graphs.chain(), samples(), pipeline_text=f"{pipeline},emit-qdq").report
    assert not any("writes codes" in note for note in report.notes)


@pytest.mark.parametrize(
    ("options", "shown", "stored"),
    [
        ({"block_size": None}, ["channel", "channel"], [32, 64]),
        ({"block_size": 16}, ["16", "16"], [None, None]),
        ({"block_size": 512}, ["channel", "channel"], [32, 64]),
        ({"block_size": 128}, ["channel", "128"], [32, None]),
        ({"block_size": 48}, ["48", "48"], [16, 16]),
        ({"block_size": None, "format": "qdq"}, ["channel", "channel"], [None, None]),
        ({"format": "qdq-int8"}, ["channel", "channel"], [None, None]),
    ],
)
def test_the_block_is_what_shares_a_scale(options: dict[str, Any], shown: list[str], stored: list[int | None]) -> None:
    """What a kernel stores is another matter, of which there is one note."""
    b = Builder()
    x = b.node("Relu", [b.node("MatMul", [b.input("x", ["batch", 80]), b.constant("w", random(80, 288))], "first")])
    model = b.model(b.node("MatMul", [x, b.constant("v", random(288, 8))], "second"), ["batch", 8])
    result = magr_onnx.optimize(model, [graphs.feeds(model)], **options, quantizer="rtn", alpha=0.0)
    rows = result.report.layers
    assert [row.block for row in rows] == shown
    assert [line.split()[5] for line in layer_table(rows)[1:]] == shown
    assert [row.stored_block for row in rows] == stored
    notes = [note for note in result.report.notes if "their scales in the file again" in note]
    assert len(notes) == any(stored)
    if notes:
        held = sum(v.const_value.nbytes for n, v in result.model.graph.initializers.items() if "_scales" in n or "_zero_points" in n)
        needed = sum(row.n * -(-row.k // row.block_size) * 4.5 for row in rows)  # asymmetric, 4 bits
        said = re.search(r"about (\d+) bytes more", notes[0])
        assert said is not None
        assert abs(int(said[1]) - (held - needed)) <= sum(row.n for row in rows)  # zero points of a column fill whole bytes
        assert " or ".join(str(block) for block in dict.fromkeys(stored) if block) in notes[0]
