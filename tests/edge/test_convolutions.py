"""In which order convolutions of integers are summed on x86 without VNNI, and real files that are constrained in that order.

A QLinearConv puts out 8 bits. To see its 32-bit sums exactly, every column of codes has a channel for every input, with a bias that is
minus the sum expected of that input: with all scales one, that output is its zero point only if the sum is as expected to the bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import magr_onnx
from magr_onnx.config.options import Options
from tests.edge.integer import pair_safe, saturated, worst
from tests.edge.jobs import Array, Job
from tests.edge.targets import HASWELL, HOST, require
from tests.workflow.test_integer_convolutions import images, network

COLUMNS = 3
X_ZERO, Y_ZERO = 200, 128


@dataclass(frozen=True, slots=True)
class Shape:
    """A convolution whose input is a single patch.

    Attributes:
        channels: Input channels of a group.
        kernel: Its size by axis; the first row of an axis in ``padded`` is padding.
        group: Number of groups.
        dilation: Distance of taps.
        stride: Of the node; without effect on a single patch, but kernels are chosen by it.
        padded: Axes with padding before the patch.
    """

    channels: int
    kernel: tuple[int, ...]
    group: int = 1
    dilation: int = 1
    stride: int = 1
    padded: tuple[int, ...] = ()

    @property
    def taps(self) -> int:
        return math.prod(self.kernel)

    @property
    def k(self) -> int:
        return self.channels * self.taps

    @property
    def taps_first(self) -> Array:
        return np.arange(self.k).reshape(self.channels, self.taps).T.reshape(-1)


SHAPES = {
    "three channels": Shape(3, (3, 3)),
    "odd channels": Shape(5, (3, 3), padded=(0, 1)),
    "eight channels": Shape(8, (3, 3)),
    "one channel": Shape(1, (5, 5), padded=(0,)),
    "one tap": Shape(7, (1, 1)),
    "one tap, strided": Shape(8, (1, 1), stride=2),
    "one axis": Shape(6, (4,), padded=(0,)),
    "three axes": Shape(3, (2, 3, 2), padded=(1,)),
    "dilated": Shape(4, (3, 3), dilation=2),
    "grouped": Shape(6, (3, 2), group=2),
    "several channels out of each in": Shape(1, (3, 3), group=4),
}


def patches(shape: Shape, rows: Array) -> Array:
    """Raw codes ``(n, K)``, (channels, taps), with the zero point where they are padding."""
    patch = rows.reshape(-1, shape.channels, *shape.kernel).copy()
    for axis in shape.padded:
        np.moveaxis(patch, 2 + axis, 0)[0] = X_ZERO
    return patch.reshape(len(rows), -1)


def convolution(shape: Shape, codes: Array, x: Array, sums: Array, path: Path) -> Job:
    """A QLinearConv of ``codes (G, K, N)`` for patches ``x (J, G, K)`` whose raw sums should be ``sums (J, G, N)``; see the module."""
    group, _, n = codes.shape
    weight = np.repeat(codes.transpose(0, 2, 1), len(x), axis=1)  # (G, N J, K)
    biases = X_ZERO * codes.astype(np.int64).sum(axis=1)[:, :, None] - sums.transpose(1, 2, 0)  # (G, N, J)
    m = group * n * len(x)
    arrays: dict[str, Array] = {
        "x_zero": np.uint8(X_ZERO),
        "w": weight.reshape(m, shape.channels, *shape.kernel).astype(np.int8),
        "w_zero": np.int8(0),
        "y_zero": np.uint8(Y_ZERO),
        "bias": biases.reshape(-1).astype(np.int32),
        "one": np.float32(1),
    }
    attributes: dict[str, Any] = {
        "group": group,
        "kernel_shape": shape.kernel,
        "strides": [shape.stride] * len(shape.kernel),
        "dilations": [shape.dilation] * len(shape.kernel),
        "pads": [shape.dilation * (axis in shape.padded) for axis in range(len(shape.kernel))] + [0] * len(shape.kernel),
    }
    node = onnx.helper.make_node("QLinearConv", ["x", "one", "x_zero", "w", "one", "w_zero", "one", "y_zero", "bias"], ["y"], **attributes)
    dims = ["n", group * shape.channels, *[None] * len(shape.kernel)]
    x_info, y_info = (onnx.helper.make_tensor_value_info(name, 2, shape) for name, shape in (("x", dims), ("y", ["n", m, *dims[2:]])))
    initializers = [onnx.numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()]
    graph = onnx.helper.make_graph([node], "g", [x_info], [y_info], initializers)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), path)
    return Job(path, {"x": image(shape, x)})


def image(shape: Shape, x: Array) -> Array:
    """Inputs of which the only patches are ``x (J, G, K)``."""
    patch = x.reshape(len(x), -1, *shape.kernel)
    spread = np.full((*patch.shape[:2], *((size - 1) * shape.dilation + 1 for size in shape.kernel)), 77, np.uint8)  # between taps
    spread[(slice(None), slice(None), *(slice(None, None, shape.dilation) for _ in shape.kernel))] = patch
    for axis in shape.padded:
        spread = np.delete(spread, range(shape.dilation), axis=2 + axis)
    return spread


def as_expected(y: Array, group: int) -> Array:
    """Whether the sum of every input, group and column was the expected one."""
    count = len(y)
    channels = y.reshape(count, group, -1, count)
    return np.stack([channels[j, :, :, j] == Y_ZERO for j in range(count)])


def fitting(shape: Shape, order: Array, other: Array) -> tuple[Array, Array, Array]:
    """Codes ``(G, K, N)`` whose pairs in ``order`` all fit, patches ``(J, G, K)`` that load pairs in either order, and exact sums."""
    codes = np.stack([np.zeros((shape.k, COLUMNS), np.int8)] * shape.group)
    inputs = []
    for number, group in enumerate(codes):
        group[order] = pair_safe(shape.k, COLUMNS, number)
        pairs = group[other].astype(int)
        pairs = np.pad(pairs, ((0, len(pairs) % 2), (0, 0))).reshape(-1, 2, COLUMNS).sum(axis=1)
        loading = np.repeat((np.abs(pairs) > 128).T, 2, axis=1)[:, : shape.k] * 255
        rows = worst(group, number)
        rows[: len(loading), other] = loading
        inputs.append(patches(shape, rows))
    x = np.stack(inputs, axis=1)
    return codes, x, np.einsum("jgk,gkn->jgn", x.astype(np.int64), codes.astype(np.int64))


def clipped_sums(x: Array, codes: Array, order: Array) -> Array:
    """Sums ``(J, G, N)`` of a machine that clips pairs in ``order`` to 16 bits."""
    return np.stack([saturated(x[:, g, order], codes[g, order]) for g in range(len(codes))], axis=1)


DEPTHWISE = {
    f"depthwise {kernel} of {groups}": Shape(1, kernel, groups, padded=(0,))
    for kernel in ((3, 3), (5, 5), (3,), (4, 2), (2, 2, 2))
    for groups in (5, 16)
}


@dataclass(frozen=True, slots=True)
class Case:
    """A file, and the sums that machines with and without VNNI compute for its input, ``(J, G, N)``."""

    job: Job
    exact: Array
    clipped: Array
    answers: dict[str, Array]


def dense(shape: Shape, order: Array, other: Array, path: Path) -> Case:
    """Codes whose pairs fit in one order of K but not in another; the sums expected are those of x86 without VNNI."""
    codes, x, exact = fitting(shape, order, other)
    clipped = clipped_sums(x, codes, shape.taps_first)
    return Case(convolution(shape, codes, x, clipped, path), exact, clipped, {})


def depthwise(shape: Shape, path: Path) -> Case:
    """Large codes, of which no pair fits; a group has one channel, and so one input."""
    codes = np.random.default_rng(0).integers(100, 128, (shape.group, shape.k, 1)).astype(np.int8)
    x = patches(shape, np.random.default_rng(1).integers(200, 256, (shape.group, shape.k)).astype(np.uint8))[None]
    exact = np.einsum("jgk,gkn->jgn", x.astype(np.int64), codes.astype(np.int64))
    return Case(convolution(shape, codes, x, exact, path), exact, exact, {})


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """All files, run with onnxruntime's optimizations and without on both machines."""
    require(HASWELL)
    folder, made = tmp_path_factory.mktemp("convolutions"), {}
    for name, shape in SHAPES.items():
        plain = np.arange(shape.k)
        made[name] = dense(shape, shape.taps_first, plain, folder / f"{name}.onnx")
        made[f"{name}, unsafe"] = dense(shape, plain, shape.taps_first, folder / f"{name}, unsafe.onnx")
    made |= {name: depthwise(shape, folder / f"{name}.onnx") for name, shape in DEPTHWISE.items()}
    jobs = [Job(case.job.model, case.job.feeds, optimize=optimize) for case in made.values() for optimize in (True, False)]
    for target in (HASWELL, HOST):
        answers = iter(target.run(jobs))
        for case in made.values():
            results = [next(iter(next(answers).get().values())) for _ in range(2)]
            np.testing.assert_array_equal(*results)
            case.answers[target.name] = results[0]
    return made


