"""Golden runs: what `magr_onnx.optimize` writes and reports, as hashes, so that a change of the code is proved to change nothing.

    python -m tests.golden new.json --compare old.json

Every case is a model, its data and one or more calls in turn. Its value has the SHA-256 of every file the calls left (``files``), of the
text of the report (``report``), of all its data (``details``: histograms, curves, errors to the last digit) and of what was said during
the run (``progress``); or class and message of what was raised (``error``). Times, paths and versions are taken out first.

Hashes hold for one machine and one set of packages only, as sums of floats differ between others: run both sides in one environment.
Only `magr_onnx.optimize` and the models of the package are used, so that modules may move.
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import hashlib
import json
import multiprocessing
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

import magr_onnx
from magr_onnx.models import bundled
from magr_onnx.models.zoo import ZOO

Array = npt.NDArray[Any]
Feeds = dict[str, Array]
Options = dict[str, Any]
Value = dict[str, Any]

FOLDER, BUNDLED = "<folder>", "<bundled>"
"""What stands for the folder of a case and that of the bundled model, in options and in what is hashed."""
WIDTH = 400  # columns of reports: nothing is wrapped, so that the length of a path does not matter
FORMATS = ("matmulnbits", "qdq", "qdq-int8", "dynamic-int8")
EFFORTS = ("fast", "balanced", "best")
QUANTIZERS = ("auto", "rtn", "gptq", "comq", "hqq", "lrq", "a2q", "a2q+")
TARGETS = ("x86-avx2", "x86-vnni", "arm64-dotprod", "arm64-neon", "wasm", "generic")
PRESETS = ("edge-cpu", "web", "llm-int4", "llm-int2", "avx2-safe")
PACKAGES = ("numpy", "onnx", "onnx-ir", "onnxruntime", "onnx-magr", "tokenizers")
FAST: Options = {"effort": "fast"}
SOME = ["*MatMul_7", "*MatMul_8?", "*linear_20"]  # the first block of the bundled model, and its head


@dataclass(frozen=True)
class Case:
    """A model, its data and the calls that are made of them.

    Attributes:
        name: Unique.
        model: ``bundled``, a key of `MODELS`, or ``zoo:`` and the name of a trap.
        batches: How many batches of data there are; 0 for none.
        calls: Options of `magr_onnx.optimize`, of every call. ``model``, ``calibration`` and ``output`` may be among them; else they are
            the case's, and ``<folder>/0/q.onnx`` for the first call and so on.
        form: How data is given: ``list``, ``stacked``, ``npz``, ``folder`` (of .npz files), ``text`` or ``file`` (an .npz file that no
            argument names).
        saved: Write the model to ``<folder>/model.onnx``, weights beside it, and give the path.
        texts: Other files of the folder.
        cut: Files of the folder to remove between two calls, as a pattern; of those found every second one.
    """

    name: str
    model: str
    batches: int
    calls: tuple[Options, ...]
    form: str = "list"
    saved: bool = False
    texts: Mapping[str, str] = field(default_factory=dict)
    cut: str = ""


# --- Models and data ----------------------------------------------------------------------------------------------------------


def _random(*shape: int, seed: int = 0, scale: float = 0.2, dtype: npt.DTypeLike = np.float32) -> Array:
    """Make normal values."""
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(dtype)


def _spoiled(k: int, n: int, seed: int) -> Array:
    """Make normal weights with two outliers a column, which `split_outliers` is for."""
    rng, weights = np.random.default_rng(seed), _random(k, n, seed=seed, scale=0.1)
    for column in range(n):
        weights[rng.choice(k, 2, replace=False), column] = rng.uniform(4, 8, 2) * rng.choice([-1, 1], 2)
    return weights


def _proto(text: str, opset: int = 20, ir_version: int = 9, **initializers: Array) -> onnx.ModelProto:
    """Parse a graph and give it its constants."""
    model = onnx.parser.parse_model(f'<ir_version: {ir_version}, opset_import: ["": {opset}]>\n{text}')
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in initializers.items())
    return model


def _chain(opset: int = 20) -> onnx.ModelProto:
    """Build a Gemm, a MatMul with a bias, and a product of two activations."""
    return _proto(
        """g (float[batch, 48] x) => (float[batch, batch] y) {
            [up] a = Gemm<transB = 1>(x, w1, b1)
            [relu] h = Relu(a)
            [down] d = MatMul(h, w2)
            [down_bias] o = Add(d, b2)
            [turn] t = Transpose<perm = [1, 0]>(o)
            [scores] y = MatMul(o, t)
        }""",
        opset,
        min(9, opset - 7),
        w1=_random(64, 48),
        b1=_random(64, seed=5),
        w2=_random(64, 32, seed=6),
        b2=_random(32, seed=7),
    )


def _block() -> onnx.ModelProto:
    """Build a transformer block: norms with strong channels, attention, GELU behind outliers, a head, and a mask."""
    gains = np.where(np.arange(64) % 11 == 5, 20, 1).astype(np.float32)
    return _proto(
        """g (float[batch, time, 64] x, int64[batch, time] attention_mask) => (float[batch, time, 24] y, int64[batch, time] mask_out) {
            [norm] n = LayerNormalization<axis = -1>(x, g1, s1)
            [q] q = MatMul(n, wq)
            [k] k = MatMul(n, wk)
            [v] v = MatMul(n, wv)
            [turn] kt = Transpose<perm = [0, 2, 1]>(k)
            [scores] s = MatMul(q, kt)
            [softmax] p = Softmax<axis = -1>(s)
            [mix] m = MatMul(p, v)
            [out] o = MatMul(m, wo)
            [first] r = Add(x, o)
            [norm2] n2 = LayerNormalization<axis = -1>(r, g2, s2)
            [up] u = MatMul(n2, wu)
            [up_bias] ub = Add(u, bu)
            [gelu] e = Gelu(ub)
            [down] d = MatMul(e, wd)
            [second] z = Add(r, d)
            [lm_head] y = MatMul(z, wh)
            [keep] mask_out = Identity(attention_mask)
        }""",
        g1=gains,
        s1=_random(64, seed=1),
        wq=_random(64, 32, seed=2),
        wk=_random(64, 32, seed=3),
        wv=_random(64, 64, seed=4),
        wo=_random(64, 64, seed=5),
        g2=gains[::-1].copy(),
        s2=_random(64, seed=6),
        wu=_random(64, 96, seed=7),
        bu=_random(96, seed=8),
        wd=_spoiled(96, 64, 9),
        wh=_random(64, 24, seed=10),
    )


def _net() -> onnx.ModelProto:
    """Build a network of convolutions: usual, depthwise, pointwise, transposed, and a Gemm behind them."""
    return _proto(
        """g (float[batch, 4, 8, 8] x) => (float[batch, 10] y) {
            [stem] a = Conv<pads = [1, 1, 1, 1]>(x, c1, d1)
            [relu] b = Relu(a)
            [depth] c = Conv<group = 8, pads = [1, 1, 1, 1]>(b, c2)
            [point] d = Conv(c, c3, d3)
            [relu2] e = Relu(d)
            [turned] f = ConvTranspose<strides = [2, 2]>(e, c4)
            [pool] h = AveragePool<kernel_shape = [4, 4], strides = [4, 4]>(f)
            [flat] i = Flatten(h)
            [head] y = Gemm<transB = 1>(i, w, v)
        }""",
        c1=_random(8, 4, 3, 3),
        d1=_random(8, seed=1),
        c2=_random(8, 1, 3, 3, seed=2),
        c3=_random(16, 8, 1, 1, seed=3),
        d3=_random(16, seed=4),
        c4=_random(16, 8, 2, 2, seed=5),
        w=_random(10, 128, seed=6),
        v=_random(10, seed=7),
    )


def _words() -> onnx.ModelProto:
    """Build a table of embeddings, a layer and a head over its words."""
    return _proto(
        """g (int64[batch, time] input_ids) => (float[batch, time, 96] logits) {
            [embed] h = Gather(embed_tokens, input_ids)
            [fc] a = MatMul(h, w)
            [act] b = Tanh(a)
            [lm_head] logits = MatMul(b, head)
        }""",
        embed_tokens=_random(256, 64, scale=1),
        w=_random(64, 64, seed=1),
        head=_random(64, 96, seed=2),
    )


def _half() -> onnx.ModelProto:
    """Build two layers in float16."""
    return _proto(
        """g (float16[batch, time, 64] x) => (float16[batch, time, 24] y) {
            [fc] a = MatMul(x, w)
            [bias] b = Add(a, v)
            [relu] c = Relu(b)
            [out] y = MatMul(c, u)
        }""",
        w=_random(64, 48, dtype=np.float16),
        v=_random(48, seed=1, dtype=np.float16),
        u=_random(48, 24, seed=2, dtype=np.float16),
    )


def _tied() -> onnx.ModelProto:
    """Build three layers with one weight, one of them with a bias."""
    return _proto(
        """g (float[batch, 48] x) => (float[batch, 48] y) {
            [one] a = MatMul(x, w)
            [tanh] b = Tanh(a)
            [beside] c = MatMul(x, w)
            [bias] d = Add(c, v)
            [both] e = Mul(b, d)
            [two] y = MatMul(e, w)
        }""",
        w=_random(48, 48),
        v=_random(48, seed=1),
    )


def _unequal() -> onnx.ModelProto:
    """Build layers side by side that matter more, less and hardly: a budget gives them different bits."""
    return _proto(
        """g (float[batch, 64] x) => (float[batch, 96] logits) {
            [strong] a = MatMul(x, w1)
            [weak] b = MatMul(x, w2)
            [less] c = Mul(b, small)
            [faint] d = MatMul(x, w3)
            [least] e = Mul(d, tiny)
            [sum] f = Add(a, c)
            [all] logits = Add(f, e)
        }""",
        w1=_random(64, 96),
        w2=_random(64, 96, seed=1),
        w3=_random(64, 96, seed=2),
        small=np.array(0.05, np.float32),
        tiny=np.array(0.002, np.float32),
    )


def _decoder() -> onnx.ModelProto:
    """Build a decoder of one layer and one head with a cache of keys and values."""
    model = _proto(
        """g (int64[batch_size, sequence_length] input_ids, float[batch_size, 1, past_length, 32] past_key_values_0_key,
              float[batch_size, 1, past_length, 32] past_key_values_0_value) =>
             (float[batch_size, sequence_length, 96] logits, float[batch_size, 1, total_length, 32] present_0_key,
              float[batch_size, 1, total_length, 32] present_0_value) {
            [embed] h = Gather(table, input_ids)
            [q] q = MatMul(h, wq)
            [k] k = MatMul(h, wk)
            [v] v = MatMul(h, wv)
            [q4] q4 = Unsqueeze(q, one)
            [k4] k4 = Unsqueeze(k, one)
            [v4] v4 = Unsqueeze(v, one)
            [keys] present_0_key = Concat<axis = 2>(past_key_values_0_key, k4)
            [values] present_0_value = Concat<axis = 2>(past_key_values_0_value, v4)
            [turn] kt = Transpose<perm = [0, 1, 3, 2]>(present_0_key)
            [scores] s = MatMul(q4, kt)
            [softmax] p = Softmax<axis = -1>(s)
            [mix] m4 = MatMul(p, present_0_value)
            [m] m = Squeeze(m4, one)
            [o] o = MatMul(m, wo)
            [sum] r = Add(h, o)
            [lm_head] logits = MatMul(r, wh)
        }""",
        table=_random(96, 64, scale=1),
        wq=_random(64, 32, seed=1),
        wk=_random(64, 32, seed=2),
        wv=_random(64, 32, seed=3),
        wo=_random(32, 64, seed=4),
        wh=_random(64, 96, seed=5),
        one=np.array([1]),
    )
    names = {f"{n}_0_{kind}": f"{n}.0.{kind}" for n in ("past_key_values", "present") for kind in ("key", "value")}
    for value in (*model.graph.input, *model.graph.output):
        value.name = names.get(value.name, value.name)
    for node in model.graph.node:
        for ends in (node.input, node.output):
            ends[:] = [names.get(name, name) for name in ends]
    return model


MODELS: dict[str, Callable[[], onnx.ModelProto]] = {
    "chain": _chain,
    **{f"chain-{opset}": functools.partial(_chain, opset) for opset in (11, 13, 17, 21, 23)},
    "block": _block,
    "net": _net,
    "words": _words,
    "half": _half,
    "tied": _tied,
    "unequal": _unequal,
    "decoder": _decoder,
}
DIMS = {"batch": 6, "time": 5, "batch_size": 2, "sequence_length": 8}


def _feeds(model: onnx.ModelProto, seed: int) -> Feeds:
    """Make inputs for a model of this module: correlated floats with a few strong channels, words, and masks."""
    found: Feeds = {}
    for at, info in enumerate(model.graph.input):
        if info.name.startswith("past"):
            continue
        rng, tensor = np.random.default_rng([seed, at]), info.type.tensor_type
        dims = [d.dim_value or DIMS[d.dim_param] for d in tensor.shape.dim]
        if tensor.elem_type == onnx.TensorProto.INT64:
            found[info.name] = rng.integers(0, 2 if "mask" in info.name else 96, dims)
            continue
        last = dims[-1]
        x = rng.standard_normal((*dims[:-1], max(1, last // 4))) @ np.random.default_rng(at).standard_normal((max(1, last // 4), last))
        x += 0.3 * rng.standard_normal(dims) + 0.5
        x[..., :3] *= 6
        found[info.name] = x.astype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    return found


def _model(case: Case) -> Any:
    """Build the model of a case, or name its file."""
    if case.model == "bundled":
        return bundled.MODEL
    kind, _, name = case.model.partition(":")
    return ZOO[name].build() if kind == "zoo" else MODELS[kind]()


def _data(case: Case, model: Any) -> list[dict[str, Any]]:
    """Make the batches of a case."""
    if case.model == "bundled":
        ids = np.load(bundled.CALIBRATION)["input_ids"]
        return [{"input_ids": ids[at : at + 1, :24]} for at in range(case.batches)]
    if case.model.startswith("zoo:"):
        rng = np.random.default_rng(0)
        return [ZOO[case.model.removeprefix("zoo:")].feeds(rng) for _ in range(case.batches)]
    return [_feeds(model, seed) for seed in range(case.batches)]


# --- Cases --------------------------------------------------------------------------------------------------------------------


def _named(options: Mapping[str, Any]) -> str:
    """Write options as a short name."""
    return ",".join(f"{name}={value}" for name, value in options.items()).replace(" ", "") or "default"


def _each(model: str, batches: int, *many: Options, **usual: Any) -> Iterator[Case]:
    """Make a case of every set of options, over the usual ones."""
    for options in many:
        given = {**usual, **options}
        amount = {0: "/free", 4: ""}.get(batches, f"/{batches}")
        yield Case(f"{model}{amount}/{_named(given)}", model, batches, (given,))


def _of_bundled() -> Iterator[Case]:
    """List the runs of the bundled model; those that take long are of some layers only."""
    long = {("qdq", "balanced"), ("dynamic-int8", "balanced"), *((form, "best") for form in FORMATS[1:])}
    for form in FORMATS:
        for effort in EFFORTS:
            yield from _each("bundled", 4, {"include": SOME} if (form, effort) in long else {}, format=form, effort=effort)
    yield from _each("bundled", 0, *({"format": form} for form in FORMATS))
    yield from _each("bundled", 0, *({"quantizer": name, "bits": 3} for name in ("rtn", "hqq")))
    tables: list[Options] = [{"embeddings": "gather-block-quantized", "embedding_bits": bits} for bits in (4, 8)]
    yield from _each("bundled", 0, {"embeddings": "dequantize"}, *tables)
    yield from _each("bundled", 4, *({"quantizer": name, "bits": 2} for name in ("auto", "gptq", "comq", "hqq")), include=SOME)
    yield from _each("bundled", 4, *({"preset": name, "include": SOME} for name in PRESETS), **FAST)
    rewrites: list[Options] = [{"equalize": True}, {"split_outliers": True}, {"twin_ranges": True}]
    yield from _each("bundled", 4, *rewrites, format="qdq-int8", include=SOME)
    yield from _each(
        "bundled", 4, {"low_rank": 8, "bits": 2}, {"equalize": True, "bits": 3}, {"rotate": "on", "bits": 3}, include=SOME, **FAST
    )
    yield from _each("bundled", 8, {"target_size": "80%"}, {"max_loss": "2%"}, include=SOME, **FAST)
    yield from _each("bundled", 8, {"target_size": "4bit"}, **FAST)
    yield from _each("bundled", 4, {"max_memory": "1kB"}, {"external_data": True}, {"shard_size": "500 kB"}, {"output": None}, **FAST)
    yield from _each("bundled", 4, {"max_memory": "1kB", "cache": 0, "include": SOME}, effort="balanced")
    yield from _each("bundled", 4, {"exclude": ["*MatMul_*"]}, {"layers": [{"match": "*linear*", "bits": 8}], "include": SOME}, **FAST)
    yield Case("bundled/npz", "bundled", 4, ({"include": SOME, **FAST},), form="npz")
    yield Case("bundled/text", "bundled", 4, ({"include": SOME, **FAST},), form="text")
    yield Case("bundled/validated", "bundled", 4, ({"validation_data": f"{FOLDER}/data.npz", "include": SOME, **FAST},), form="npz")
    yield Case("bundled/resumed", "bundled", 4, ({"resume": f"{FOLDER}/job", **FAST},) * 2, cut="job/**/*.npz")


def _of_solvers() -> Iterator[Case]:
    """List quantizers, grids and what solvers are told, on the small models."""
    for model in ("block", "net", "words", "half", "tied", "chain", "decoder"):
        yield from _each(model, 4, *({"format": form, "effort": effort} for form in FORMATS for effort in EFFORTS))
        yield from _each(model, 0, *({"format": form} for form in FORMATS))
    for form in FORMATS:
        yield from _each("block", 4, *({"quantizer": name, "format": form} for name in QUANTIZERS))
        yield from _each("block", 0, *({"quantizer": name, "format": form} for name in QUANTIZERS))
    grids = [{"bits": bits, "block_size": block} for bits in (2, 3, 4, 8) for block in (16, 32, 64, 128, None)]
    for form in FORMATS[:2]:
        for symmetric in (False, True):
            yield from _each("chain", 4, *grids, *({"bits": bits} for bits in (5, 6, 7)), format=form, symmetric=symmetric, **FAST)
            yield from _each("half", 0, *grids, format=form, symmetric=symmetric)
    for form in FORMATS[2:]:
        yield from _each("block", 4, *({"bits": bits, "symmetric": s} for bits in (2, 3, 4, 7, 8) for s in (False, True)), format=form)
        yield from _each("block", 4, {"block_size": 32}, {"bits": 4, "block_size": "channel"}, format=form)
    told: list[Options] = [
        *({"alpha": alpha} for alpha in (0.0, 1e-3, 0.1)),
        *({"beta": beta} for beta in (0.8, 1.0)),
        *({"damping": damping} for damping in (1e-3, 0.1)),
        *({"act_order": order} for order in (False, True)),
        *({"sweeps": sweeps} for sweeps in (0, 1, 30)),
    ]
    for quantizer in ("auto", "gptq", "comq", "rtn", "hqq", "lrq"):
        yield from _each("block", 4, *told, quantizer=quantizer, bits=3)
    yield from _each("block", 4, *({"feedback": f, "quantizer": q} for f in (False, True) for q in ("auto", "gptq", "comq", "rtn")))
    yield from _each("chain", 1, *({"format": form, "effort": effort} for form in FORMATS for effort in EFFORTS))
    yield from _each("block", 4, {"mask": None}, {"mask": "attention_mask"}, {"mask": "nothing"}, {"gram_budget": 1}, {"cache": 0})


def _of_formats() -> Iterator[Case]:
    """List what formats, rewrites and accumulators are told, on the small models."""
    for form in FORMATS:
        for model in ("block", "chain"):
            yield from _each(model, 4, *({"bias": bias} for bias in ("auto", "any", "existing", "none")), format=form, **FAST)
        yield from _each("block", 4, {"equalize": True}, {"split_outliers": True}, {"twin_ranges": True}, {"low_rank": 4}, format=form)
        yield from _each("block", 4, {"equalize": True, "split_outliers": True, "low_rank": 2, "bits": 4}, format=form, effort="balanced")
        yield from _each("block", 4, *({"target": target} for target in TARGETS), format=form, **FAST)
        yield from _each("net", 4, {"target": "x86-avx2"}, {"target": "arm64-neon"}, format=form, **FAST)
        wide: list[Options] = [{"accumulator_bits": p} for p in (12, 14, 16, 20, 24)]
        tiles: list[Options] = [{"accumulator_bits": p, "accumulator_tile": t} for p in (14, 18) for t in (16, 32)]
        yield from _each("block", 4, *wide, *tiles, {"accumulator_tile": 16}, format=form, **FAST)
        yield from _each("net", 4, *({"conv_bits": bits} for bits in (3, 4, 5, 6, 7, 8, None)), format=form, **FAST)
        yield from _each("net", 4, *({"conv_form": kind, "conv_bits": 4} for kind in ("fold", "dequantize")), format=form, **FAST)
        yield from _each("words", 4, *({"embeddings": kind} for kind in ("gather-block-quantized", "dequantize")), format=form, **FAST)
        yield from _each("words", 4, {"embeddings": "gather-block-quantized", "embedding_bits": 4}, format=form, effort="balanced")
        for opset in (11, 13, 17, 21, 23):
            yield from _each(f"chain-{opset}", 4, {"format": form}, **FAST)
    yield from _each("block", 4, *({"accuracy_level": level} for level in (0, 1, 2, 4)), **FAST)
    for quantizer in ("auto", "gptq", "comq", "a2q", "a2q+"):
        for form in FORMATS[2:]:
            yield from _each(
                "block", 4, {"accumulator_bits": 16}, {"accumulator_bits": 20}, {"target": "x86-avx2"}, format=form, quantizer=quantizer
            )
            yield from _each("block", 4, {"accumulator_bits": 14, "accumulator_tile": 16}, format=form, quantizer=quantizer, bits=4)
    for kind in ("uint8", "int8"):
        ranges: list[Options] = [{"activation_range": name} for name in ("auto", "min-max", "percentile", "min-error", "daq")]
        whole: list[Options] = [{"quantize_outputs": True}, {"quantize_outputs": True, "bias": "none"}, {"target": "arm64-neon"}]
        yield from _each("block", 4, *ranges, *whole, {"twin_ranges": True}, format="qdq-int8", activation_type=kind)
        yield from _each("net", 4, *whole, format="qdq-int8", activation_type=kind)


def _of_runs() -> Iterator[Case]:
    """List budgets, pipelines, tables of layers, recipes and ways to run."""
    budgets: list[Options] = [{"target_size": size} for size in ("25%", "60%", "4bit", "9 kB", "1B")]
    budgets += [{"max_loss": loss} for loss in ("0.01%", "1%", "0.2")]
    for form in FORMATS:
        yield from _each("unequal", 8, *budgets, format=form, **FAST)
    for model in ("block", "words", "net", "tied"):
        yield from _each(model, 8, {"target_size": "40%"}, {"max_loss": "1%"})
    yield from _each("unequal", 8, {"target_size": "40%", "accumulator_bits": 17}, {"target_size": "40%", "block_size": 32}, **FAST)
    yield from _each("unequal", 8, {"max_loss": "5%", "effort": "balanced"}, {"max_loss": "5%", "quantizer": "gptq"})
    yield from _each(
        "unequal", 8, {"max_loss": "5%", "layers": [{"match": "strong", "symmetric": True}]}, {"target_size": "70%", "low_rank": 2}
    )
    pipelines = (
        "magr{alpha=0.01}",
        "magr{alpha=1e-3},quantize{method=gptq},compensate-bias",
        "magr{method=authors,relative=false},quantize,emit-qdq",
        "magr,quantize{bits=3,block_size=channel},emit-matmulnbits",
        "magr,quantize,compensate-bias{bias=any},emit-matmulnbits{accuracy_level=4}",
        "quantize{method=rtn,rescale=false},emit-matmulnbits",
        "error-feedback,quantize{method=comq,bits=2},low-rank{rank=4},emit-matmulnbits",
        "error-feedback,output-hessian,quantize{method=auto},emit-qdq",
        "equalize,split-outliers,quantize-activations,quantize{bits=8,block_size=channel,symmetric=true},emit-qdq-int8",
        "twin-ranges,quantize-activations,quantize{bits=8,block_size=none,symmetric=true},emit-qdq-int8{outputs=true}",
        "quantize-activations{type=dynamic},quantize{bits=8,block_size=none,symmetric=true},emit-dynamic-int8",
        "quantize,emit-matmulnbits,convolutions{bits=4},embeddings{form=dequantize}",
        "quantize,embeddings",
        "quantize{method=best}",
        "quantize,,emit-qdq",
        "quantize{bits=3",
        "magr{alpha=much}",
        "emit-qdq,quantize",
    )
    for model in ("block", "net", "words"):
        yield from _each(model, 4, *({"pipeline_text": text} for text in pipelines))
    yield from _each(
        "block", 4, {"pipeline_text": "magr", "bits": 4}, {"pipeline_text": 5}, {"pipeline_text": "magr", "layers": [{"match": "up"}]}
    )
    tables: list[list[Options]] = [
        [{"match": "up", "bits": 8}, {"match": ["q", "k"], "block_size": "channel", "quantizer": "rtn"}],
        [{"match": "*", "bits": 3}, {"match": "lm_head", "bits": 8, "symmetric": True, "low_rank": 2}],
        [{"match": "w?", "alpha": 0.01, "beta": 0.9, "damping": 0.05, "act_order": False, "sweeps": 2, "bias": "none"}],
        [{"match": "down", "accuracy_level": 4}],
        [{"match": "nothing", "bits": 3}],
        [{"match": "up", "format": "qdq"}],
        [{"match": "up", "bit": 3}],
        [{"bits": 3}],
    ]
    for form in FORMATS:
        yield from _each("block", 4, *({"layers": table} for table in tables), format=form, **FAST)
    yield from _each("block", 4, {"layers": tables[0]}, {"layers": tables[1]}, effort="balanced")
    for preset in PRESETS:
        yield from _each("words", 4, {}, {"bits": 8}, {"embeddings": "none"}, {"format": "qdq"}, preset=preset)
        yield from _each("block", 0, {}, preset=preset)
    picks: list[Options] = [
        {"include": ["up", "down"]},
        {"include": "w?"},
        {"exclude": ["q", "k", "v"]},
        {"include": ["no"]},
        {"exclude": ["*"]},
    ]
    yield from _each("block", 4, *picks, **FAST)
    yield from _each("net", 4, {"include": ["depth"]}, {"exclude": ["stem"]}, **FAST)
    yield from _each("decoder", 4, {"decode_steps": 0}, {"decode_steps": 2}, {"max_memory": "1kB"}, **FAST)
    yield from _each(
        "block", 4, {"output": None}, {"external_data": True}, {"shard_size": 4000}, {"shard_size": 4000, "output": None}, **FAST
    )
    yield from _of_stages()
    yield from _of_chains()
    yield from _of_recipes()
    wrong: list[Options] = [
        {"bits": 9},
        {"bits": 1, "block_size": 24, "format": "qdq"},
        {"bit": 4},
        {"format": "int8"},
        {"effort": "most"},
        {"effort": "best", "quantizer": "rtn"},
        {"quantizer": "gpqt"},
        {"target": "x86"},
        {"target": "generic", "accumulator_bits": 16},
        {"target_size": "much"},
        {"target_size": "30%", "max_loss": "1%"},
        {"target_size": "30%", "bits": 4},
        {"max_loss": "5"},
        {"conv_bits": 2},
        {"conv_form": "fold", "conv_bits": None},
        {"embedding_bits": 4},
        {"embeddings": "all"},
        {"embeddings": "dequantize", "embedding_bits": 4},
        {"activation_type": "int8"},
        {"accuracy_level": 4, "format": "qdq"},
        {"accuracy_level": 7},
        {"low_rank": -1},
        {"preset": "none"},
        {"provider": "tpu"},
        {"batch_size": 0},
        {"max_memory": "lots"},
        {"shard_size": 0},
        {"include": 5},
        {"requantize": "yes"},
        {"layers": 5},
        {"custom_ops": [f"{FOLDER}/there-is-none.so"]},
        {"model": "there-is-none.onnx"},
        {"model": None},
        {"model": 5},
        {"calibration": "there-is-none.npz"},
        {"calibration": []},
        {"calibration": [{"z": 1}]},
        {"output": f"{FOLDER}/there/is/none.onnx"},
        {"recipe": {"colour": 1, "bits": 11}},
        {"recipe": "there-is-none.toml"},
    ]
    yield from (Case(f"wrong/{_named(options)}", "chain", 4, (options,)) for options in wrong)


def _of_stages() -> Iterator[Case]:
    """List runs in little memory and runs that go on, with the model in a file."""
    settings: list[Options] = [
        {"effort": "fast"},
        {"effort": "balanced", "bits": 3},
        {"effort": "fast", "low_rank": 4, "bias": "any"},
        {"effort": "balanced", "format": "qdq"},
        {"format": "qdq-int8"},
        {"format": "dynamic-int8", "target": "x86-avx2"},
        {"pipeline_text": "magr{alpha=1e-3}"},
        {"pipeline_text": "magr{alpha=1e-3},quantize{method=gptq},compensate-bias"},
        {"effort": "fast", "equalize": True},
        {"effort": "fast", "target_size": "70%"},
    ]
    for model in ("block", "net", "words", "tied"):
        for options in settings:
            large, job = {**options, "max_memory": "1kB"}, {"resume": f"{FOLDER}/job"}
            yield Case(f"large/{model}/{_named(options)}", model, 4, (large,), saved=True)
            yield Case(f"resume/{model}/{_named(options)}", model, 4, ({**options, **job},) * 2, saved=True, cut="job/**/*.npz")
    yield Case("large/resume", "block", 4, ({"max_memory": "1kB", "resume": f"{FOLDER}/job", **FAST},) * 2, saved=True, cut="job/**/*.npz")
    yield Case("large/shards", "block", 4, ({"max_memory": "1kB", "shard_size": 8000, **FAST},), saved=True)
    yield Case("large/free", "block", 0, ({"max_memory": "1kB", "embeddings": "dequantize"},), saved=True)
    other = ({"resume": f"{FOLDER}/job", **FAST}, {"resume": f"{FOLDER}/job", "bits": 3, **FAST})
    yield Case("resume/other", "block", 4, other, saved=True)


def _of_chains() -> Iterator[Case]:
    """List models that are quantized already, and quantized again."""
    for model in ("chain", "net", "words"):
        for form in FORMATS:
            given = f"{FOLDER}/0/q.onnx"
            first: Options = {"format": form, "embeddings": "dequantize" if form.startswith("qdq") else "none", **FAST}
            for then in ("matmulnbits", "qdq"):
                again: Options = {"model": given, "format": then, "requantize": True, "bits": 3, **FAST}
                yield Case(f"again/{model}/{form}/{then}", model, 4, (first, again))
            yield Case(f"again/{model}/{form}/left", model, 4, (first, {"model": given, **FAST}))


def _of_recipes() -> Iterator[Case]:
    """List recipes, as tables and in files, and forms of data."""
    lines = 'version = 1\nmodel = "model.onnx"\ncalibration = "data.npz"\nbatch_size = 6\neffort = "fast"\n'
    table = '\n[[layer]]\nmatch = "*head*"\nbits = 8\nblock_size = "channel"\n'
    recipes = {
        "plain": lines,
        "layers": lines + "bits = 3\n" + table,
        "preset": lines.replace('effort = "fast"', 'preset = "llm-int4"') + table,
        "pipeline": lines.replace('effort = "fast"', 'pipeline = "magr,quantize{bits=4},emit-qdq"'),
        "lists": lines + 'exclude = ["q", "k"]\nexternal_data = true\nvalidation = "data.npz"\n',
        "wrong": lines + "bits = 11\ncolour = 1\n" + table.replace("bits", "format"),
        "no version": lines.replace("version = 1", ""),
        "no toml": lines + "= 3",
    }
    for name, text in recipes.items():
        given: Options = {"model": None, "recipe": f"{FOLDER}/recipe.toml"}
        files = {"recipe.toml": text}
        yield Case(f"recipe/{name}", "block", 4, (given,), form="file", saved=True, texts=files)
        over: Options = {"bits": 4, "include": ["up", "lm_head"]}
        yield Case(f"recipe/{name}/over", "block", 4, ({**given, **over},), form="file", saved=True, texts=files)
    yield from _each("block", 4, {"recipe": {"bits": 3, "layer": [{"match": "up", "bits": 8}], **FAST}})
    yield from _each("block", 4, {"recipe": {"preset": "llm-int2", "accuracy_level": 1}, "bits": 4, "quantizer": "gptq"})
    yield from (Case(f"data/{form}", "block", 4, ({"batch_size": 6, **FAST},), form=form) for form in ("stacked", "npz", "folder"))
    yield Case("data/validated", "block", 4, ({"validation_data": f"{FOLDER}/data.npz", **FAST},), form="npz")


def _of_zoo() -> Iterator[Case]:
    """List every trap in every format, with data and without."""
    for name, trap in ZOO.items():
        for form in FORMATS:
            size: Options = {"block_size": 16} if form == "matmulnbits" else {"block_size": None}
            for batches in (0, 4):
                options = {"format": form, "bits": 8, **size, **trap.options}
                yield Case(f"zoo/{name}/{form}/{'calibrated' if batches else 'free'}", f"zoo:{name}", batches, (options,))


@functools.cache
def cases() -> dict[str, Case]:
    """List all cases by name."""
    found: dict[str, Case] = {}
    for group in (_of_bundled, _of_solvers, _of_formats, _of_runs, _of_zoo):
        for case in group():
            if found.setdefault(case.name, case) != case:
                raise ValueError(f"two cases are called {case.name}")
    return found


# --- Runs ---------------------------------------------------------------------------------------------------------------------


def _digest(content: bytes | str) -> str:
    """Hash bytes or text."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def _placed(value: Any, folder: Path) -> Any:
    """Put real folders into options."""
    if isinstance(value, str):
        return value.replace(FOLDER, str(folder))
    return type(value)(_placed(each, folder) for each in value) if isinstance(value, list | tuple) else value


