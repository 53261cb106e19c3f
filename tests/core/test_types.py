"""The data types: statistics add up, specifications refuse nonsense."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from magr_onnx.core.checks import check_finite
from magr_onnx.core.types import BITS, LayerStats, QuantizedWeight, WeightSpec
from magr_onnx.errors import NonFiniteError, OptionError
from tests.helpers import Array, activations, gram_of, random_quantized


def stats_of(x: Array) -> LayerStats:
    return LayerStats(gram_of(x), x.mean(axis=0), len(x))


def test_statistics_of_parts_add_to_those_of_the_whole() -> None:
    x = activations(100, 12)
    whole, parts = stats_of(x), stats_of(x[:70]).combine(stats_of(x[70:]))
    assert parts.rows == 100
    np.testing.assert_allclose(parts.gram, whole.gram, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(parts.mean, whole.mean, rtol=1e-12, atol=1e-12)


def test_data_free_statistics_weigh_nothing() -> None:
    free, real = LayerStats.data_free(12), stats_of(activations(100, 12))
    assert free.is_data_free
    assert free.combine(free).is_data_free
    for total in (free.combine(real), real.combine(free)):
        assert total.rows == 100
        np.testing.assert_array_equal(total.gram, real.gram)
        np.testing.assert_array_equal(total.mean, real.mean)


def test_memo_computes_once_and_is_not_shared() -> None:
    stats = LayerStats.data_free(3)
    calls: list[int] = []

    def make() -> int:
        calls.append(1)
        return len(calls)

    assert [stats.memo("a", make), stats.memo("a", make), stats.memo("b", make)] == [1, 1, 2]
    assert LayerStats.data_free(3).memo("a", make) == 3


def test_objective_gram() -> None:
    x = activations(100, 12)
    stats = stats_of(x)
    assert stats.objective_gram(centred=False) is stats.gram
    centred = stats.objective_gram(centred=True)
    np.testing.assert_allclose(centred, np.cov(x.T, bias=True), rtol=1e-9, atol=1e-9)
    free = LayerStats.data_free(12)
    assert free.objective_gram(centred=True) is free.gram


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("dead", [0, 3, 12])
def test_regularized_adds_four_rows_of_uncorrelated_inputs_of_the_median_active_power(centred: bool, dead: int) -> None:
    x = activations(20, 12, tail=2.0)
    x[:, :dead] = 0
    stats = stats_of(x)
    rows = x - x.mean(axis=0) if centred else x
    power = sorted(float(np.mean(rows[:, i] ** 2)) for i in range(dead, 12))
    median = 1.0 if dead == 12 else (power[(len(power) - 1) // 2] + power[len(power) // 2]) / 2
    expected = rows.T @ rows / 20 + np.diag(np.full(12, median * 4 / 20))
    regularized = stats.regularized(centred)
    np.testing.assert_allclose(regularized, expected, rtol=1e-9, atol=1e-12)
    assert stats.regularized(centred) is regularized  # computed once: siblings share it
    np.testing.assert_allclose(stats.gram, x.T @ x / 20, rtol=1e-12)  # and the statistics are as they were
    assert np.linalg.eigvalsh(regularized)[0] > 0.9 * median * 4 / 20  # fewer rows than inputs, and yet it can be inverted


def test_without_data_inputs_are_uncorrelated_around_a_mean_that_all_share() -> None:
    """A quarter of their variance is the square of their mean, and errors are measured without it."""
    free = LayerStats.data_free(12)
    np.testing.assert_array_equal(free.gram, np.eye(12))
    np.testing.assert_array_equal(free.regularized(centred=True), np.eye(12) + 0.25)


def test_statistics_outside_a_fold_are_those_of_the_other_rows() -> None:
    x = activations(100, 12)
    folds = (x[70:], x[:30])
    stats = replace(stats_of(x), folds=tuple(map(stats_of, folds)))
    for index, rest in enumerate((x[:70], x[30:])):
        outside = stats.without(index)
        assert (outside.rows, outside.folds) == (len(rest), ())
        np.testing.assert_allclose(outside.gram, gram_of(rest), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(outside.mean, rest.mean(axis=0), rtol=1e-9, atol=1e-12)
        assert stats.without(index) is outside


@pytest.mark.parametrize("bits", [0, 1, 9, 16, -4])
def test_unsupported_bits(bits: int) -> None:
    with pytest.raises(OptionError, match=f"bits={bits}"):
        WeightSpec(bits=bits)


@pytest.mark.parametrize("group", [0, -1, -32])
def test_unsupported_groups(group: int) -> None:
    with pytest.raises(OptionError, match=f"group_size={group}"):
        WeightSpec(group_size=group)


@pytest.mark.parametrize("bits", BITS)
def test_code_range(bits: int) -> None:
    spec = WeightSpec(bits=bits)
    assert (spec.top, spec.middle) == (2**bits - 1, 2**bits // 2)


@pytest.mark.parametrize(
    ("group", "k", "rows", "groups"), [(None, 10, 10, 1), (4, 10, 4, 3), (5, 10, 5, 2), (32, 10, 10, 1), (10, 10, 10, 1), (1, 3, 1, 3)]
)
def test_groups_of_a_column(group: int | None, k: int, rows: int, groups: int) -> None:
    spec = WeightSpec(group_size=group)
    assert (spec.rows(k), spec.groups(k)) == (rows, groups)
    np.testing.assert_array_equal(spec.group_of_row(k), [i // rows for i in range(k)])


def test_dequantize() -> None:
    spec = WeightSpec(bits=4, group_size=2)
    codes = np.array([[0, 15], [3, 8], [7, 1]], np.uint8)
    weight = QuantizedWeight(codes, np.array([[0.5, 1.0], [2.0, 0.25]], np.float32), np.array([[1, 8], [7, 5]], np.uint8), spec)
    result = weight.dequantize()
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, [[-0.5, 7.0], [1.0, 0.0], [0.0, -1.0]])


def test_quantized_weight_checks_shapes() -> None:
    good = random_quantized(10, 3, WeightSpec(group_size=4))
    fields: dict[str, Any] = {"codes": good.codes, "scales": good.scales, "zero_points": good.zero_points, "spec": good.spec}
    QuantizedWeight(**fields)
    for change in ({"scales": good.scales[:2]}, {"zero_points": good.zero_points[:, :2]}, {"spec": WeightSpec(group_size=None)}):
        with pytest.raises(ValueError, match="need scales and zero points"):
            QuantizedWeight(**(fields | change))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_check_finite_names_the_layer_and_the_place(bad: float) -> None:
    array = np.zeros((3, 4), np.float32)
    check_finite("layer.7", array)
    array[1, 2] = array[2, 0] = bad
    with pytest.raises(NonFiniteError, match=r"layer\.7: 2 of 12 .*\(1, 2\)"):
        check_finite("layer.7", array)
