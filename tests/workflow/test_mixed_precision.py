"""Mixed precision under a budget: sizes against written files, sensitivities, budgets kept by real files, the report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from typer.testing import CliRunner

import magr_onnx
from magr_onnx.cli.app import app
from magr_onnx.config.plans import build_pipeline
from magr_onnx.core.layer import LayerProblem
from magr_onnx.core.types import ActivationGrid, Choice, DynamicRange, LayerStats
from magr_onnx.errors import CalibrationError, OptionError
from magr_onnx.model_io import writing
from magr_onnx.model_io.writing import tensor_bytes
from magr_onnx.models import bundled
from magr_onnx.passes import LinearLayer, Plan, find, run_layers
from magr_onnx.passes.instrument.weight_inputs import with_weight_inputs
from magr_onnx.report.reasons import Reason
from magr_onnx.runtime.calibration import moments
from magr_onnx.runtime.calibration.context import CalibrationContext, GridChoice
from magr_onnx.runtime.data.sources import Batches, open_data
from magr_onnx.runtime.measure import sensitivity
from magr_onnx.runtime.measure.loss import COSINE, KL, Reference
from magr_onnx.runtime.ort.session import Session
from magr_onnx.workflow import mixed_precision, size_model
from magr_onnx.workflow.goal import goal_of
from magr_onnx.workflow.optimize import Optimized
from tests import graphs
from tests.graphs import Array, Builder, correlated, feeds, random

Feeds = dict[str, Array]


def unequal(output: str = "y") -> ir.Model:
    """One layer that makes the output, and two whose share in it is small: the first must be spared."""
    b = Builder()
    x = b.input("x", ["batch", 64])
    strong = b.node("MatMul", [x, b.constant("w_strong", random(64, 96))], "strong")
    weak = b.node("MatMul", [x, b.constant("w_weak", random(64, 96, seed=1))], "weak")
    faint = b.node("MatMul", [x, b.constant("w_faint", random(64, 96, seed=2))], "faint")
    weak = b.node("Mul", [weak, b.constant("less", np.float32(0.05))])
    faint = b.node("Mul", [faint, b.constant("least", np.float32(0.002))])
    return b.model(b.node("Add", [b.node("Add", [strong, weak]), faint]), ["batch", 96], output)


def tied(gathered: bool = False) -> ir.Model:
    """Two layers with one weight, which a Gather may read too."""
    b = Builder()
    x = b.input("x", ["batch", 64])
    weight = b.constant("w", random(64, 64))
    once = b.node("MatMul", [x, weight], "once")
    value = b.node("MatMul", [b.node("Relu", [once]), weight], "twice")
    if gathered:
        value = b.node("Add", [value, b.node("Gather", [weight, b.constant("row", np.int64(3))])])
    return b.model(value, ["batch", 64])


def batches(model: ir.Model, count: int = 8, rows: int = 64) -> list[Feeds]:
    stacked = feeds(model, count * rows)
    return [{name: array[i * rows : (i + 1) * rows] for name, array in stacked.items()} for i in range(count)]


def data_for(model: ir.Model, count: int = 8) -> Batches:
    with Session(model) as session:
        return open_data(batches(model, count), session.inputs)


# --- Sizes --------------------------------------------------------------------------------------------------------------------


def statistics(layer: Any) -> LayerStats:
    x = correlated(200, layer.k)
    return LayerStats((x.T @ x / 200).astype(np.float64), x.mean(axis=0).astype(np.float64), 200, x.mean(axis=0), ActivationGrid(0.1, 120))


@pytest.mark.parametrize("kind", [np.float32, np.float16])
@pytest.mark.parametrize(
    "options",
    [
        *({"bits": bits, "block_size": block} for bits in (2, 4, 8) for block in (16, 128, None)),
        {"bits": 3, "symmetric": True},
        {"bits": 4, "bias": "none"},
        {"format": "qdq", "bits": 4},
        {"format": "qdq", "bits": 8, "block_size": 64, "symmetric": True},
        {"format": "qdq-int8"},
        {"format": "dynamic-int8"},
        {"bits": 4, "low_rank": 16},
        {"bits": 2, "low_rank": 1000},  # more than the layer has
        {"format": "qdq", "bits": 4, "low_rank": 5, "bias": "none"},
    ],
    ids=str,
)
def test_size_of_a_choice_is_that_of_the_file(options: dict[str, Any], kind: Any, tmp_path: Path) -> None:
    plan = build_pipeline(quantizer="rtn", alpha=0, **options)
    source = graphs.matmul(160, 72, dtype=kind)
    plan.prepare(source)
    (name,) = [layer.name for layer in find(source)[0]]
    real = source.clone()
    run_layers(plan, find(real)[0], statistics, lambda solved: None)
    blank = size_model.converted(source, {name: plan})
    assert tensor_bytes(blank) == tensor_bytes(real)
    assert size_model.changes(source, [[name]], plan) == [tensor_bytes(real) - tensor_bytes(source)]
    assert writing.save(blank, tmp_path / "blank.onnx") == writing.save(real, tmp_path / "real.onnx")


@pytest.mark.parametrize("options", [{"format": "qdq-int8", "quantize_outputs": True}, {"format": "dynamic-int8"}], ids=str)
def test_grids_of_activations_count(options: dict[str, Any], tmp_path: Path) -> None:
    """Scale and zero point of a product, and the bounds an input is clipped to, are constants of the file."""
    plan = build_pipeline(quantizer="rtn", alpha=0, **options)
    source = graphs.matmul(160, 72)
    plan.prepare(source)
    layer = find(source)[0][0]
    dynamic = options["format"] == "dynamic-int8"
    activation = DynamicRange(-1.0, 1.0) if dynamic else ActivationGrid(0.1, 120)
    product = ActivationGrid(0.2, 100)
    grids = {layer.reads: GridChoice(activation), "y": GridChoice(product)}
    real = source.clone()

    def complete(layer: LinearLayer, problem: LayerProblem) -> LayerProblem:
        return replace(problem, activation=activation, output_grid=product)

    run_layers(plan, find(real)[0], statistics, lambda solved: None, complete)
    assert tensor_bytes(size_model.converted(source, {layer.name: plan}, grids)) == tensor_bytes(real)
    assert size_model.changes(source, [[layer.name]], plan, grids) == [tensor_bytes(real) - tensor_bytes(source)]


@pytest.mark.parametrize("gathered", [False, True])
def test_shared_weights_leave_the_file_with_the_last_layer(gathered: bool) -> None:
    model = tied(gathered)
    plan = build_pipeline(bits=4)
    codes = 64 * (32 + 2 * 4 + 1)  # codes, two scales, zero points, stored once
    biases = 2 * 64 * 4
    (change,) = size_model.changes(model, [["once", "twice"]], plan)
    assert change == codes + biases - (0 if gathered else 4 * 64 * 64)


def test_weights_in_constant_nodes_count() -> None:
    model = graphs.matmul_constant(64, 64)
    assert tensor_bytes(model) == 4 * 64 * 64
    assert size_model.changes(model, [["layer"]], build_pipeline(bits=4)) == [64 * (32 + 8 + 1) + 64 * 4 - 4 * 64 * 64]


# --- Sensitivities ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", graphs.FORMS)
def test_overridden_weights_are_used(form: str) -> None:
    """A session fed a layer's own weights computes what it computes without; fed twice the weights and bias, twice that."""
    model = graphs.FORMS[form]()
    (layer,) = find(model)[0]
    copy, slots = with_weight_inputs(model, [layer.name])
    batch = feeds(model)
    bias = layer.read_bias()
    with Session(model) as a, Session(copy) as b:
        (expected,) = a.run(batch)
        np.testing.assert_allclose(b.run(batch)[0], expected, atol=1e-4)
        twice = slots[layer.name].feeds(2 * layer.read(), None if bias is None else 2 * bias)
        np.testing.assert_allclose(b.run({**batch, **twice})[0], 2 * expected, atol=2e-4)


