"""The page of a report in headless Chromium: what a person does with it, in light and dark, on a desktop and a phone, without a network."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page

import magr_onnx
from magr_onnx import Report
from magr_onnx.report import html
from magr_onnx.report.html import summary
from tests import graphs
from tests.browser import DESKTOP, PHONE, chromium, draw_all, opened
from tests.edge.targets import refuse
from tests.edge.web import BROWSERS, browser_path
from tests.graphs import Builder, random

LAYERS, WIDTH = 6, 32


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if browser_path() is None:
        refuse("chromium", f"none of {', '.join(BROWSERS)} is installed (.ci/edge does it)")
    with chromium() as found:
        yield found


def model(rank: int) -> Any:
    """Layers of several sizes, in one line."""
    b = Builder()
    x = b.input("x", ["batch", WIDTH])
    width = WIDTH
    for i in range(LAYERS):
        wide = WIDTH * (1 + i % 3)
        x = b.node("Relu", [b.node("MatMul", [x, b.constant(f"w{i}", random(width, wide, seed=i))], f"layer{i}")])
        width = wide
    head = b.node("MatMul", [x, b.constant("head", random(width, rank, seed=99))], "a_head_with_a_name_too_long_for_a_phone" * 2)
    return b.model(head, ["batch", rank])


def samples(seed: int, count: int) -> list[dict[str, Any]]:
    return [{"x": graphs.correlated(24, WIDTH, seed + i)} for i in range(count)]


@pytest.fixture(scope="module")
def reports() -> dict[str, Report]:
    runs: dict[str, dict[str, Any]] = {
        "four": {"bits": 4, "effort": "fast"},
        "integer": {"format": "qdq-int8", "bits": 4, "accumulator_bits": 16, "accumulator_tile": 16},
        "mixed": {"target_size": "60%", "effort": "fast"},
    }
    return {name: magr_onnx.optimize(model(8), samples(0, 8), validation_data=samples(90, 2), **o).report for name, o in runs.items()}


@pytest.fixture(scope="module")
def pages(reports: dict[str, Report], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    for name, report in reports.items():
        report.save(folder / f"{name}.html")
    html.write(html.comparison(reports["four"], reports["integer"]), folder / "comparison.html")
    return {path.stem: path for path in folder.iterdir()}


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize(("name", "plots"), [("four", 4), ("integer", 6), ("mixed", 4), ("comparison", 2)])
def test_everything_is_drawn_and_nothing_asked_for(
    name: str, plots: int, size: tuple[int, int], dark: bool, browser: Browser, pages: dict[str, Path]
) -> None:
    with opened(browser, pages[name], size, dark) as found:
        assert draw_all(found.page) == plots
        assert found.page.evaluate("document.documentElement.scrollWidth") <= size[0]
        assert lightness(found.page) < 0.2 if dark else lightness(found.page) > 0.9
        assert found.page.locator("h1").is_visible()
        assert found.said == []
        assert found.asked == []


@pytest.mark.parametrize(("name", "plots"), [("four", 4), ("integer", 6), ("mixed", 4), ("comparison", 2)])
def test_all_plots_are_there_when_the_page_has_loaded(name: str, plots: int, browser: Browser, pages: dict[str, Path]) -> None:
    """Nobody scrolls, and nothing is waited for after the load event: what a picture of the page or a print has."""
    page = browser.new_page()
    page.add_init_script("addEventListener('load', () => { window.drawn = document.querySelectorAll('figure[data-chart] svg').length; })")
    page.goto(pages[name].resolve().as_uri())
    assert page.evaluate("drawn") == plots
    page.close()


def lightness(page: Page) -> float:
    """Of the page's background, 0 to 1."""
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return sum(map(int, re.findall(r"\d+", colour)[:3])) / (3 * 255)


def column(page: Page, index: int) -> list[str]:
    return page.locator(f"#layers tbody tr:visible > :nth-child({index + 1})").evaluate_all("cells => cells.map(c => c.dataset.value)")  # type: ignore[no-any-return]


@pytest.mark.parametrize("most", [3e-5, 2e-3, 0.4])
def test_ticks_of_small_and_large_values_differ(browser: Browser, reports: dict[str, Report], tmp_path: Path, most: float) -> None:
    def lowered(row: Any, i: int) -> Any:
        after = row.magr["max_before"] * (1 - most * (i + 1) / (LAYERS + 1))
        return replace(row, magr={**row.magr, "max_after": after}, error=most / (i + 1))

    report = reports["four"]
    path = tmp_path / "page.html"
    replace(report, layers=tuple(map(lowered, report.layers, range(LAYERS + 1)))).save(path)
    with opened(browser, path) as found:
        draw_all(found.page)
        for chart in ("peaks", "errors"):
            axis = found.page.locator(f"figure[data-chart={chart}] .role-axis-label text")
            ticks = [text for text in axis.all_text_contents() if text.endswith("%")]
            assert len(ticks) > 2
            assert len(set(ticks)) == len(ticks), ticks
            assert max(map(len, ticks)) <= 9, ticks
        shown = [text for text in found.page.locator("#layers tbody td").all_inner_texts() if text.startswith("-")]
        assert len(set(shown)) == LAYERS + 1


