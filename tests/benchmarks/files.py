"""Model files of other people through every format: do they load, how accurate, how large, how fast, and at what cost to make.

    python tests/benchmarks/files.py FOLDER... [--json results.json] [--only PATTERN] [--formats matmulnbits-4 ...] [--makers rtn ...]
                                               [--origins FILE.tsv]

Every ``.onnx`` file below the folders, the smallest first, is optimized in every format without data and with 16 synthetic samples,
by rounding to nearest, and by onnxruntime's own quantizers. Each case runs in a process of its own with a time limit, so that a crash of
onnxruntime or an endless run is a row like any other. Unknown dimensions become 1 where they are a batch, and else the first of SIZES that
the float model runs with. Accuracy is the signal to quantization noise ratio over inputs that no case was calibrated with, 64 or as many as
have 4,096 outputs together, up to 1,024: the noise of an output relative to its energy, and the mean over outputs. Labels, indices and text
change in steps, and few of them at all: the floats that they were made from are judged in their place. Results stay in the JSON file, and a
second run goes on where the first ended.

The table has the worst cases first: those that crashed, then by decibels over rounding to nearest. ``--origins`` prints two short tables
instead, by format and by source: each line of that file has a folder, a version, a licence and a job, with tabs between them.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import signal
import statistics
import string
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from common import Cell, Feeds, Unsupported, header, interleaved, ort_dynamic, ort_quantize, ort_static, progress, table

from magr_onnx import optimize
from magr_onnx.errors import MagrError
from magr_onnx.model_io.legacy import modernize
from magr_onnx.runtime.measure.validate import without_equal_nonfinite
from magr_onnx.runtime.ort.session import Session

SIZES = (64, 48, 1, 16, 512, 576, 16000, 21)
SAMPLES, JUDGED = 16, 64  # inputs to calibrate with, and the fewest to judge by
ELEMENTS, MOST_JUDGED = 4096, 1024  # numbers to judge by, and inputs for those: of fewer, a class or a scalar for each tells little
LETTERS = np.array(list(string.ascii_lowercase))
SLOWER = 1.25  # times as long as float
CEILING = 150.0  # dB: float32 knows no more
FLOATS = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE, onnx.TensorProto.BFLOAT16}
FORMATS: dict[str, dict[str, Any]] = {
    "matmulnbits-8": {"format": "matmulnbits", "bits": 8},
    "matmulnbits-4": {"format": "matmulnbits", "bits": 4},
    "qdq-4": {"format": "qdq", "bits": 4},
    "qdq-int8": {"format": "qdq-int8"},
    "dynamic-int8": {"format": "dynamic-int8"},
}
FIGURES = {"size": 2, "time": 2, "seconds": 1, "peak": 0}  # and their digits
MAKERS = ("rtn", "onnxruntime", "data-free", "calibrated")
COLUMNS = ("file", "format", "made", "dB", "over RTN", "over ORT", "size", "time", "s", "MB peak", "layers", "remark")


# --- Inputs -------------------------------------------------------------------------------------------------------------------


def _length(name: str | None, axis: int, first: int | None, size: int) -> int:
    """A dimension is a batch if called so; without such a name if it is the first, or the second of states of several layers."""
    name = name or ""
    batch = axis == 0 or (axis == 1 and first is not None and first > 1)
    counts = any(word in name for word in ("num_", "seq", "time", "len"))
    return 1 if "batch" in name or (batch and not counts) else size


def feed(session: Session, names: dict[str, list[Any]], size: int, counting: bool, seed: int) -> Feeds:
    """Normal floats (``counting``: small counts), small nonnegative integers, letters, true flags and masks; a scalar integer is a rate."""
    rng = np.random.default_rng(seed)
    values: Feeds = {}
    for value in session.inputs:
        shape = [
            d if d is not None else _length(n, axis, value.shape[0], size)
            for axis, (d, n) in enumerate(zip(value.shape, names[value.name], strict=True))
        ]
        if value.dtype.kind == "b" or (value.dtype.kind in "iu" and "mask" in value.name):
            array: npt.NDArray[Any] = np.ones(shape)
        elif value.dtype.kind == "f" and not counting:
            array = rng.standard_normal(shape)
        elif value.dtype.kind == "O":
            array = rng.choice(LETTERS, shape)
        else:
            array = rng.integers(0, 8, shape) if shape else np.asarray(16000)
        values[value.name] = array if value.dtype.kind == "O" else array.astype(value.dtype)
    return values


def make_inputs(path: Path) -> list[Feeds]:
    """Calibration inputs, then those to judge by; none if the float model runs with nothing that was tried."""
    graph = onnx.load(str(path), load_external_data=False).graph
    names = {v.name: [d.dim_param if d.HasField("dim_param") else None for d in v.type.tensor_type.shape.dim] for v in graph.input}
    for counting in (False, True):
        for size in SIZES:
            with Session(path) as session:
                try:
                    inputs = [feed(session, names, size, counting, seed) for seed in range(SAMPLES + JUDGED)]
                    numbers = sum(np.size(output) for output in session.run(inputs[0]))
                    judged = min(-(-ELEMENTS // max(numbers, 1)), MOST_JUDGED)
                    inputs += [feed(session, names, size, counting, seed) for seed in range(len(inputs), SAMPLES + judged)]
                    for values in inputs:  # shapes of some models depend on what is in their inputs
                        session.run(values)
                    return inputs
                except MagrError:
                    continue
    return []


def last_floats(path: Path) -> list[str]:
    """Names of the float outputs, and of the floats nearest before outputs that are none; empty if these are unknown."""
    graph = onnx.shape_inference.infer_shapes(modernize(onnx.load(str(path)))).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.output)}
    makers = {name: node for node in graph.node for name in node.output}
    found: dict[str, None] = {}
    queue = [value.name for value in graph.output]
    seen = set(queue)
    for name in queue:
        if types.get(name) in FLOATS:
            found[name] = None
        elif name in makers:
            queue += [source for source in makers[name].input if source not in seen]
            seen.update(makers[name].input)
    return list(found)


def judged_outputs(paths: Sequence[Path], folder: Path) -> list[Path]:
    """Copies of a float model and others that put out `last_floats`; the files themselves where not all have these, or none are hidden."""
    models = [onnx.load(str(path)) for path in paths]
    names = last_floats(paths[0])
    values = [{name for node in model.graph.node for name in node.output} for model in models]
    if not names or names == [value.name for value in models[0].graph.output] or not all(map(set(names).issubset, values)):
        return list(paths)
    copies = [folder / f"judged_{i}.onnx" for i in range(len(paths))]
    for model, copy in zip(models, copies, strict=True):
        del model.graph.output[:]
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
        onnx.save(model, copy)
    return copies


# --- One case -----------------------------------------------------------------------------------------------------------------


def decibels(results: list[list[Any]], reference: list[list[Any]]) -> float:
    """Signal to noise in dB; the noise of an output is relative to its energy over all inputs, other dtypes count what differs.

    NaN where the float model puts out nothing to judge by: zeros and values that are no numbers.
    """
    ratios = []
    for output in range(len(reference[0])):
        noise = signal_energy = 0.0
        for mine, exact in zip(results, reference, strict=True):
            a, b = np.asarray(mine[output]), np.asarray(exact[output])
            if b.dtype.kind not in "fiubOSU":
                continue
            numeric = b.dtype.kind == "f"
            if numeric and a.shape == b.shape:
                a, b = without_equal_nonfinite(a, b)
            energy = float(np.square(b.astype(np.float64)).sum()) if numeric else float(b.size)
            signal_energy += energy
            if a.shape != b.shape:
                noise += energy
            elif numeric:
                noise += float(np.square(a.astype(np.float64) - b).sum())
            else:
                noise += float((a != b).sum())
        if signal_energy:
            ratios.append(noise / signal_energy)
    if not ratios:
        return float("nan")
    mean = float(np.mean(ratios))
    if not np.isfinite(mean):
        return float("-inf")
    return min(CEILING, -10 * float(np.log10(mean))) if mean else CEILING


def make(maker: str, form: str, path: Path, data: list[Feeds], output: Path) -> dict[str, Any]:
    """Write ``output``, and say what its report does."""
    if maker == "onnxruntime":
        if form == "qdq-int8":
            folder = output.with_suffix(".calibration")
            folder.mkdir()
            for i, values in enumerate(data):
                np.savez(folder / f"{i:03d}.npz", **values)
            ort_static(path, folder, output, batch_size=1 << 30)
        elif form == "dynamic-int8":
            ort_dynamic(path, output)
        else:
            ort_quantize("default", path, path, output, FORMATS[form]["bits"], 32)
        return {"layers": None, "notes": []}
    static = form == "qdq-int8"
    calibration = data if maker == "calibrated" or static else None
    options = FORMATS[form] | ({"quantizer": "rtn"} if maker == "rtn" else {})
    report = optimize(path, calibration or None, output=output, **options).report
    reasons = collections.Counter(f"{skip.op}: {skip.reason}" for skip in report.skipped)
    errors = {row.name: row.error for row in report.layers}
    comparison = report.check
    warned = comparison is not None and comparison.latency is not None and comparison.latency.slower
    return {"layers": len(report.layers), "notes": list(report.notes), "skipped": dict(reasons), "errors": errors, "warned": warned}


def total_bytes(path: Path) -> int:
    """A model file with the external data beside it."""
    return sum(p.stat().st_size for p in path.parent.glob(f"{path.name}*"))


def run_case(maker: str, form: str, path: Path, inputs: list[Feeds], folder: Path) -> dict[str, Any]:
    """All figures of one case."""
    output = folder / "model.onnx"
    begin = time.perf_counter()
    try:
        row = make(maker, form, path, inputs[:SAMPLES], output)
    except (MagrError, Unsupported) as error:
        return {"status": "refused", "remark": str(error)[:400]}
    row |= {"status": "made", "seconds": time.perf_counter() - begin, "size": total_bytes(output) / total_bytes(path)}
    judged = inputs[SAMPLES:]
    if judged:
        with contextlib.ExitStack() as stack:
            exact, mine = (stack.enter_context(Session(file, threads=1)) for file in judged_outputs([path, output], folder))
            row["dB"] = decibels([mine.run(x) for x in judged], [exact.run(x) for x in judged])
        with Session(path, threads=1) as exact, Session(output, threads=1) as mine:
            runs: list[Callable[[], object]] = [partial(exact.run, judged[0]), partial(mine.run, judged[0])]
            times = interleaved(runs, 31 if total_bytes(path) < 5e6 else 7, clock=time.thread_time)
            row["float ms"] = 1e3 * statistics.median(times[0])
            row["time"] = statistics.median(times[1]) / statistics.median(times[0])
    return row


def in_process(work: Callable[[], Any], result: Path, limit: int) -> dict[str, Any]:
    """Run ``work`` in a fork and return its dictionary with the peak memory; a crash and a limit passed become a status."""
    result.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        signal.alarm(limit)
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 1)
        os.dup2(devnull, 2)
        try:
            row = work()
        except BaseException:
            row = {"status": "crash", "remark": traceback.format_exc()[-1500:]}
        result.write_text(json.dumps(row))
        os._exit(0)
    _, code, usage = os.wait4(child, 0)
    if code == 0:
        return {**json.loads(result.read_text()), "peak": usage.ru_maxrss / 1024}
    stopped = os.WTERMSIG(code) == signal.SIGALRM
    return {"status": "timeout" if stopped else "killed", "remark": f"over {limit} s" if stopped else f"signal {os.WTERMSIG(code)}"}


# --- All cases ----------------------------------------------------------------------------------------------------------------


def cases(formats: list[str], makers: list[str]) -> list[tuple[str, str]]:
    """Formats and makers; static ranges need data, so there is no case without."""
    return [(form, maker) for form in formats for maker in makers if (form, maker) != ("qdq-int8", "data-free")]


def run_file(path: Path, key: str, chosen: list[tuple[str, str]], rows: dict[str, Any], limit: int) -> None:
    """Run the cases of a file that ``rows`` does not have."""
    missing = [(form, maker) for form, maker in chosen if f"{key}|{form}|{maker}" not in rows]
    if not missing:
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)

        def inputs_to_file() -> dict[str, Any]:
            inputs = make_inputs(path)
            np.savez(folder / "inputs.npz", **{f"{i}|{name}": array for i, values in enumerate(inputs) for name, array in values.items()})
            return {"count": len(inputs)}

        made = in_process(inputs_to_file, folder / "result.json", limit)
        inputs: list[Feeds] = [{} for _ in range(made.get("count", 0))]
        if inputs:
            with np.load(folder / "inputs.npz") as arrays:
                for name in arrays.files:
                    index, _, value = name.partition("|")
                    inputs[int(index)][value] = arrays[name]
        for form, maker in missing:
            case = folder / f"{form}_{maker}"
            case.mkdir()
            row = in_process(partial(run_case, maker, form, path, inputs, case), folder / "result.json", limit)
            if not inputs:
                row["remark"] = row.get("remark", "") or f"the float model ran with no input tried {made.get('remark', '')}".strip()
            rows[f"{key}|{form}|{maker}"] = row
            progress(f"{key} {form} {maker}: {row['status']} {row.get('dB', float('nan')):.1f} dB {row.get('seconds', 0):.1f} s")


def render(rows: dict[str, Any]) -> str:
    """The table of our own cases, worst first, with the counts before it, and what was refused or left behind it."""
    lines: list[tuple[bool, float, list[Cell]]] = []
    own = {key: row for key, row in rows.items() if key.endswith(("|data-free", "|calibrated"))}
    over_rounding, remarks = [], []
    for key, row in own.items():
        name, form, maker = key.split("|")
        if row["status"] == "refused":
            remarks.append(f"- {name}: {row['remark'].rpartition('onnx: ')[2]}")
            continue
        over_rtn, over_ort = (_over(row, rows.get(f"{name}|{form}|{rival}", {})) for rival in ("rtn", "onnxruntime"))
        over_rounding += [] if over_rtn is None else [over_rtn]
        notes = [note for note in row.get("notes", []) if not note.startswith("data-free")]
        remark = " ".join([*(() if row["status"] == "made" else (row["status"],)), row.get("remark", ""), *notes]).replace("|", "/")
        figures = [(row.get("dB"), 1), (over_rtn, 1), (over_ort, 1), *((row.get(n), d) for n, d in FIGURES.items())]
        cells = [None if value is None else f"{value:.{digits}f}" for value, digits in figures]
        shown = [name, form, maker, *cells, row.get("layers"), " ".join(remark.split())[:120]]
        lines.append((row["status"] == "made", 0.0 if over_rtn is None else over_rtn, shown))
        remarks += [f"- {name}: {count} {reason}" for reason, count in row.get("skipped", {}).items()]
    counts = collections.Counter(row["status"] for row in own.values())
    files = len({key.split("|")[0] for key in rows})
    below = sum(value < -0.3 for value in over_rounding)
    grown = sum(row.get("size", 0) > 1 for row in own.values())
    title = (
        f"{files} files, {len(own)} cases: {', '.join(f'{n} {status}' for status, n in counts.most_common())}; {below} below rounding by "
    )
    title += f"over 0.3 dB (median of all {np.median(over_rounding or [0]):+.1f} dB), {grown} larger than the source."
    shown_rows = [cells for *_, cells in sorted(lines, key=lambda line: line[:2])]
    return "\n".join([title, "", table(COLUMNS, shown_rows), "", "Refused, or left as they are:", "", *dict.fromkeys(remarks)])


SHORT = ("made", "refused", "crashed", "larger", "slower", "not warned", "below RTN", "worst", "median", "over ORT", "size", "time")


def figures(names: list[str], rows: dict[str, Any]) -> list[Cell]:
    """The columns `SHORT` of some cases: counts, decibels over rounding and over onnxruntime, and the median size and time by float's."""
    own = [rows[name] for name in names]
    status = collections.Counter(row["status"] for row in own)
    over: dict[str, list[float]] = {}
    for rival in ("rtn", "onnxruntime"):
        values = (_over(rows[name], rows.get(f"{name.rpartition('|')[0]}|{rival}", {})) for name in names)
        over[rival] = [value for value in values if value is not None]
    slower = [row for row in own if row.get("time", 0) > SLOWER]
    medians = [statistics.median(v) if (v := [row[figure] for row in own if figure in row]) else None for figure in ("size", "time")]
    decibels = [min(over["rtn"], default=None), *(statistics.median(v) if v else None for v in over.values())]
    return [
        status["made"],
        status["refused"],
        len(own) - status["made"] - status["refused"],
        sum(row.get("size", 0) > 1 for row in own),
        len(slower),
        sum(not row.get("warned") for row in slower),
        sum(value < -0.3 for value in over["rtn"]),
        *(None if value is None else f"{value:+.1f}" for value in decibels),
        *(None if value is None else f"{value:.2f}" for value in medians),
    ]