def measured(model: ir.Model, choices: dict[Choice, Plan]) -> tuple[dict[str, sensitivity.Sensitivity], Reference]:
    split = sensitivity.Split.of(data_for(model))
    return sensitivity.measure(
        model, find(model)[0], choices, mixed_precision.references_of(choices), split, CalibrationContext(split.rest)
    )


@pytest.mark.parametrize(("output", "metric"), [("y", COSINE), ("logits", KL)])
def test_the_fragile_layer_comes_first(output: str, metric: str) -> None:
    choices = mixed_precision.choices_of({"block_size": 32})
    found, reference = measured(unequal(output), choices)
    assert reference.metric == metric
    for choice in choices:
        strong, weak, faint = (found[name].loss(choice) for name in ("strong", "weak", "faint"))
        assert strong > 50 * weak > 1000 * faint > 0
    for one in found.values():
        assert one.loss(Choice(2, 32)) > 5 * one.loss(Choice(4, 32)) > 25 * one.loss(Choice(8, 32))


def test_predictions_agree_with_measurements() -> None:
    """The loss of choices that were not measured, from those that were: one layer quantized by the pipeline, the loss measured."""
    model = unequal("logits")
    choices = mixed_precision.choices_of({})
    found, _ = measured(model, choices)
    split = sensitivity.Split.of(data_for(model))
    stats = moments.collect(model, find(model)[0], CalibrationContext(split.fit)).stats
    with Session(model) as session:
        reference = Reference(session, split.effects)
    for choice in (Choice(2, 128), Choice(4, 16), Choice(4, 64), Choice(8, 64)):
        work = model.clone()
        layer = next(layer for layer in find(work)[0] if layer.name == "strong")
        run_layers(choices[choice], [layer], lambda layer: stats[layer.reads], lambda solved: None)
        with Session(work) as session:
            assert found["strong"].loss(choice) == pytest.approx(reference.loss(session.run), rel=0.5)


