"""A real browser for tests: the system's Chromium, driven by Playwright; its own builds are not downloaded."""

from __future__ import annotations

import shutil
from contextlib import contextmanager
from importlib.util import find_spec

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MISSING_AXE = "axe-playwright-python is not installed, so nothing was checked for accessibility"


def executable():
    """The path of a Chromium, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def missing():
    """Why there can be no browser tests, or None."""
    if executable() is None:
        return f"no browser: none of {', '.join(NAMES)} is on the path; on Debian, apt-get install chromium"
    if find_spec("playwright") is None:
        return "no browser: the package playwright is not installed"
    return None


@contextmanager
def launched():
    """A headless browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Containers run tests as root, where Chromium's sandbox cannot be set up.
        browser = playwright.chromium.launch(executable_path=executable(), args=["--no-sandbox"])
        yield browser
        browser.close()