def render_short(rows: dict[str, Any], origins: list[list[str]]) -> str:
    """Two tables of our own cases: by format, and by the folder that the files come from."""
    own = [key for key in rows if key.endswith(("|data-free", "|calibrated"))]
    groups = dict.fromkeys(key.split("|", 1)[1] for key in own)
    by_format = [[*g.split("|"), *figures([key for key in own if key.split("|", 1)[1] == g], rows)] for g in sorted(groups)]
    by_source = []
    for folder, version, licence, job in origins:
        names = [key for key in own if key.startswith(f"{folder}/")]
        files = len({key.split("|")[0] for key in names})
        if files:
            by_source.append([f"{folder} {version}", licence, job, files, *figures(names, rows)])
    tables = [(("format", "data", *SHORT), by_format), (("package", "licence", "job", "files", *SHORT), by_source)]
    return "\n\n".join(table(columns, lines) for columns, lines in tables)


def _over(row: dict[str, Any], rival: dict[str, Any]) -> float | None:
    """Decibels over a rival, where both have some."""
    difference = row.get("dB", np.nan) - rival.get("dB", np.nan)
    return difference if np.isfinite(difference) else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--json", type=Path, help="results, to go on from")
    parser.add_argument("--only", default="*", help="pattern of FOLDER/NAME of the files to run")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument(
        "--makers", nargs="+", choices=MAKERS, default=list(MAKERS), help="who makes the files; the table compares all that ran"
    )
    parser.add_argument("--limit", type=int, default=300, help="seconds for a case")
    parser.add_argument("--origins", type=Path, help="where the files come from, for short tables")
    args = parser.parse_args()
    rows: dict[str, Any] = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    for path in sorted((p for folder in args.folders for p in folder.rglob("*.onnx")), key=total_bytes):
        key = f"{path.parent.name}/{path.name}"
        if fnmatch(key, args.only):
            run_file(path, key, cases(args.formats, args.makers), rows, args.limit)
            if args.json:
                args.json.write_text(json.dumps(rows, indent=1))
    print(header("Files of other people"))
    if args.origins is None:
        print(render(rows))
    else:
        print(render_short(rows, [line.split("\t") for line in args.origins.read_text().splitlines()]))


if __name__ == "__main__":
    main()
