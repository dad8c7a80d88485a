"""A real headless browser, where the system has one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PROGRAM = next((found for name in NAMES if (found := shutil.which(name))), None)
needs_browser = pytest.mark.skipif(PROGRAM is None, reason="there is no Chromium: apt-get install chromium")


@contextmanager
def opened(width: int, scheme: str = "light") -> Iterator:
    """A page of that width in pixels, and everything that its console says."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=PROGRAM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        said: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("requestfailed", lambda request: said.extend(_failure(request)))
        try:
            yield page, said
        finally:
            browser.close()


def _failure(request) -> list[str]:
    """What a request failed of; nothing where the page was left before the answer came."""
    left = request.failure == "net::ERR_ABORTED"
    return [] if left else [f"not loaded: {request.url[:80]} {request.failure}"]