def test_loss_between_references_is_a_power_law() -> None:
    four, three, eight = Choice(4, 32), Choice(3, 32), Choice(8, 32)
    one = sensitivity.Sensitivity({four: 1e-4, three: 1e-3, eight: 1e-6, Choice(2, 32): 4e-2}, ((1e-4, 1e-6), (1e-2, 1e-3)))
    assert one.loss(four) == pytest.approx(1e-6)
    assert one.loss(three) == pytest.approx(10**-4.5)
    assert one.loss(eight) == pytest.approx(1e-8)
    assert one.loss(Choice(2, 32)) == pytest.approx(4e-3)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 9])
def test_parts_of_the_data(count: int) -> None:
    every = [{"x": np.full((1, 1), i, np.float32)} for i in range(count)]
    split = sensitivity.Split.of(Batches(count, "batches", lambda: iter(every), str))
    fit, effects, held_out, rest = ({float(b["x"][0, 0]) for b in part} for part in (split.fit, split.effects, split.held_out, split.rest))
    assert fit
    assert effects
    assert held_out
    assert fit | effects == rest
    if count >= 2:
        assert not rest & held_out
        assert len(rest | held_out) == count
    if count >= 3:
        assert not fit & effects


# --- Budgets ------------------------------------------------------------------------------------------------------------------


def written(model: ir.Model, tmp_path: Path, calibration: Sequence[Feeds] | None = None, **options: Any) -> tuple[Optimized, int, int]:
    """The result, and the bytes of the source and of the written file."""
    source, output = tmp_path / "model.onnx", tmp_path / "out.onnx"
    ir.save(model, source)
    result = magr_onnx.optimize(source, calibration or batches(model), output=output, **options)
    return result, source.stat().st_size, output.stat().st_size


@pytest.mark.parametrize("percent", [20, 25, 40, 70])
def test_target_size_is_kept_by_the_file(percent: int, tmp_path: Path) -> None:
    result, before, after = written(unequal(), tmp_path, target_size=f"{percent}%")
    assert after <= percent / 100 * before
    assert after > 0.8 * percent / 100 * before  # and what may be used is
    assert after == result.report.bytes_after
    row = {name: r for r in result.report.assignment.rows for name in r.layers}
    assert row["strong"].bytes >= row["weak"].bytes >= row["faint"].bytes


LOW_RANK: dict[str, dict[str, Any]] = {
    "size": {"target_size": "60%", "low_rank": 16},
    "qdq": {"target_size": "60%", "low_rank": 8, "format": "qdq"},
    "one layer": {"target_size": "60%", "layers": [{"match": "weak", "bits": 4, "low_rank": 32}]},
    "preset": {"target_size": "60%", "preset": "llm-int2"},
    "loss": {"max_loss": "2%", "low_rank": 16},
}


