"""`onnx-magr demo`: quantize the bundled language model and measure its perplexity before and after."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from magr_onnx import api
from magr_onnx.cli import console
from magr_onnx.cli.options import Json, Quiet, Verbose
from magr_onnx.config.arguments import Progress
from magr_onnx.config.options import Options
from magr_onnx.errors import ModelError, OutputError
from magr_onnx.models import bundled
from magr_onnx.report.data import Report
from magr_onnx.runtime.data.sources import open_source
from magr_onnx.runtime.ort.session import Arithmetic

EPILOG = "[bold]Example[/bold]\n\nonnx-magr demo"
RTN: Options = {"quantizer": "rtn", "alpha": 0.0, "beta": 1.0, "bias": "none"}
SETTINGS: tuple[tuple[str, Options], ...] = (
    ("4 bits, round to nearest", {"bits": 4, **RTN}),
    ("4 bits, onnx-magr", {"bits": 4, "effort": "fast"}),
    ("2 bits, round to nearest", {"bits": 2, **RTN}),
    ("2 bits, onnx-magr", {"bits": 2, "effort": "fast"}),
)
BATCHES = 8  # of held-out text; more would change perplexities far less than the differences shown


@dataclass(frozen=True, slots=True)
class DemoRow:
    """Result of one setting: perplexity on the held-out text, file size, and report."""

    setting: str
    perplexity: float
    bytes: int
    report: Report


@dataclass(frozen=True, slots=True)
class Demo:
    """Results of all settings, and perplexity and size of the float model."""

    float_perplexity: float
    float_bytes: int
    rows: tuple[DemoRow, ...]


def run(folder: Path, progress: Progress | None = None) -> Demo:
    """Optimize the bundled model with every setting, writing the files to ``folder``.

    Raises:
        ModelError: The package was installed without its model.
    """
    if not bundled.MODEL.is_file():
        raise ModelError(f"the bundled model {bundled.MODEL} is missing; reinstall the package")
    rows: list[DemoRow] = []
    float_perplexity = math.nan
    held_out = open_source(bundled.HELD_OUT, ()).limit(BATCHES)
    for name, options in SETTINGS:
        if progress is not None:
            progress(name, 0, 1)
        path = folder / f"tiny_lm_{name.replace(',', '').replace(' ', '_')}.onnx"
        data = None if options.get("quantizer") == "rtn" else bundled.CALIBRATION  # which rounding ignores
        result = api.optimize(bundled.MODEL, data, output=path, progress=False, **options)
        outputs_only: dict[str, Any] = {"arithmetics": (Arithmetic.DEFAULT,), "layers": False, "latency": False, "progress": False}
        validation = api.validate(bundled.MODEL, path, held_out, **outputs_only)
        metrics = validation.arithmetics[str(Arithmetic.DEFAULT)][0]
        assert metrics.cross_entropy is not None
        float_perplexity, perplexity = (math.exp(nats) for nats in metrics.cross_entropy)
        rows.append(DemoRow(name, perplexity, path.stat().st_size, result.report))
        if progress is not None:
            progress(name, 1, 1)
    return Demo(float_perplexity, bundled.MODEL.stat().st_size, tuple(rows))


def to_text(demo: Demo) -> str:
    """Format the results as a table."""
    lines = [
        "A language model of 1.9 M parameters, trained on public-domain books; perplexity per",
        "token on books it never saw (lower is better). Blocks of 32 weights share a scale; the",
        "effort is 'fast', and the default 'balanced' leaves less error in twice the time.",
        "",
        f"{'setting':40} {'perplexity':>10} {'size':>9}",
        f"{'float32':40} {demo.float_perplexity:10.3f} {demo.float_bytes / 1e6:6.2f} MB",
    ]
    lines += [f"{r.setting:40} {r.perplexity:10.3f} {r.bytes / 1e6:6.2f} MB" for r in demo.rows]
    return "\n".join(lines)


def demo(
    folder: Annotated[Path | None, typer.Option("--folder", help="Keep the quantized models here; default: they are removed.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Quantize the bundled language model and print its perplexity before and after: about 20 seconds on a laptop."""
    try:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder {folder}: {error.strerror}; give another one") from error
    with tempfile.TemporaryDirectory(prefix="onnx-magr-") as temporary, console.watch(quiet) as (progress, _):
        result = run(folder or Path(temporary), progress)
    console.show(dataclasses.asdict(result), to_text(result), as_json, quiet)