def test_headers_sort_by_click_and_by_key(browser: Browser, pages: dict[str, Path], reports: dict[str, Report]) -> None:
    with opened(browser, pages["four"]) as found:
        page = found.page
        headers = page.locator("#layers thead th")
        names = [text.strip() for text in headers.all_inner_texts()]
        error = names.index("Error")
        assert [h for h in headers.evaluate_all("all => all.map(h => h.ariaSort)") if h != "none"] == ["ascending"]  # by depth
        headers.nth(error).get_by_role("button").click()
        assert headers.nth(error).get_attribute("aria-sort") == "descending"
        assert headers.nth(names.index("Depth")).get_attribute("aria-sort") == "none"
        values = [float(v) for v in column(page, error)]
        assert values == sorted((row.error or 0 for row in reports["four"].layers), reverse=True)
        headers.nth(error).get_by_role("button").press("Enter")
        assert headers.nth(error).get_attribute("aria-sort") == "ascending"
        assert [float(v) for v in column(page, error)] == values[::-1]
        headers.nth(0).get_by_role("button").click()
        assert column(page, 0) == sorted(row.name for row in reports["four"].layers)
        peaks = names.index("MagR")
        headers.nth(peaks).get_by_role("button").click()
        found_peaks = [float(v) for v in column(page, peaks) if v]
        assert found_peaks == sorted(found_peaks, reverse=True)
        assert found.said == []


def test_the_filter_leaves_rows_with_all_words(browser: Browser, pages: dict[str, Path]) -> None:
    with opened(browser, pages["integer"]) as found:
        page = found.page
        box = page.get_by_role("searchbox")
        box.fill("LAYER 32 × 64")
        assert column(page, 0) == ["layer1", "layer4"] or column(page, 0) == ["layer1"]
        shown = len(column(page, 0))
        assert page.locator(".filter output").inner_text() == f"{shown} of {LAYERS + 1}"
        box.fill("stored in 8 bits")  # what only the notes say
        assert len(column(page, 0)) == LAYERS + 1
        box.fill("no such layer")
        assert column(page, 0) == []
        assert page.locator(".empty").is_visible()
        box.fill("")
        assert len(column(page, 0)) == LAYERS + 1


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_details_of_a_layer(size: tuple[int, int], browser: Browser, pages: dict[str, Path], reports: dict[str, Report]) -> None:
    with opened(browser, pages["integer"], size) as found:
        page = found.page
        page.locator("#layers tbody button", has_text="layer2").focus()
        page.keyboard.press("Enter")
        panel = page.get_by_role("dialog")
        assert panel.locator("h2").inner_text() == "layer2"
        drawn = panel.locator("figure")
        for i in range(drawn.count()):
            drawn.nth(i).locator("svg").wait_for()
        kinds = drawn.evaluate_all("all => all.map(f => f.dataset.panel)")
        assert kinds == ["values", "grid", "magr", "sweeps", "tiles"]
        row = next(r for r in reports["integer"].layers if r.name == "layer2")
        assert row.tiles is not None
        assert panel.locator("[data-panel=tiles] svg .mark-rect path").count() == row.tiles["tiles"]
        assert panel.locator("[data-panel=grid] svg .role-mark.mark-rule line").count() == 16  # a line a code
        assert f"{100 * (row.error or 0):.2f}%" in panel.inner_text()
        assert panel.evaluate("d => d.scrollWidth <= d.clientWidth")
        panel.get_by_label("Next layer").click()
        assert panel.locator("h2").inner_text() == "layer3"
        page.keyboard.press("ArrowLeft")
        assert panel.locator("h2").inner_text() == "layer2"
        page.keyboard.press("Escape")
        assert not panel.is_visible()
        page.locator(".findings button").first.click()  # what to look at first leads to its layer
        assert panel.is_visible()
        assert found.said == []


def test_a_phone_shows_errors_and_both_sides_without_scrolling(browser: Browser, pages: dict[str, Path]) -> None:
    with opened(browser, pages["integer"], PHONE) as found:
        box = found.page.locator("#layers thead th", has_text="Error").bounding_box()
        assert box is not None
        assert box["x"] + box["width"] <= PHONE[0]
    with opened(browser, pages["comparison"], PHONE) as found:
        cells = found.page.locator(".asked td[data-side=B]")
        assert cells.count() > 0
        boxes = [cells.nth(i).bounding_box() for i in range(cells.count())]
        assert all(box is not None and box["x"] >= 0 and box["x"] + box["width"] <= PHONE[0] for box in boxes)


