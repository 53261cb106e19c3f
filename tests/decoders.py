"""Small decoders with a cache of keys and values, in the forms that exporters write: random weights, the mathematics of Llama."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from magr_onnx.models import bundled
from tests.graphs import Array, random

VOCAB, HIDDEN, HEADS, KV_HEADS, SIZE, INNER, LAYERS, LONGEST = 96, 64, 4, 2, 16, 96, 2, 64
WINDOW = 6
INT64, FLOAT = ir.DataType.INT64, ir.DataType.FLOAT


class _Graph:
    """Nodes with names of exporters; operators of com.microsoft have their domain before them."""

    def __init__(self, past: int | str = "past_sequence_length", total: str = "total_sequence_length", size: int | str = SIZE) -> None:
        self.past, self.total, self.size = past, total, size
        self.inputs: list[ir.Value] = []
        self.outputs: list[ir.Value] = []
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}

    def input(self, name: str, shape: list[int | str], dtype: ir.DataType = INT64) -> ir.Value:
        self.inputs.append(ir.val(name, dtype, shape))
        return self.inputs[-1]

    def constant(self, name: str, array: Any) -> ir.Value:
        if name not in self.initializers:
            tensor = ir.tensor(np.asarray(array), name=name)
            self.initializers[name] = ir.Value(
                name=name, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
            )
        return self.initializers[name]

    def integers(self, *values: int) -> ir.Value:
        return self.constant(f"/model/constants/INT64/{list(values)}", np.array(values))

    def op(self, op: str, inputs: list[ir.Value | None], name: str, outputs: int = 1, **attributes: Any) -> Any:
        domain, _, kind = op.rpartition("::")
        node = ir.node(kind, inputs, attributes, domain=domain, num_outputs=outputs, name=name)
        for i, value in enumerate(node.outputs):
            value.name = f"{name}/output_{i}"
        self.nodes.append(node)
        return node.outputs[0] if outputs == 1 else node.outputs

    def linear(self, x: ir.Value, k: int, n: int, name: str, seed: int) -> ir.Value:
        weight = self.constant(f"{name.strip('/').replace('/', '.')}.weight", random(k, n, seed=seed, scale=1.5 / k**0.5))
        result: ir.Value = self.op("MatMul", [x, weight], name)
        return result

    def output(self, value: ir.Value, name: str, shape: list[int | str], dtype: ir.DataType = FLOAT) -> None:
        value.name, value.shape, value.dtype = name, ir.Shape(shape), dtype
        self.outputs.append(value)

    def cache(self, layer: int) -> list[ir.Value]:
        shape = ["batch_size", KV_HEADS, self.past, self.size]
        return [self.input(f"past_key_values.{layer}.{kind}", shape, FLOAT) for kind in ("key", "value")]

    def present(self, layer: int, values: list[ir.Value]) -> None:
        shape = ["batch_size", KV_HEADS, self.total, self.size]
        for kind, value in zip(("key", "value"), values, strict=True):
            self.output(value, f"present.{layer}.{kind}", shape)

    def mlp(self, x: ir.Value, name: str, seed: int) -> ir.Value:
        gate = self.linear(x, HIDDEN, INNER, f"{name}/gate_proj/MatMul", seed)
        up = self.linear(x, HIDDEN, INNER, f"{name}/up_proj/MatMul", seed + 1)
        silu = self.op("Mul", [gate, self.op("Sigmoid", [gate], f"{name}/act_fn/Sigmoid")], f"{name}/act_fn/Mul")
        return self.linear(self.op("Mul", [silu, up], f"{name}/Mul"), INNER, HIDDEN, f"{name}/down_proj/MatMul", seed + 2)

    def table(self) -> ir.Value:
        return self.constant("model.embed_tokens.weight", random(VOCAB, HIDDEN, seed=90, scale=1.0))

    def norm(self, name: str) -> ir.Value:
        return self.constant(name, 1 + random(HIDDEN, seed=len(name)))

    def model(self) -> ir.Model:
        graph = ir.Graph(
            self.inputs,
            self.outputs,
            nodes=self.nodes,
            initializers=list(self.initializers.values()),
            opset_imports={"": 17, "com.microsoft": 1},
            name="main_graph",
        )
        return ir.Model(graph, ir_version=8)


def angles() -> tuple[Array, Array]:
    """Cosines and sines of rotary embeddings ``(LONGEST, SIZE / 2)``."""
    turns = np.arange(LONGEST)[:, None] / 100 ** (np.arange(SIZE // 2) / (SIZE // 2))
    return np.cos(turns).astype(np.float32), np.sin(turns).astype(np.float32)


def genai(past: int | str = "past_sequence_length", packed: bool = False, window: bool = False) -> ir.Model:
    """As onnxruntime-genai's builder writes it for the CPU: GroupQueryAttention that rotates, its lengths computed from the mask.

    ``past`` is the third dimension of the cache: a name, or the size of a buffer. ``packed`` is what newer versions write: queries, keys
    and values in one product, and a name for the size of a head. ``window`` is a cache of `WINDOW` tokens, of which no more are looked at.
    """
    windowed = {"local_window_size": WINDOW, "sliding_window_cache": 1} if window else {}
    g = _Graph("past_sliding_length" if window else past, size="kv_cache_dim" if packed else SIZE)
    ids = g.input("input_ids", ["batch_size", "sequence_length"])
    mask = g.input("attention_mask", ["batch_size", "total_sequence_length"])
    x = g.op("Gather", [g.table(), ids], "/model/embed_tokens/Gather")
    lengths, total = _lengths(g, mask)
    cos, sin = (g.constant(n, a) for n, a in zip(("cos_cache", "sin_cache"), angles(), strict=True))
    normed = g.op("SimplifiedLayerNormalization", [x, g.norm("model.layers.0.input_layernorm.weight")], "/model/layers.0/input_layernorm")
    residual = x
    for i in range(LAYERS):
        at = f"/model/layers.{i}"
        if packed:
            q, k, v = g.linear(normed, HIDDEN, (HEADS + 2 * KV_HEADS) * SIZE, f"{at}/attn/qkv_proj/MatMul", 10 * i), None, None
        else:
            q, k, v = (
                g.linear(normed, HIDDEN, n * SIZE, f"{at}/attn/{p}_proj/MatMul", 10 * i + j)
                for j, (p, n) in enumerate((("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)))
            )
        attention = g.op(
            "com.microsoft::GroupQueryAttention",
            [q, k, v, *g.cache(i), lengths, total, cos, sin],
            f"{at}/attn/GroupQueryAttention",
            3,
            num_heads=HEADS,
            kv_num_heads=KV_HEADS,
            do_rotary=1,
            rotary_interleaved=0,
            **windowed,
        )
        g.present(i, list(attention[1:]))
        o = g.linear(attention[0], HIDDEN, HIDDEN, f"{at}/attn/o_proj/MatMul", 10 * i + 3)
        normed, residual = _skip_norm(g, residual, o, f"{at}/post_attention_layernorm")
        down = g.mlp(normed, f"{at}/mlp", 10 * i + 4)
        last = i == LAYERS - 1
        normed, residual = _skip_norm(g, residual, down, "/model/final_norm" if last else f"/model/layers.{i + 1}/input_layernorm")
    logits = g.linear(normed, HIDDEN, VOCAB, "/lm_head/MatMul", 80)
    g.output(logits, "logits", ["batch_size", "sequence_length", VOCAB])
    return g.model()


def _lengths(g: _Graph, mask: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Tokens before the last one of every sample, and the length of the mask, as GroupQueryAttention takes them."""
    name = "/model/attn_mask_reformat/attn_mask_subgraph"
    counted = g.op("Sub", [g.op("ReduceSum", [mask, g.integers(1)], f"{name}/ReduceSum", keepdims=0), g.integers(1)], f"{name}/Sub")
    lengths = g.op("Cast", [counted], f"{name}/Sub/Cast", to=ir.DataType.INT32)
    index = g.constant("/model/constants/INT64/1", np.int64(1))
    total = g.op("Gather", [g.op("Shape", [mask], f"{name}/Shape"), index], f"{name}/Gather", axis=0)
    total = g.op("Cast", [total], f"{name}/Gather/Cast", to=ir.DataType.INT32)
    return lengths, total


