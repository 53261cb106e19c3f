"""Statistics of parts of the rows: folds, and the readers of one weight."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

from magr_onnx.core.error_feedback import target_moments
from magr_onnx.core.moments import LEAST_POWER, MomentAccumulator, pooled, split_stats, with_folds
from magr_onnx.core.types import ActivationGrid, LayerStats
from tests.helpers import Array, activations, gram_of

K = 12
WEIGHT = np.random.default_rng(9).standard_normal((K, 5)).astype(np.float32)


def stats_of(x: Array) -> LayerStats:
    return LayerStats(gram_of(x), x.mean(axis=0), len(x), x.mean(axis=0) + 1, ActivationGrid(0.5, 3))


def target_of(x: Array) -> Any:
    return target_moments(WEIGHT, gram_of(x), gram_of(x), x.mean(axis=0), len(x))


def assert_same(found: Any, expected: Any) -> None:
    """All arrays and numbers of two statistics, their folds apart."""
    for name in (field.name for field in fields(expected) if field.name not in ("folds", "_memo", "activation", "backend")):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("measure", [stats_of, target_of])
@pytest.mark.parametrize(("ends", "folds"), [((10, 30, 60), 4), ((10, 30, 60), 1), ((10, 30, 60), 0), ((25,), 1), ((25,), 2)])
def test_parts_are_the_statistics_of_all_their_rows(measure: Any, ends: tuple[int, ...], folds: int) -> None:
    x = activations(100, K)
    parts = np.split(x, ends)
    found = with_folds([measure(part) for part in parts], folds)
    assert_same(found, measure(x))
    assert len(found.folds) == folds
    for index, (fold, part) in enumerate(zip(found.folds, parts, strict=False)):
        assert_same(fold, measure(part))
        assert_same(found.without(index), measure(np.concatenate([p for i, p in enumerate(parts) if i != index])))
    if measure is stats_of:
        assert found.activation == ActivationGrid(0.5, 3)


def test_parts_without_rows_are_no_folds() -> None:
    x = activations(100, K)
    none, some, others = LayerStats.data_free(K), stats_of(x[:30]), stats_of(x[30:])
    found = with_folds([none, some, none, others], 3)
    assert [fold.rows for fold in found.folds] == [30]
    assert_same(found, stats_of(x))
    found = with_folds([none, some, others, none], 4)
    assert [fold.rows for fold in found.folds] == [30, 70]
    for parts in ([none, some], [some, none, none]):  # nothing would be left to solve with
        assert with_folds(parts, 2) is some
    assert with_folds([none, none], 2).is_data_free


@pytest.mark.parametrize("folds", [1, 4])
def test_sums_of_parts_become_folds(folds: int) -> None:
    """Of batches added one after the other."""
    x = activations(100, K).astype(np.float32)
    parts = [MomentAccumulator(K, float_mean=False) for _ in range(min(folds + 1, 4))]
    in_parts: list[list[Array]] = [[] for _ in parts]
    for i, batch in enumerate(np.split(x, 10)):
        at = i % len(parts)
        parts[at].add(batch.T @ batch, batch.sum(axis=0), len(batch))
        in_parts[at].append(batch)
    found = split_stats(parts, folds, None)
    assert found is not None
    assert len(found.folds) == folds
    for seen, rows in ((found, [x]), *zip(found.folds, in_parts, strict=False)):
        part = np.concatenate(rows).astype(np.float64)
        assert seen.rows == len(part)
        np.testing.assert_allclose(seen.gram, gram_of(part), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(seen.mean, part.mean(axis=0), rtol=1e-4, atol=1e-5)
    assert split_stats([MomentAccumulator(K), MomentAccumulator(K)], folds, None) is None


@pytest.mark.parametrize("centred", [(False, False), (True, False), (True, True)])
def test_readers_of_one_weight_count_by_their_relative_errors(centred: tuple[bool, bool]) -> None:
    """``tr(D^T H D)`` is, up to one factor, the sum of the readers' squared errors, each over the power of its output."""
    rows = [activations(60, K, 1), 30 * activations(40, K, 2)]
    plain = [LayerStats(gram_of(x), x.mean(axis=0), len(x)) for x in rows]
    powers = [float(np.square(x @ WEIGHT).sum(axis=1).mean()) for x in rows]
    found = pooled(list(zip(plain, centred, strict=True)), powers)
    assert found.rows == 100
    assert not found.mean.any()
    ratios = []
    for seed in range(3):
        difference = np.random.default_rng(seed).standard_normal((K, 5))
        total = 0.0
        for x, takes_mean, power in zip(rows, centred, powers, strict=True):
            error = x @ difference
            error = error - error.mean(axis=0) if takes_mean else error
            total += np.square(error).sum(axis=1).mean() / power
        ratios.append(np.einsum("kn,kn->", difference, found.gram @ difference) / total)
    assert ratios == pytest.approx([ratios[0]] * 3, rel=1e-9)
    assert ratios[0] == pytest.approx(np.mean(powers) / 2, rel=1e-9)  # readers of one strength are averaged


def test_pooled_folds_and_readers_that_are_all_but_off() -> None:
    x, faint = activations(60, K, 1), 1e-9 * activations(40, K, 2)
    folds = [[x[:20], x[20:]], [faint[:10], faint[10:]]]
    stats = [replace(stats_of(a), folds=tuple(map(stats_of, parts))) for a, parts in zip((x, faint), folds, strict=True)]
    powers = [float(np.square(a @ WEIGHT).sum(axis=1).mean()) for a in (x, faint)]
    found = pooled([(s, False) for s in stats], powers)
    factors = [sum(powers) / powers[0] / 4, sum(powers) / (LEAST_POWER * powers[0]) / 4]
    assert [fold.rows for fold in found.folds] == [30, 70]
    for fold, parts in zip(found.folds, zip(*folds, strict=True), strict=True):
        sums = sum(f * p.T @ p / len(a) for f, p, a in zip(factors, parts, (x, faint), strict=True))
        np.testing.assert_allclose(fold.gram, sums * 100 / fold.rows, rtol=1e-9)
    silent = pooled([(s, False) for s in stats], [0.0, 0.0])
    assert np.isfinite(silent.gram).all()


@pytest.mark.parametrize("centred", [False, True])
def test_rows_outside_pooled_folds_have_moments_too(centred: bool) -> None:
    """Where the readers' folds are of other sizes, as of samples of other lengths: no input has less than no power."""
    x, y = activations(200, K, 1), activations(1000, K, 2)
    x[:20] *= 10
    folds = [np.split(x, [20]), np.split(y, [700])]
    stats = [replace(stats_of(a), folds=tuple(map(stats_of, parts))) for a, parts in zip((x, y), folds, strict=True)]
    found = pooled([(s, centred) for s in stats], [1.0, 1.0])
    assert len(found.folds) == 2
    for index in range(2):
        assert np.linalg.eigvalsh(found.without(index).gram)[0] > 0