def test_the_theme_can_be_switched(browser: Browser, pages: dict[str, Path]) -> None:
    with opened(browser, pages["four"], dark=True) as found:
        page = found.page
        draw_all(page)
        page.evaluate("scrollTo(0, 0)")
        before = page.locator("figure svg text").first.get_attribute("fill")
        page.get_by_role("button", name="Theme").click()
        assert lightness(page) > 0.9
        page.wait_for_function("old => document.querySelector('figure svg text').getAttribute('fill') !== old", arg=before)
        page.get_by_role("button", name="Theme").click()
        assert lightness(page) < 0.2
        assert found.said == []


def test_the_json_in_a_page_is_the_report(browser: Browser, pages: dict[str, Path], reports: dict[str, Report]) -> None:
    with opened(browser, pages["mixed"]) as found:
        with found.page.expect_download() as download:
            found.page.get_by_role("button", name="Download JSON").click()
        text = Path(download.value.path()).read_text()
        assert Report.from_json(text) == reports["mixed"]
        assert json.loads(text) == reports["mixed"].to_dict()


def test_tooltips_say_what_a_bar_is(browser: Browser, pages: dict[str, Path], reports: dict[str, Report]) -> None:
    with opened(browser, pages["four"]) as found:
        page = found.page
        draw_all(page)
        bar = page.locator("figure[data-chart=errors] svg .mark-rect path").nth(1)
        box = bar.bounding_box()
        assert box is not None
        bar.hover(position={"x": box["width"] / 2, "y": box["height"] - 4})  # the foot: the mark of an estimate may cover the middle
        tip = page.locator("#vg-tooltip-element")
        tip.wait_for()
        assert "layer1" in tip.inner_text()


def test_what_is_not_a_number_does_not_end_the_page(browser: Browser, reports: dict[str, Report], tmp_path: Path) -> None:
    report, nan = reports["integer"], float("nan")
    rows = [replace(row, error=nan, name="nan", magr={**(row.magr or {}), "gap": nan}, solver={"error": nan}) for row in report.layers[:2]]
    broken = replace(report, layers=(*rows, *report.layers[2:]))
    broken.save(tmp_path / "r.html")
    with opened(browser, tmp_path / "r.html") as found:
        page = found.page
        page.locator("#layers tbody button").first.click()
        page.locator("#details [data-panel=tiles] svg").wait_for()
        assert page.locator("#details h2").inner_text() == "nan"
        assert "Relative duality gap at the end: not a number" in page.locator("#details").inner_text()
        page.keyboard.press("Escape")
        with page.expect_download() as download:
            page.get_by_role("button", name="Download JSON").click()
        assert json.loads(Path(download.value.path()).read_text()) == broken.to_dict()
        assert found.said == []


def test_a_choice_without_attempts_is_drawn(browser: Browser, reports: dict[str, Report], tmp_path: Path) -> None:
    report = reports["mixed"]
    assert report.assignment is not None
    replace(report, assignment=replace(report.assignment, attempts=())).save(tmp_path / "r.html")
    with opened(browser, tmp_path / "r.html") as found:
        assert draw_all(found.page) == found.page.locator("figure[data-chart]").count()
        assert found.said == []


def test_names_of_layers_are_text_only(browser: Browser, tmp_path: Path) -> None:
    b = Builder()
    bad = "</script><script>document.title='taken'</script><img src=x onerror=alert(1)>"
    x = b.input("x", ["batch", WIDTH])
    built = b.model(b.node("MatMul", [x, b.constant("w", random(WIDTH, 8))], bad), ["batch", 8])
    magr_onnx.optimize(built, samples(0, 2), effort="fast").report.save(tmp_path / "r.html")
    with opened(browser, tmp_path / "r.html") as found:
        found.page.locator("#layers tbody button").click()
        assert found.page.locator("#details h2").inner_text() == bad
        assert "taken" not in found.page.title()
        assert (found.said, found.asked) == ([], [])


def test_a_comparison_has_what_changed_most_first(browser: Browser, pages: dict[str, Path], reports: dict[str, Report]) -> None:
    with opened(browser, pages["comparison"]) as found:
        a, b = ({line.row.name: line.running or 0 for line in summary.lines_of(reports[name])} for name in ("four", "integer"))
        assert column(found.page, 0) == sorted(a, key=lambda name: -abs(b[name] - a[name]))
        assert "format" in found.page.locator(".asked").inner_text()