def _plain(text: str, folder: Path) -> str:
    """Take real folders out of a text; those for onnxruntime in a process of its own have random names, which its errors quote."""
    text = text.replace(str(folder), FOLDER).replace(str(bundled.MODEL.parent), BUNDLED)
    return re.sub(r"[^\s'\"]*/onnx-magr-\w+", "<temporary>", text)


def _given(case: Case, model: Any, folder: Path) -> Any:
    """Put the data of a case into the form in which it is given."""
    batches = _data(case, model)
    if not batches:
        return None
    if case.form == "list":
        return batches
    if case.form == "text":
        path = folder / "data.txt"
        path.write_text("The sea was calm that day.\nA second line, of other words, and a longer one.\nShort.\n" * case.batches)
        return path
    if case.form == "folder":
        (folder / "data").mkdir()
        for i, batch in enumerate(batches):
            np.savez(folder / "data" / f"{i}.npz", **batch)
        return folder / "data"
    stacked: dict[str, Any] = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    if case.form == "stacked":
        return stacked
    np.savez(folder / "data.npz", **stacked)
    return folder / "data.npz"


def _untimed(report: Any) -> Any:
    """Take latencies out of a report."""
    compared = {name: getattr(report, name, None) for name in ("validation", "check")}
    return replace(report, **{name: replace(each, latency=None) for name, each in compared.items() if each is not None})


