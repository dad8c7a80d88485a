"""A real headless browser, where the system has one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PROGRAM = next((path for name in NAMES if (path := shutil.which(name))), None)
needs_browser = pytest.mark.skipif(PROGRAM is None, reason="there is no Chromium: apt-get install chromium")


@contextmanager
def open_page(width: int, scheme: str = "light") -> Iterator:
    """Open a page of that width in pixels; yields it and the list of its console messages and errors."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=PROGRAM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        messages: list[str] = []
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("requestfailed", lambda request: messages.extend(_failure(request)))
        try:
            yield page, messages
        finally:
            browser.close()


def _failure(request) -> list[str]:
    """Return why a request failed; nothing if the page was left before the answer came."""
    left = request.failure == "net::ERR_ABORTED"
    return [] if left else [f"not loaded: {request.url[:80]} {request.failure}"]
