"""The page of a report of many layers: its size, and how soon a browser shows it.

    python tests/benchmarks/report.py [--layers 200] [--loads 7]

A chain of small layers goes through real runs: 4 bits with MagR, and 8-bit inputs under an accumulator of 16 bits, which has most to
report.
First paint is the browser's own figure (first-contentful-paint of the Paint Timing API), of a new profile each time; loaded is the start of
the load event (Navigation Timing), by which all plots of the page are drawn. Needs Chromium and Playwright.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import header, progress, spread, table

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for the models and the browser of the tests

import magr_onnx
from tests import graphs
from tests.browser import PHONE, chromium, opened
from tests.graphs import Builder, random

WIDTH = 48
RUNS: dict[str, dict[str, Any]] = {
    "4 bits": {"bits": 4, "effort": "fast"},
    "8-bit inputs, accumulators": {"format": "qdq-int8", "bits": 4, "accumulator_bits": 16, "accumulator_tile": 16, "effort": "fast"},
}
PAINT = """new Promise((done) => new PerformanceObserver((list) => {
  for (const entry of list.getEntriesByName("first-contentful-paint")) done(entry.startTime);
}).observe({ type: "paint", buffered: true }))"""


LOADED = "performance.getEntriesByType('navigation')[0].loadEventStart"


def model(layers: int) -> Any:
    """Layers one behind the other, each beside a residual."""
    b = Builder()
    x = b.input("x", ["batch", WIDTH])
    for i in range(layers):
        product = b.node("MatMul", [x, b.constant(f"weight{i}", random(WIDTH, WIDTH, seed=i))], f"/model/layers.{i}/mlp/up_proj/MatMul")
        x = b.node("Add", [b.node("Tanh", [product]), x])
    return b.model(x, ["batch", WIDTH])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=200)
    parser.add_argument("--loads", type=int, default=7)
    arguments = parser.parse_args()
    source = model(arguments.layers)
    data = [{"x": graphs.correlated(64, WIDTH, seed)} for seed in range(8)]
    rows = []
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        for name, options in RUNS.items():
            progress(name)
            report = magr_onnx.optimize(source, data[:6], validation_data=data[6:], **options).report
            path, text = Path(folder, "report.html"), report.to_json()
            begin = time.perf_counter()
            path.write_text(report.to_html(), encoding="utf-8")
            seconds = time.perf_counter() - begin
            paints, loaded = [], []
            for load in range(arguments.loads):
                with opened(browser, path, PHONE if load % 2 else (1280, 900)) as found:
                    paints.append(found.page.evaluate(PAINT))
                    loaded.append(found.page.evaluate(LOADED))
            sizes = [f"{len(text) / 1e6:.2f}", f"{path.stat().st_size / 1e6:.2f}"]
            rows.append([name, len(report.layers), *sizes, f"{seconds:.1f}", spread(paints, 0), spread(loaded, 0)])
    print(header("The page of a report"))
    print(table(["run", "layers", "MB JSON", "MB page", "s to make", "ms to first paint", "ms to loaded"], rows))


if __name__ == "__main__":
    main()