def _text(report: Any) -> str:
    """Write a report without its times, with the pipeline and the call."""
    lines = [line for line in _untimed(report).to_text(width=WIDTH).splitlines() if not line.startswith("time  ")]
    return "\n".join([*lines, report.pipeline, report.command])


def _details(report: Any) -> str:
    """Write all data of a report as JSON, but for times and versions."""
    values = _untimed(report).to_dict()
    for name in ("seconds", "versions"):
        del values[name]
    return json.dumps(values, sort_keys=True)


def _call(case: Case, number: int, model: Any, data: Any, folder: Path) -> Value:
    """Make one call of a case, and hash what it says."""
    out = folder / str(number)
    out.mkdir()
    said: list[str] = []
    options = _placed_options(case.calls[number], folder)
    arguments: Options = {"model": model, "calibration": data, "output": out / "q.onnx"}
    if case.form == "file":
        del arguments["calibration"]
    watch: Options = {
        "progress": lambda stage, done, total: said.append(f"{stage} {done}/{total}"),
        "on_layer": lambda row: said.append(f"{row.name} {row.bits} {row.error!r}"),
    }
    try:
        result = magr_onnx.optimize(**{**arguments, **watch, **options})
    except Exception as error:
        return {"error": _plain(f"{type(error).__name__}: {error}", folder)}
    found: Value = {
        "report": _digest(_plain(_text(result.report), folder)),
        "details": _digest(_plain(_details(result.report), folder)),
        "progress": _digest(_plain("\n".join(said), folder)),
    }
    if options.get("output", "") is None:
        found["model"] = _digest(ir.to_proto(result.model).SerializeToString(deterministic=True))
    return found


