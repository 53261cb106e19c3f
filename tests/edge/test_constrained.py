"""A real model, quantized for x86 without VNNI and quantized freely: what an emulated Haswell makes of both.

Every layer's codes, as they lie in the emitted file, multiply random inputs, the inputs that load each column's registers the most, and
the inputs that overflow the free model (its witnesses). Sums are int32, so "the same" means bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import magr_onnx
from magr_onnx.config.options import Options
from magr_onnx.core.overflow.proof import IntegerDot
from magr_onnx.models import bundled
from magr_onnx.passes.integer.dot_products import find
from tests.edge.integer import matmul_integer, saturated
from tests.edge.jobs import Array, Job
from tests.edge.targets import HASWELL, HOST, require

TARGET = "x86-avx2"
FORMATS: tuple[Options, ...] = ({"format": "qdq-int8"}, {"format": "dynamic-int8"})
COLUMNS = 4  # of every layer whose most loading inputs are run
TOKENS = 32


@dataclass(frozen=True, slots=True)
class Models:
    """The files of one format."""

    free: Path
    safe: Path
    tokens: Array


@pytest.fixture(scope="module", params=[f["format"] for f in FORMATS])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("constrained")
    with np.load(bundled.CALIBRATION) as file:
        calibration = [{"input_ids": file["input_ids"][:8]}]
    with np.load(bundled.HELD_OUT) as file:
        tokens: Array = file["input_ids"][:1, :TOKENS]
    free, safe = folder / "free.onnx", folder / "safe.onnx"
    common: Options = {"format": request.param, "quantizer": "gptq"}
    magr_onnx.optimize(bundled.MODEL, calibration, output=free, **common)
    magr_onnx.optimize(bundled.MODEL, calibration, output=safe, target=TARGET, **common)
    return Models(free, safe, tokens)


def inputs(codes: Array, witness: Array | None) -> Array:
    """Random ones, those that load some columns the most in either direction, and a witness."""
    rows = [np.random.default_rng(0).integers(0, 256, (8, len(codes))), np.full((1, len(codes)), 255)]
    some = codes[:, :: max(1, codes.shape[1] // COLUMNS)].T
    rows += [np.where(some > 0, 255, 0), np.where(some < 0, 255, 0)]
    if witness is not None:
        rows.append(witness[None])
    return np.concatenate(rows).astype(np.uint8)


def jobs(path: Path, witnesses: dict[str, Array], folder: Path) -> tuple[list[str], list[Job], list[Array], list[Array]]:
    """A MatMulInteger of every layer's codes, with its exact answers and those of a machine that saturates."""
    names, work, exact, clipped = [], [], [], []
    for i, dot in enumerate(d for d in find(ir.load(path)) if isinstance(d, IntegerDot)):
        codes = dot.codes.astype(np.int8)
        x = inputs(codes, witnesses.get(dot.name))
        job, answer = matmul_integer(codes, x, folder / f"{i}.onnx")
        names.append(dot.name)
        work.append(job)
        exact.append(answer)
        clipped.append(saturated(x, codes))
    return names, work, exact, clipped


def witnesses_of(path: Path) -> dict[str, Array]:
    found = magr_onnx.verify(path, target=TARGET, run=False)
    return {layer.name: np.array(layer.witness.x) for layer in found.failed if layer.witness is not None}


def test_constrained_layers_are_bit_identical_without_vnni(models: Models, tmp_path: Path) -> None:
    require(HASWELL)
    witnesses = witnesses_of(models.free)
    verdict = magr_onnx.verify(models.safe, target=TARGET)
    assert verdict.ok
    assert len(verdict.layers) > 20
    names, work, exact, _ = jobs(models.safe, witnesses, tmp_path)
    assert witnesses.keys() & set(names), "the free model's witnesses are of the same layers"
    for target in (HASWELL, HOST):
        for name, answer, truth in zip(names, target.run(work), exact, strict=True):
            (found,) = answer.get().values()
            np.testing.assert_array_equal(found.astype(np.int64), truth, err_msg=f"{target.name}, {name}")


def test_free_layers_differ_without_vnni(models: Models, tmp_path: Path) -> None:
    """Every witness overflows when run, by just as much as simulated, and only on the machine it is a witness for."""
    require(HASWELL)
    witnesses = witnesses_of(models.free)
    names, work, exact, clipped = jobs(models.free, witnesses, tmp_path)
    assert len(witnesses) > len(names) // 2
    for name, answer, truth, simulated in zip(names, HASWELL.run(work), exact, clipped, strict=True):
        (found,) = answer.get().values()
        np.testing.assert_array_equal(found.astype(np.int64), simulated, err_msg=name)
        if name in witnesses:
            assert (found[-1] != truth[-1]).any(), f"{name}: the witness does not overflow"
    if HOST.saturates is False:
        for answer, truth in zip(HOST.run(work), exact, strict=True):
            (found,) = answer.get().values()
            np.testing.assert_array_equal(found.astype(np.int64), truth)


def test_whole_models_agree_only_where_constrained(models: Models) -> None:
    """Logits of the running models, as a share of the largest: the same where constrained, off by a tenth where not.

    The bound leaves room for floats between the integers that vector units may round differently.
    """
    require(HASWELL)
    feeds = {"input_ids": models.tokens}
    work = [Job(models.safe, feeds), Job(models.safe, feeds, optimize=False), Job(models.free, feeds)]
    differences = []
    for here, there in zip(HOST.run(work), HASWELL.run(work), strict=True):
        (a,), (b,) = here.get().values(), there.get().values()
        differences.append(float(np.abs(a - b).max() / np.abs(a).max()))
    if HOST.saturates is False:
        assert max(differences[:2]) <= 1e-4
        assert differences[2] > 1e-2
