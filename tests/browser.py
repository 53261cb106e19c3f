"""Headless Chromium, driven by Playwright: a page per test that notes everything that goes wrong in it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

from tests.edge.web import FLAGS, browser_path
from tests.helpers import PATIENCE

PHONE, DESKTOP = (390, 844), (1280, 900)
OWN = ("data:", "blob:")  # what a page has in itself


@dataclass
class Opened:
    """A page of a file, and what it did wrong.

    Attributes:
        page: As Playwright has it.
        said: Messages in the console, and errors of scripts.
        asked: Everything it wanted from anywhere but the file itself.
    """

    page: Page
    said: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """The browser of the system, closed at the end."""
    path = browser_path()
    assert path is not None
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=[flag for flag in FLAGS if flag != "--headless"])
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def opened(browser: Browser, path: Path, size: tuple[int, int] = DESKTOP, dark: bool = False) -> Iterator[Opened]:
    """A file in a browser of its own, without a network."""
    context = browser.new_context(
        viewport={"width": size[0], "height": size[1]}, color_scheme="dark" if dark else "light", offline=True, accept_downloads=True
    )
    try:
        found = Opened(context.new_page())
        found.page.set_default_timeout(1000 * PATIENCE)
        found.page.on("console", lambda message: found.said.append(message.text))
        found.page.on("pageerror", lambda error: found.said.append(str(error)))
        address = path.resolve().as_uri()
        found.page.on("request", lambda request: None if request.url.startswith(OWN) else found.asked.append(request.url))
        found.page.goto(address)
        found.asked.remove(address)
        yield found
    finally:
        context.close()


def draw_all(page: Page) -> int:
    """Scroll until every plot is drawn; how many there are."""
    figures = page.locator("figure.chart:visible")
    for i in range(figures.count()):
        figures.nth(i).scroll_into_view_if_needed()
        figures.nth(i).locator("svg").wait_for()
    return figures.count()