def _placed_options(options: Options, folder: Path) -> Options:
    """Put real folders into the options of a call."""
    return {name: _placed(value, folder) for name, value in options.items()}


def run(name: str) -> tuple[str, Value, float]:
    """Make the calls of a case; its name, its value, and seconds."""
    case, begin = cases()[name], time.perf_counter()
    value: Value = {}
    with tempfile.TemporaryDirectory(prefix="golden-") as at:
        folder = Path(at).resolve()
        model = _model(case)
        data = _given(case, model, folder)
        if case.saved:
            onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="model.data", size_threshold=0)
            model = folder / "model.onnx"
        for file, text in case.texts.items():
            (folder / file).write_text(text)
        for number in range(len(case.calls)):
            if number and case.cut:
                for path in sorted(folder.glob(case.cut))[::2]:
                    path.unlink()
            value |= {f"{key} {number}" if number else key: found for key, found in _call(case, number, model, data, folder).items()}
        outs = [folder / str(number) for number in range(len(case.calls))]
        files = sorted(path for out in outs for path in out.rglob("*") if path.is_file())
        value["files"] = {path.relative_to(folder).as_posix(): _digest(path.read_bytes()) for path in files}
    return name, value, time.perf_counter() - begin


def run_all(names: Sequence[str], jobs: int) -> dict[str, Value]:
    """Run cases, in this process or in several, and say how far they are."""
    found: dict[str, Value] = {}
    seconds: dict[str, float] = {}
    terminal = sys.stderr.isatty()

    def take(results: Iterator[tuple[str, Value, float]]) -> None:
        for name, value, took in results:
            found[name], seconds[name] = value, took
            if terminal or len(found) % 100 == 0:
                print(f"{len(found)}/{len(names)} {name}", file=sys.stderr, end="\x1b[K\r" if terminal else "\n")

    begin = time.perf_counter()
    if jobs == 1:
        take(map(run, names))
    else:
        with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            take(pool.map(run, names))
    slowest = sorted(seconds, key=lambda name: -seconds[name])[:5]
    print(f"{len(found)} cases in {time.perf_counter() - begin:.0f} s; {sum(map(_failed, found.values()))} raise errors", file=sys.stderr)
    print(f"slowest: {', '.join(f'{name} {seconds[name]:.1f} s' for name in slowest)}", file=sys.stderr)
    return found