@pytest.mark.parametrize("kind", LOW_RANK)
def test_low_rank_branches_are_part_of_the_size(kind: str, tmp_path: Path) -> None:
    result, before, after = written(unequal(), tmp_path, **LOW_RANK[kind])
    assignment = result.report.assignment
    assert any(row.low_rank for row in result.report.layers)
    assert after <= assignment.attempts[-1].bytes <= after + 2 * mixed_precision.STAMP
    if "target_size" in LOW_RANK[kind]:
        assert after <= 0.6 * before
        assert assignment.met


def test_a_size_that_low_rank_branches_exceed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="the smallest possible is"):
        written(unequal(), tmp_path, target_size="20%", low_rank=64)


def test_a_byte_less_than_a_plan_needs_is_another_plan() -> None:
    """The nodes and names of layers count, which what a layer costs does not have."""
    model = unequal()
    choices = mixed_precision.choices_of({"block_size": 32})
    source = mixed_precision.Source(model, find(model)[0], tensor_bytes(model), file=True, stamp=0)

    def planned(size: int) -> int:
        goal = goal_of({"target_size": f"{size} B"})
        assert goal is not None
        allocation = mixed_precision.Allocation(goal, source, choices)
        allocation.solve(lambda name, choice: 4.0 ** -(choice.bits or 0) * (10 if name == "strong" else 1))
        return source.size(allocation.assigned())

    for size in (15_000, 20_000, 30_000, 40_000):
        largest = planned(size)
        assert largest <= size
        assert planned(largest) == largest
        assert planned(largest - 1) < largest


def test_in_memory_tensors_count() -> None:
    model = unequal()
    result = magr_onnx.optimize(model, batches(model), target_size="20%")
    assert tensor_bytes(result.model) <= 0.2 * tensor_bytes(model)


@pytest.mark.parametrize(("text", "size"), [("20 kB", 20_000), ("19000B", 19_000), ("0.02MB", 20_000)])
def test_sizes_in_bytes(text: str, size: int, tmp_path: Path) -> None:
    assert written(unequal(), tmp_path, target_size=text)[2] <= size


def test_the_size_of_a_uniform_model(tmp_path: Path) -> None:
    uniform = written(unequal(), tmp_path, bits=4)[2]
    result, _, after = written(unequal(), tmp_path, target_size="4bit")
    assert 0.9 * uniform < after <= uniform + mixed_precision.STAMP + 200
    assert len({r.label for r in result.report.assignment.rows}) > 1


def test_what_stays_float_has_a_reason(tmp_path: Path) -> None:
    result, _, _ = written(unequal(), tmp_path, target_size="50%")
    assert "strong" in [s.name for s in result.report.skipped if s.reason == Reason.BUDGET.value]
    assert [layer.name for layer in find(result.model)[0]] == [s.name for s in result.report.skipped if s.reason == Reason.BUDGET.value]
    assert result.report.verified == len(result.report.layers)


def test_an_impossible_size_names_the_smallest(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"the smallest possible is ([\d,]+)") as error:
        written(unequal(), tmp_path, target_size="5%")
    least = int(str(error.value).split("smallest possible is ")[1].split(" ")[0].replace(",", ""))
    assert not (tmp_path / "out.onnx").exists()
    assert written(unequal(), tmp_path, target_size=f"{least} B")[2] <= least
    with pytest.raises(OptionError, match="smallest possible"):
        written(unequal(), tmp_path, target_size=f"{least - 1} B")


@pytest.mark.parametrize("output", ["y", "logits"])
def test_max_loss_is_kept_when_measured_again(output: str, tmp_path: Path) -> None:
    model = unequal(output)
    every = batches(model)
    sizes_found = []
    for percent in (1, 0.01):
        result, _, after = written(model, tmp_path, every, max_loss=f"{percent}%")
        found = result.report.assignment
        with Session(model) as session, Session(tmp_path / "out.onnx") as quantized:
            held = open_data([every[3], every[7]], session.inputs)
            loss = Reference(session, held).loss(quantized.run)
        assert found.met
        assert loss <= percent / 100
        assert loss == pytest.approx(found.attempts[-1].measured, rel=1e-3)
        sizes_found.append(after)
    assert sizes_found[0] < sizes_found[-1]


