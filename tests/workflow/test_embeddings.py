"""Tables of embeddings: their grids, what is in the file, and what reads the same table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import magr_onnx
from magr_onnx.core.grid import minmax
from magr_onnx.core.types import WeightSpec
from magr_onnx.errors import MagrError, NonFiniteError, OptionError
from magr_onnx.models.zoo.trap import constant, model
from magr_onnx.passes.layer_passes.embeddings import quantize
from magr_onnx.passes.layers.embedding import find
from magr_onnx.passes.layers.selection import Selection
from magr_onnx.passes.layers.unconverted import LEAST
from magr_onnx.runtime.ort.session import Arithmetic, Session
from magr_onnx.workflow import verify_output
from tests.helpers import emitted_weight

Array = np.ndarray[Any, Any]
FORMS = [("gather-block-quantized", 4), ("gather-block-quantized", 8), ("dequantize", 8)]
IDS = np.array([[0, 5, -1], [1023, -1024, 7]])


def looked_up(table: Array, width: int | None = None) -> onnx.ModelProto:
    kind = {np.dtype(np.float32): "float", np.dtype(np.float16): "float16"}[table.dtype]
    text = f"g (int64[n, t] i) => ({kind}[n, t, {width or table.shape[1]}] y) {{ [emb] y = Gather(table, i) }}"
    return model(text, table=table)


@pytest.mark.parametrize("arithmetic", list(Arithmetic))
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(("form", "bits"), FORMS)
def test_rows_are_those_of_the_codes_in_every_arithmetic(form: str, bits: int, dtype: Any, arithmetic: Arithmetic, tmp_path: Path) -> None:
    table = constant("table", 1024, 72, dtype=dtype) * dtype(20)  # the last block of 32 is short
    path = tmp_path / "q.onnx"
    report = magr_onnx.optimize(looked_up(table), output=path, embeddings=form, embedding_bits=bits).report
    (row,) = report.layers
    assert (row.op, row.k, row.n, row.bits, row.block_size) == ("Gather", 1024, 72, bits, 32 if bits == 4 or form != "dequantize" else 72)
    assert report.verified == 1
    onnx.checker.check_model(str(path))
    written = emitted_weight(next(node for node in ir.load(path).graph if node.name == row.emitted))
    assert written is not None
    with Session(path, arithmetic=arithmetic) as session:
        (y,) = session.run({"i": IDS})
    assert y.dtype == dtype
    np.testing.assert_allclose(y, written[IDS].astype(dtype), rtol=2e-3 if dtype == np.float16 else 1e-5, atol=1e-5)
    error = float(np.linalg.norm(written - table.astype(np.float32)) / np.linalg.norm(table.astype(np.float32)))
    assert row.error == pytest.approx(error, rel=1e-4)
    assert error < {4: 0.1, 8: 0.01}[bits]
    assert (
        report.bytes_after < {4: 0.5 if dtype == np.float16 else 0.25, 8: 0.75 if dtype == np.float16 else 0.38}[bits] * report.bytes_before
    )


def test_searched_grids_beat_the_range_of_a_row() -> None:
    table = constant("table", 700, 96)
    spec = WeightSpec(4, 32)
    ours = np.linalg.norm(quantize(table, spec).dequantize().T - table)
    grid = minmax(np.ascontiguousarray(table.T), spec)
    theirs = np.linalg.norm(grid.weight(grid.codes(table.T)).dequantize().T - table)
    assert ours < 0.98 * theirs


def test_chunks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    table, spec = constant("table", 300, 40), WeightSpec(8, 32)
    whole = quantize(table, spec)
    monkeypatch.setattr("magr_onnx.passes.layer_passes.embeddings.CHUNK", 7 * 40)
    parts = quantize(table, spec)
    for a, b in ((whole.codes, parts.codes), (whole.scales, parts.scales), (whole.zero_points, parts.zero_points)):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("form", "bits"), FORMS)
def test_gathers_of_one_table_share_its_codes(form: str, bits: int) -> None:
    proto = model(
        """g (int64[n] i, int64[m] j) => (float[n, 64] y, float[m, 64] z) {
            y = Gather(table, i)
            z = Gather(table, j)
        }""",
        table=constant("table", 1024, 64),
    )
    found, report = magr_onnx.optimize(proto, embeddings=form, embedding_bits=bits)
    assert len({row.name for row in report.layers}) == len(report.layers) == report.verified == 2
    assert "table" not in found.graph.initializers
    assert sum(v.const_value.nbytes for v in found.graph.initializers.values() if v.const_value is not None) < 1024 * 64 * (bits / 8 + 0.25)


def test_layers_behind_a_quantized_table_are_calibrated_on_what_it_gives() -> None:
    proto = model(
        "g (int64[n, t] i) => (float[n, t, 24] y) { [emb] h = Gather(table, i) [fc] y = MatMul(h, w) }",
        table=constant("table", 1024, 64) * np.float32(16),
        w=constant("w", 64, 24),
    )
    rng = np.random.default_rng(0)
    data = [{"i": rng.integers(0, 1024, (8, 16))} for _ in range(8)]
    for option, expected in (("none", False), ("gather-block-quantized", True)):
        report = magr_onnx.optimize(proto, data, embeddings=option, embedding_bits=4 if expected else None).report
        assert (next(row for row in report.layers if row.name == "fc").feedback is not None) == expected


def test_small_tables_and_gathers_of_other_things_are_not_spoken_of() -> None:
    proto = model(
        """g (int64[n] i, float[n, 8] x) => (float[n, 64] y, int64[1] s, float[m, 8] z) {
            y = Gather(small, i)
            shape = Shape(x)
            s = Gather(shape, zero)
            z = Gather(x, i)
        }""",
        small=constant("small", LEAST // 64 - 1, 64),
        zero=np.array([0]),
    )
    assert find(ir.from_proto(proto)) == ([], [])


def test_tables_that_cannot_be_converted_say_why() -> None:
    proto = model(
        """g (int64[n] i, float[1024, 64] given) => (float[n, 64] y, float[1024, 64] shown) {
            [shown_one] y = Gather(shown, i)
            [overridable] a = Gather(given, i)
            [double] b = Gather(wide, i)
            [cube] c = Gather(cube, i)
            [columns] d = Gather<axis = 1>(table, i)
        }""",
        shown=constant("table", 1024, 64),
        given=constant("table", 1024, 64),
        wide=constant("table", 1024, 64, dtype=np.float64),
        cube=constant("cube", 16, 64, 64),
        table=constant("table", 1024, 64),
    )
    tables, skips = find(ir.from_proto(proto))
    assert tables == []
    assert {s.name: str(s.reason) for s in skips} == {
        "shown_one": "weight is a graph output",
        "overridable": "weight is a graph input that a caller may override",
        "double": "weight type is not float32 or float16",
        "cube": "weight is not two-dimensional",
        "columns": "rows are not gathered along axis 0",
    }
    found = ir.from_proto(looked_up(constant("table", 1024, 64)))
    assert find(found, Selection(exclude=["tab*"]))[1][0].reason == "excluded by name"
    assert [t.name for t in find(found, Selection(["emb"]))[0]] == ["emb"]


def test_options_that_cannot_be() -> None:
    proto = looked_up(constant("table", 1024, 64))
    for options, message in (
        ({"embeddings": "dequantize", "embedding_bits": 4}, "dequantize has 8 bits"),
        ({"embeddings": "gather-block-quantized", "embedding_bits": 3}, "bits=3 is not supported"),
        ({"embeddings": "tables"}, "embeddings='tables' is not known"),
        ({"embedding_bits": 8}, "embedding_bits=8 needs embeddings"),
    ):
        with pytest.raises(OptionError, match=message):
            magr_onnx.optimize(proto, **options)  # type: ignore[arg-type]


def test_a_table_with_nan_is_named() -> None:
    table = constant("table", 1024, 64)
    table[3, 4] = np.nan
    with pytest.raises(NonFiniteError, match="weight of emb"):
        magr_onnx.optimize(looked_up(table), embeddings="dequantize")


@pytest.mark.parametrize(("form", "bits"), FORMS)
def test_a_table_that_is_not_what_was_chosen_is_refused(form: str, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    read = verify_output.iterate_weights

    def tampered(found: ir.Model, outputs: Any) -> Any:
        codes = next(v for name, v in found.graph.initializers.items() if name.endswith(f"_q{bits}"))
        array = codes.const_value.numpy().copy()  # type: ignore[union-attr]
        array[1, 1] ^= 1
        codes.const_value = ir.tensor(array)
        return read(found, outputs)

    monkeypatch.setattr(verify_output, "iterate_weights", tampered)
    with pytest.raises(MagrError, match="not those that were chosen"):
        magr_onnx.optimize(looked_up(constant("table", 1024, 64)), embeddings=form, embedding_bits=bits)