@pytest.mark.parametrize("name", SHAPES)
def test_rows_are_paired_by_tap_then_channel(name: str, cases: dict[str, Case]) -> None:
    """Codes that fit in that order are exact; those that fit in the order of the file only are clipped in pairs of that order."""
    safe, unsafe, group = cases[name], cases[f"{name}, unsafe"], SHAPES[name].group
    np.testing.assert_array_equal(safe.clipped, safe.exact)
    if min(SHAPES[name].channels, SHAPES[name].taps) > 1:
        assert (unsafe.clipped != unsafe.exact).any()
    for case in (safe, unsafe):
        assert as_expected(case.answers["haswell"], group).all()
        if HOST.saturates is False:
            np.testing.assert_array_equal(as_expected(case.answers["host"], group), case.clipped == case.exact)


@pytest.mark.parametrize("name", DEPTHWISE)
def test_depthwise_convolutions_are_exact(name: str, cases: dict[str, Case]) -> None:
    for y in cases[name].answers.values():
        assert (y == Y_ZERO).all()


FILES: dict[str, Options] = {
    "free": {},
    "safe": {"target": "x86-avx2"},
    "safe, int8 inputs": {"target": "x86-avx2", "activation_type": "int8"},
    "safe, 4-bit weights": {"target": "x86-avx2", "conv_bits": 4},
}


def test_constrained_files_are_bit_identical_without_vnni(tmp_path: Path) -> None:
    """And without the constraint they are not: witnesses of the free file are of layers that the constrained ones have too."""
    require(HASWELL)
    jobs, proto = [], network(seed=3)
    for name, options in FILES.items():
        path = tmp_path / f"{name}.onnx"
        magr_onnx.optimize(proto, {"x": images(32, 1)}, format="qdq-int8", batch_size=4, output=path, **options)
        assert magr_onnx.verify(path, target="x86-avx2", run=False).ok is (name != "free")
        jobs.append(Job(path, {"x": images(32, 2)}))
    same = []
    for here, there in zip(HOST.run(jobs), HASWELL.run(jobs), strict=True):
        (a,), (b,) = here.get().values(), there.get().values()
        same.append(np.array_equal(a, b))
    assert same[1:] == [True] * (len(FILES) - 1)
    if HOST.saturates is False:
        assert not same[0]
