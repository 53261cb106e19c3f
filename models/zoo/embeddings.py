"""Tables that rows are gathered from. The weight of a table is itself, ``(rows, width)``."""

from __future__ import annotations

import numpy as np

from magr_onnx.models.zoo.trap import CONVERTED, Tensor, Trap, constant, model

UNASKED = "tables of embeddings stay float (option embeddings quantizes them)"
TABLE, W = constant("table", 1024, 64) * np.float32(16), constant("w", 64, 24)


def tokens(rng: np.random.Generator) -> dict[str, Tensor]:
    """Indices of rows, from either end."""
    return {"i": rng.integers(-1024, 1024, (3, 7))}


def gathered(table: Tensor, feeds: dict[str, Tensor]) -> Tensor:
    """One row after the other."""
    return np.stack([np.stack([table[int(i)] for i in row]) for row in feeds["i"]])


LOOKED_UP = """g (int64[n, t] i) => (float[n, t, 24] y) {
    [emb] h = Gather(table, i)
    [fc] y = MatMul(h, w)
}"""

TRAPS = (
    Trap(
        "table-left-float",
        lambda: model(LOOKED_UP, table=TABLE, w=W),
        tokens,
        lambda feeds, weights: [gathered(TABLE, dict(feeds)) @ weights["fc"]],
        {"emb": UNASKED, "fc": CONVERTED},
    ),
    *(
        Trap(
            f"table-{form}-{bits}",
            lambda: model(LOOKED_UP, table=TABLE, w=W),
            tokens,
            lambda feeds, weights: [gathered(weights["emb"], dict(feeds)) @ weights["fc"]],
            {"emb": CONVERTED, "fc": CONVERTED},
            {"embeddings": form, "embedding_bits": bits},
        )
        for form, bits in (("gather-block-quantized", 8), ("dequantize", 8))
    ),
    Trap(
        "table-alone",
        lambda: model("g (int64[n, t] i) => (float[n, t, 64] y) { [emb] y = Gather(table, i) }", table=TABLE),
        tokens,
        lambda feeds, weights: [gathered(weights["emb"], dict(feeds))],
        {"emb": CONVERTED},
        {"embeddings": "gather-block-quantized"},
    ),
    Trap(
        "table-of-half-precision-and-int32-indices",
        lambda: model(
            "g (int32[n, t] i) => (float16[n, t, 64] y) { [emb] y = Gather<axis = -2>(table, i) }", table=TABLE.astype(np.float16)
        ),
        lambda rng: {"i": rng.integers(0, 1024, (3, 7)).astype(np.int32)},
        lambda feeds, weights: [gathered(weights["emb"], dict(feeds)).astype(np.float16)],
        {"emb": CONVERTED},
        {"embeddings": "dequantize"},
    ),
    Trap(
        "table-tied-to-the-last-layer",
        lambda: model(
            """g (int64[n, t] i) => (float[n, t, 1024] y) {
                [emb] h = Gather(table, i)
                r = Relu(h)
                v = Transpose<perm = [1, 0]>(table)
                [head] y = MatMul(r, v)
            }""",
            table=constant("table", 1024, 64) * np.float32(4),
        ),
        tokens,
        lambda feeds, weights: [np.maximum(gathered(weights["emb"], dict(feeds)), 0) @ weights["head"]],
        {"emb": CONVERTED, "head": CONVERTED},
        {"embeddings": "gather-block-quantized"},
    ),
    Trap(
        "table-read-twice-and-along-the-other-axis",
        lambda: model(
            """g (int64[n, t] i, int64[m] j) => (float[n, t, 64] y, float[1024, m] z) {
                [a] h = Gather(table, i)
                k = Neg(i)
                [b] l = Gather(table, k)
                y = Add(h, l)
                [columns] z = Gather<axis = 1>(table, j)
            }""",
            table=TABLE,
        ),
        lambda rng: {"i": rng.integers(0, 1024, (3, 7)), "j": rng.integers(0, 64, 5)},
        lambda feeds, weights: [
            gathered(weights["a"], dict(feeds)) + gathered(weights["b"], {"i": -feeds["i"]}),
            np.stack([TABLE[:, int(j)] for j in feeds["j"]], axis=1),
        ],
        {"a": CONVERTED, "b": CONVERTED, "columns": "rows are not gathered along axis 0"},
        {"embeddings": "gather-block-quantized"},
    ),
    Trap(
        "table-of-odd-width-in-4-bits",
        lambda: model(
            "g (int64[n, t] i) => (float[n, t, 24] y) { [emb] h = Gather(table, i) [fc] y = MatMul(h, w) }",
            table=constant("odd", 1100, 63),
            w=constant("w", 63, 24),
        ),
        tokens,
        lambda feeds, weights: [gathered(constant("odd", 1100, 63), dict(feeds)) @ weights["fc"]],
        {"emb": "an odd number of columns has no 4-bit form", "fc": CONVERTED},
        {"embeddings": "gather-block-quantized", "embedding_bits": 4},
    ),
)