def _failed(value: Value) -> bool:
    """Tell whether a call of a case raised an error."""
    return any(key.startswith("error") for key in value)


def environment() -> dict[str, str]:
    """Name what the hashes depend on beside the code."""
    found = {"python": platform.python_version(), "machine": platform.machine(), "processors": str(os.cpu_count())}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


def differences(old: Mapping[str, Value], new: Mapping[str, Value]) -> list[str]:
    """Say what differs, a line a case."""
    found = []
    for name in dict.fromkeys([*old, *new]):
        a, b = old.get(name), new.get(name)
        if a is None or b is None:
            found.append(f"{name}: {'only new' if a is None else 'missing'}")
        elif a != b:
            keys = [key for key in dict.fromkeys([*a, *b]) if a.get(key) != b.get(key)]
            found.append(f"{name}: {', '.join(_difference(key, a.get(key), b.get(key)) for key in keys)}")
    return found


def _difference(key: str, old: Any, new: Any) -> str:
    """Say what differs in one part of a case."""
    if isinstance(old, dict) and isinstance(new, dict):
        return f"{key} ({', '.join(name for name in dict.fromkeys([*old, *new]) if old.get(name) != new.get(name))})"
    return f"{key} ({old} -> {new})" if key.startswith("error") or old is None or new is None else key


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; 1 where something differs."""
    parser = argparse.ArgumentParser(description="Hash what magr_onnx.optimize writes and reports, for many models and options.")
    parser.add_argument("file", type=Path, help="JSON file to write the hashes to")
    parser.add_argument("--compare", type=Path, metavar="OLD", help="JSON file of another run: print what differs, exit with 1 if anything")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default 1)")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="shell pattern of the names of cases to run")
    given = parser.parse_args(arguments)
    names = [name for name in cases() if fnmatch.fnmatchcase(name, given.only)]
    if not names:
        parser.error(f"no case matches {given.only!r}")
    print(f"magr_onnx at {Path(magr_onnx.__file__).parent}", file=sys.stderr)
    result: dict[str, Any] = {"environment": environment(), "cases": run_all(names, given.jobs)}
    given.file.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if given.compare is None:
        return 0
    old = json.loads(given.compare.read_text(encoding="utf-8"))
    if old["environment"] != result["environment"]:
        print(f"the environment differs: {old['environment']} -> {result['environment']}")
    before = {name: value for name, value in old["cases"].items() if fnmatch.fnmatchcase(name, given.only)}
    found = differences(before, result["cases"])
    print("\n".join([*found, f"{len(found)} of {len(names)} cases differ"]))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