def _skip_norm(g: _Graph, x: ir.Value, skip: ir.Value, name: str) -> tuple[ir.Value, ir.Value]:
    weight = g.norm(f"{name.strip('/').replace('/', '.')}.weight")
    out = g.op("com.microsoft::SkipSimplifiedLayerNormalization", [x, skip, weight], f"{name}/SkipLayerNorm", 4, epsilon=1e-5)
    out[1].name = out[2].name = ""
    return out[0], out[3]


def optimum() -> ir.Model:
    """As optimum exports it: plain ONNX, the past concatenated, mask and rotary embeddings from position_ids and the mask."""
    g = _Graph(total="past_sequence_length + sequence_length")
    ids = g.input("input_ids", ["batch_size", "sequence_length"])
    mask = g.input("attention_mask", ["batch_size", "past_sequence_length + sequence_length"])
    positions = g.input("position_ids", ["batch_size", "sequence_length"])
    caches = [g.cache(i) for i in range(LAYERS)]
    x = g.op("Gather", [g.table(), ids], "/model/embed_tokens/Gather")
    cos, sin = (
        g.op("Unsqueeze", [g.op("Gather", [g.constant(n, a), positions], f"/model/rotary_emb/{n}/Gather"), g.integers(1)], f"/model/{n}")
        for n, a in zip(("cos", "sin"), angles(), strict=True)
    )
    bias = _bias(g, mask, ids)
    for i in range(LAYERS):
        at = f"/model/layers.{i}"
        normed = _norm(g, x, f"{at}/input_layernorm")
        q, k, v = (
            _heads(g, g.linear(normed, HIDDEN, n * SIZE, f"{at}/self_attn/{p}_proj/MatMul", 10 * i + j), n, f"{at}/self_attn/{p}")
            for j, (p, n) in enumerate((("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)))
        )
        q, k = (_rotated(g, y, cos, sin, f"{at}/self_attn/{p}_rotary") for y, p in ((q, "q"), (k, "k")))
        keys, values = (
            g.op("Concat", [past, new], f"{at}/self_attn/Concat_{j}", axis=2)
            for j, (past, new) in enumerate(zip(caches[i], (k, v), strict=True))
        )
        g.present(i, [keys, values])
        many_keys, many_values = (_repeated(g, y, f"{at}/self_attn/repeat_{p}") for y, p in ((keys, "k"), (values, "v")))
        turned = g.op("Transpose", [many_keys], f"{at}/self_attn/Transpose", perm=[0, 1, 3, 2])
        scores = g.op("MatMul", [q, turned], f"{at}/self_attn/MatMul")
        scores = g.op("Mul", [scores, g.constant("scale", np.float32(SIZE**-0.5))], f"{at}/self_attn/Mul")
        p = g.op("Softmax", [g.op("Add", [scores, bias], f"{at}/self_attn/Add")], f"{at}/self_attn/Softmax", axis=-1)
        mixed = g.op("Transpose", [g.op("MatMul", [p, many_values], f"{at}/self_attn/MatMul_1")], f"{at}/self_attn/out", perm=[0, 2, 1, 3])
        flat = g.op("Reshape", [mixed, g.integers(0, 0, HIDDEN)], f"{at}/self_attn/Reshape")
        x = g.op("Add", [x, g.linear(flat, HIDDEN, HIDDEN, f"{at}/self_attn/o_proj/MatMul", 10 * i + 3)], f"{at}/Add")
        down = g.mlp(_norm(g, x, f"{at}/post_attention_layernorm"), f"{at}/mlp", 10 * i + 4)
        x = g.op("Add", [x, down], f"{at}/Add_1")
    logits = g.linear(_norm(g, x, "/model/norm"), HIDDEN, VOCAB, "/lm_head/MatMul", 80)
    g.output(logits, "logits", ["batch_size", "sequence_length", VOCAB])
    return g.model()


def _norm(g: _Graph, x: ir.Value, name: str) -> ir.Value:
    mean = g.op("ReduceMean", [g.op("Mul", [x, x], f"{name}/Pow")], f"{name}/ReduceMean", axes=[-1])
    root = g.op("Sqrt", [g.op("Add", [mean, g.constant("epsilon", np.float32(1e-5))], f"{name}/Add")], f"{name}/Sqrt")
    scaled = g.op("Div", [x, root], f"{name}/Div")
    result: ir.Value = g.op("Mul", [scaled, g.norm(f"{name.strip('/').replace('/', '.')}.weight")], f"{name}/Mul")
    return result


def _heads(g: _Graph, x: ir.Value, heads: int, name: str) -> ir.Value:
    split = g.op("Reshape", [x, g.integers(0, 0, heads, SIZE)], f"{name}_heads/Reshape")
    result: ir.Value = g.op("Transpose", [split], f"{name}_heads/Transpose", perm=[0, 2, 1, 3])
    return result


def _rotated(g: _Graph, x: ir.Value, cos: ir.Value, sin: ir.Value, name: str) -> ir.Value:
    a, b = g.op("Split", [x, g.integers(SIZE // 2, SIZE // 2)], f"{name}/Split", 2, axis=-1)
    parts = [[g.op("Mul", [half, turn], f"{name}/Mul_{i}{j}") for j, turn in enumerate((cos, sin))] for i, half in enumerate((a, b))]
    left = g.op("Sub", [parts[0][0], parts[1][1]], f"{name}/Sub")
    right = g.op("Add", [parts[1][0], parts[0][1]], f"{name}/Add")
    result: ir.Value = g.op("Concat", [left, right], f"{name}/Concat", axis=-1)
    return result


def _repeated(g: _Graph, x: ir.Value, name: str) -> ir.Value:
    """Every head of keys or values for the heads of queries that share it."""
    one = g.op("Unsqueeze", [x, g.integers(2)], f"{name}/Unsqueeze")
    many = g.op("Expand", [one, g.integers(1, 1, HEADS // KV_HEADS, 1, 1)], f"{name}/Expand")
    result: ir.Value = g.op("Reshape", [many, g.integers(0, HEADS, -1, SIZE)], f"{name}/Reshape")
    return result


def _bias(g: _Graph, mask: ir.Value, ids: ir.Value) -> ir.Value:
    """0 where a token may look, a large negative number where not, ``(B, 1, T, past + T)``."""
    one, zero = (g.constant(f"scalar_{i}", np.int64(i)) for i in (1, 0))
    total = g.op("Gather", [g.op("Shape", [mask], "/model/Shape"), one], "/model/Gather")
    now = g.op("Gather", [g.op("Shape", [ids], "/model/Shape_1"), one], "/model/Gather_1")
    columns = g.op("Range", [zero, total, one], "/model/Range")
    rows = g.op("Range", [g.op("Sub", [total, now], "/model/Sub"), total, one], "/model/Range_1")
    before = g.op("LessOrEqual", [columns, g.op("Unsqueeze", [rows, g.integers(1)], "/model/Unsqueeze")], "/model/LessOrEqual")
    real = g.op("Cast", [g.op("Unsqueeze", [mask, g.integers(1, 2)], "/model/Unsqueeze_1")], "/model/Cast", to=ir.DataType.BOOL)
    seen = g.op("And", [real, before], "/model/And")
    result: ir.Value = g.op("Where", [seen, g.constant("nothing", np.float32(0)), g.constant("far", np.float32(-1e9))], "/model/Where")
    return result


def tokens(samples: int = 16, length: int = 12, seed: int = 0) -> Array:
    """Token ids ``(samples, length)``."""
    return np.random.default_rng(seed).integers(0, VOCAB, (samples, length))


def tokenizer(path: Path) -> None:
    """A tokenizer of the words ``w0`` to ``w95``."""
    vocabulary = {f"w{i}": i for i in range(VOCAB)}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w0"}
    parts = {"normalizer": None, "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None}
    path.write_text(json.dumps({"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], **parts, "model": model}))


def bundled_folder(folder: Path) -> None:
    """The bundled language model as onnxruntime-genai's builder writes one, with its tokenizer, a chat template and a configuration."""
    folder.mkdir()
    onnx.save(ir.to_proto(_bundled()), str(folder / "model.onnx"), save_as_external_data=True, location="model.onnx.data")
    (folder / "tokenizer.json").write_bytes((bundled.FOLDER / "tokenizer.json").read_bytes())
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 128}')
    (folder / "chat_template.jinja").write_text("{% for message in messages %}{{ message['content'] }}\n{% endfor %}")
    caches = {f"{when}_{kind}_names": f"{name}.%d.{kind}" for when, name in PASTS for kind in ("key", "value")}
    ends = {f"{kind}_token_id": 1023 for kind in ("bos", "eos", "pad")}  # a merge that greedy text has no use for
    sizes = {"head_size": 32, "hidden_size": 160, "num_attention_heads": 5, "num_hidden_layers": 5, "num_key_value_heads": 5}
    inputs = {name: name for name in ("input_ids", "attention_mask", "position_ids")}
    decoder = {
        "session_options": {"provider_options": []},
        "filename": "model.onnx",
        "inputs": inputs | {name: text for name, text in caches.items() if name.startswith("past")},
        "outputs": {"logits": "logits"} | {name: text for name, text in caches.items() if name.startswith("present")},
        **sizes,
    }
    config = {
        "model": {"type": "phi", "context_length": 128, "vocab_size": 1024, **ends, "decoder": decoder},
        "search": {"do_sample": False, "max_length": 128, "num_beams": 1, "past_present_share_buffer": True},
    }
    (folder / "genai_config.json").write_text(json.dumps(config, indent=4))


PASTS = (("past", "past_key_values"), ("present", "present"))


def _bundled() -> ir.Model:
    """The weights of the bundled model in GroupQueryAttention and SkipLayerNormalization, with a KV cache."""
    source = ir.load(bundled.MODEL)
    weights = {name: value.const_value.numpy() for name, value in source.graph.initializers.items() if value.const_value is not None}
    products = [node.inputs[1].name for node in source.graph if node.op_type == "MatMul"]  # type: ignore[union-attr]
    matrices = iter([weights[name] for name in products if name in weights])
    g = _Graph()
    ids = g.input("input_ids", ["batch_size", "sequence_length"])
    mask = g.input("attention_mask", ["batch_size", "total_sequence_length"])
    positions = g.input("position_ids", ["batch_size", "sequence_length"])
    tables = [
        g.op("Gather", [g.constant(f"model.{name}.weight", weights[f"{name}.weight"]), value], f"/model/{name}/Gather")
        for name, value in (("tokens", ids), ("positions", positions))
    ]
    lengths, total = _lengths(g, mask)

    def linear(x: ir.Value, name: str, bias: str | None = None) -> ir.Value:
        y = g.op("MatMul", [x, g.constant(f"{name.strip('/')}.weight", next(matrices))], f"{name}/MatMul")
        return y if bias is None else g.op("Add", [y, g.constant(bias, weights[bias])], f"{name}/Add")

    def norm(x: ir.Value, skip: ir.Value, at: str) -> tuple[ir.Value, ir.Value]:
        scale, shift = (g.constant(f"{at}.{kind}", weights[f"{at}.{kind}"]) for kind in ("weight", "bias"))
        name = f"/model/{at}/SkipLayerNorm"
        out = g.op("com.microsoft::SkipLayerNormalization", [x, skip, scale, shift], name, 4, epsilon=1e-5)
        out[1].name = out[2].name = ""
        return out[0], out[3]

    normed, residual = norm(tables[0], tables[1], "blocks.0.norm1")
    for i in range(5):
        at, qkv = f"/model/layers.{i}", linear(normed, f"/model/layers.{i}/attn/qkv_proj", f"blocks.{i}.qkv.bias")
        caches = [g.input(f"past_key_values.{i}.{kind}", ["batch_size", 5, g.past, 32], FLOAT) for kind in ("key", "value")]
        inputs = [qkv, None, None, *caches, lengths, total]
        attention = g.op("com.microsoft::GroupQueryAttention", inputs, f"{at}/attn/GroupQueryAttention", 3, num_heads=5, kv_num_heads=5)
        for kind, value in zip(("key", "value"), attention[1:], strict=True):
            g.output(value, f"present.{i}.{kind}", ["batch_size", 5, g.total, 32])
        normed, residual = norm(residual, linear(attention[0], f"{at}/attn/o_proj", f"blocks.{i}.proj.bias"), f"blocks.{i}.norm2")
        inner = g.op("com.microsoft::FastGelu", [linear(normed, f"{at}/mlp/fc1", f"blocks.{i}.up.bias")], f"{at}/mlp/act_fn/FastGelu")
        down = linear(inner, f"{at}/mlp/fc2", f"blocks.{i}.down.bias")
        normed, residual = norm(residual, down, "norm" if i == 4 else f"blocks.{i + 1}.norm1")
    g.output(linear(normed, "/lm_head"), "logits", ["batch_size", "sequence_length", 1024])
    return g.model()


KINDS: dict[str, Callable[[], ir.Model]] = {
    "genai": genai,
    "genai, packed": lambda: genai(packed=True),
    "genai with a fixed buffer": lambda: genai(32),
    "genai with a sliding window": lambda: genai(window=True),
    "optimum": optimum,
}
