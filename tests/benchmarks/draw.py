"""Draw what ``accuracy.py --json`` wrote: loss against bits, a panel for every model and kind of grid, a line for every method.

    python tests/benchmarks/draw.py --out accuracy.svg [--methods "textbook GPTQ,fast*,balanced (default),best"] FILE.json ...

The loss is the mean divergence from the float model in nats (language models) or 1 minus the mean cosine to its embeddings. Rows of one
model may come from several files.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
from pathlib import Path
from typing import Any

import svg

SHOWN = "textbook GPTQ,fast*,balanced (default),best"
Points = dict[str, dict[str, list[tuple[float, float]]]]


def points_of(rows: list[dict[str, Any]], shown: list[str]) -> Points:
    """Loss by kind of grid, method and bits."""
    found: Points = {}
    for row in rows:
        if row["metrics"] is None or not any(fnmatch.fnmatch(row["method"], m) for m in shown):
            continue
        bits, grid = row["setting"].split("-bit, ")
        loss = 1 - row["metrics"][0] if row.get("divergence") is None else row["divergence"]
        found.setdefault(grid, {}).setdefault(row["method"].split(":")[0], []).append((float(bits), loss))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="what accuracy.py --json wrote")
    parser.add_argument("--out", type=Path, required=True, help="SVG to write")
    parser.add_argument("--methods", default=SHOWN, help=f"shell patterns, comma-separated (default {SHOWN})")
    args = parser.parse_args()
    models: dict[str, list[dict[str, Any]]] = {}
    for path in args.files:
        for model in json.loads(path.read_text())["models"].values():
            models.setdefault(model["title"].split(",")[0], []).extend(model["rows"])
    rows = []
    for title, found in models.items():
        panels = [
            svg.Panel(grid, "bits", "loss", {m: sorted(p) for m, p in lines.items()})
            for grid, lines in points_of(found, args.methods.split(",")).items()
            if any(len(p) > 1 for p in lines.values())
        ]
        if panels:
            rows.append((title, panels))
    svg.write(args.out, rows)


if __name__ == "__main__":
    main()