def test_a_missed_loss_is_tried_again_and_told() -> None:
    """A allocation whose prediction is ten times too low asks for a tenth of the loss next."""
    model = unequal()
    choices = mixed_precision.choices_of({"block_size": 32})
    source = mixed_precision.Source(model, find(model)[0], tensor_bytes(model), False, 0)
    goal = goal_of({"max_loss": "0.01"})
    assert goal is not None
    allocation = mixed_precision.Allocation(goal, source, choices)
    allocation.solve(lambda name, choice: 0.1 * 4.0 ** -(choice.bits or 0) * (10 if name == "strong" else 1))
    bytes_before = source.size(allocation.assigned())
    assert not allocation.accepts(0.1)
    assert source.size(allocation.assigned()) > bytes_before
    assert not allocation.accepts(0.05)
    assert allocation.accepts(0.02)  # the last attempt
    report = allocation.report(COSINE, "nothing")
    assert not report.met
    assert [a.measured for a in report.attempts] == [0.1, 0.05, 0.02]
    assert "THE GOAL IS MISSED" in "\n".join(report.lines())


@pytest.mark.parametrize("options", [{"format": "qdq"}, {"format": "qdq-int8"}, {"format": "dynamic-int8", "target": "x86-avx2"}], ids=str)
def test_formats(options: dict[str, Any], tmp_path: Path) -> None:
    result, before, after = written(unequal("logits"), tmp_path, target_size="60%", **options)
    assert after <= 0.6 * before
    found = result.report.assignment
    assert {r.bits for r in found.rows} <= ({4, 8, None} if options["format"] == "qdq" else {8, None})
    assert found.attempts[-1].measured < 0.05
    assert result.report.layers
    if "target" in options:
        assert result.report.proof.proved == len(result.report.layers)


def test_accumulators_are_honoured(tmp_path: Path) -> None:
    result, _, _ = written(unequal(), tmp_path, target_size="30%", accumulator_bits=17)
    assert result.report.proof.proved == len(result.report.layers)
    for choice in mixed_precision.choices_of({"accumulator_bits": 17}):
        assert (choice.bits, choice.block_size) in {(4, 16), (4, 32), (4, 64), (2, 32), (2, 64), (2, 128)}


@pytest.mark.parametrize("percent", [25, 150])
def test_error_feedback_follows_the_choice(percent: int, tmp_path: Path) -> None:
    """With room for everything no layer is left to quantize, in stages or not."""
    result, before, after = written(graphs.chain(), tmp_path, target_size=f"{percent}%", feedback=True)
    assert after <= percent / 100 * before
    assert [bool(layer.feedback) for layer in result.report.layers] == [False, True, True][
        : len(result.report.layers)
    ]  # the first reads the input
    assert (percent == 150) == (not result.report.layers)


def test_command_line(tmp_path: Path) -> None:
    model = unequal()
    ir.save(model, tmp_path / "model.onnx")
    np.savez(tmp_path / "inputs.npz", **feeds(model, 128))
    arguments = ["optimize", str(tmp_path / "model.onnx"), "--calibration", str(tmp_path / "inputs.npz"), "--target-size", "25%", "--json"]
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["assignment"]["goal"] == "target size 25%"
    assert (tmp_path / "model.magr.onnx").stat().st_size <= 0.25 * (tmp_path / "model.onnx").stat().st_size


def test_half_precision_and_shared_weights(tmp_path: Path) -> None:
    result, before, after = written(graphs.matmul_bias(64, 96, dtype=np.float16), tmp_path, target_size="45%")
    assert after <= 0.45 * before
    result, before, after = written(tied(), tmp_path, target_size="60%")
    assert after <= 0.6 * before
    (row,) = result.report.assignment.rows
    assert row.layers == ("once", "twice")
    assert len({layer.bits for layer in result.report.layers}) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_size": "20%", "max_loss": "1%"}, "not both"),
        ({"target_size": "20%", "bits": 4}, "the budget chooses the bits"),
        ({"target_size": "small"}, "give a share of the source"),
        ({"target_size": "0%"}, "give a share of the source"),
        ({"max_loss": "-1"}, "above 0"),
        ({"max_loss": "0"}, "above 0"),
        ({"max_loss": "5"}, "max_loss='5': give a loss above 0 and at most 1, as '1%' or '0.01': of the mean KL divergence in nats"),
        ({"max_loss": "500%"}, "at most 1"),
        ({"target_size": "3bit"}, "there are 2bit, 4bit, 8bit"),
        ({"target_size": "2bit", "format": "qdq"}, "there are 4bit, 8bit"),
        ({"target_size": "20%", "block_size": 24}, "multiple of 16"),
    ],
    ids=str,
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    model = unequal()
    with pytest.raises(OptionError, match=message):
        magr_onnx.optimize(model, batches(model), **options)


def test_budgets_need_data() -> None:
    model = unequal()
    with pytest.raises(OptionError, match="needs calibration data"):
        magr_onnx.optimize(model, target_size="20%")
    with pytest.raises(CalibrationError, match="at least two batches"):
        magr_onnx.optimize(model, batches(model, 1), max_loss="1%")


# --- The bundled model --------------------------------------------------------------------------------------------------------


def divergence(path: Path) -> float:
    """Mean KL divergence from the float model on held-out text that no choice was made with."""
    with np.load(bundled.HELD_OUT) as file:
        ids = file["input_ids"][:64]
    with Session(bundled.MODEL) as session, Session(path) as quantized:
        reference = Reference(session, open_data([{"input_ids": part} for part in np.split(ids, 4)], session.inputs))
        assert reference.metric == KL
        return reference.loss(quantized.run)


@pytest.fixture(scope="module")
def bundled_mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Optimized, Path, int]:
    folder = tmp_path_factory.mktemp("mixed")
    with np.load(bundled.CALIBRATION) as file:
        data = [{"input_ids": part} for part in np.split(file["input_ids"][:32], 4)]  # a quarter of it, for time
    uniform = magr_onnx.optimize(bundled.MODEL, data, output=folder / "uniform.onnx", effort="fast").report.bytes_after
    result = magr_onnx.optimize(bundled.MODEL, data, output=folder / "mixed.onnx", effort="fast", target_size=f"{uniform} B")
    return result, folder, uniform


@pytest.mark.long
def test_mixed_beats_uniform_at_its_size(bundled_mixed: tuple[Optimized, Path, int]) -> None:
    result, folder, uniform = bundled_mixed
    assert (folder / "mixed.onnx").stat().st_size == result.report.bytes_after <= uniform
    assert divergence(folder / "mixed.onnx") < 0.97 * divergence(folder / "uniform.onnx")  # seen: 0.91


@pytest.mark.long
def test_the_report_has_the_assignment(bundled_mixed: tuple[Optimized, Path, int]) -> None:
    report = bundled_mixed[0].report
    text = report.to_text()
    assert max(map(len, text.replace(str(bundled.MODEL), "").replace(str(report.output), "").splitlines())) <= 80
    for word in ("mixed precision: target size", "KL divergence", "predicted", "measured", "all layers", "@"):
        assert word in text
    found = json.loads(report.to_json())["assignment"]
    assert len(found["rows"]) == 21
    assert {(r["bits"], r["block_size"]) for r in found["rows"]} == {(r.bits, r.block_size) for r in report.layers}
    curve = [(p["bytes"], p["loss"]) for p in found["curve"]]
    assert curve == sorted(curve, key=lambda p: (p[0], -p[1]))
    assert [p["label"] for p in found["uniform"]][:1] == ["2 bits, block 32"]
    assert found["attempts"][-1]["measured"] == pytest.approx(found["attempts"][-1]["predicted"], rel=0.5)
    assert abs(found["attempts"][-1]["bytes"] - report.bytes_after) <= mixed_precision.STAMP + 200
    assert bundled_mixed[0].model.metadata_props["onnx_magr.mixed"].startswith("target size")


def test_options_of_layers_in_the_metadata_count_too(tmp_path: Path) -> None:
    """Many tables of options are kilobytes of metadata in the file."""
    b = Builder()
    value = b.input("x", ["n", 64])
    for i in range(6):
        value = b.node("MatMul", [value, b.constant(f"w{i}", random(64, 64, seed=i))], f"layer{i}")
    tables = [{"match": ["layer0", "*ayer0", "l?yer0", "la?er0", "lay?r0"], "bits": 8, "block_size": 32}] * 60
    data = {"x": random(64, 64)}
    path = tmp_path / "out.onnx"
    report = magr_onnx.optimize(b.model(value, ["n", 64]), data, effort="fast", target_size="24000B", layers=tables, output=path).report
    assert report.assignment is not None
    assert path.stat().st_size <= report.assignment.attempts[-1].bytes <= 24000
