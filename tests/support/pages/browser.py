"""Open a headless Chromium, in which tests read pages as a user does."""

import contextlib
import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, expect, sync_playwright

CHROMIUM = shutil.which("chromium")
OPTIONS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
# for a page to show what is expected: a full machine takes more than playwright's five seconds
EXPECT_MS = 60_000


@contextlib.contextmanager
def open_browser() -> Iterator[Browser]:
    """Yield a browser; skip the test if Chromium is not installed."""
    if not CHROMIUM:
        pytest.skip("Chromium is not installed (Debian: apt-get install chromium)")
    expect.set_options(timeout=EXPECT_MS)
    with sync_playwright() as player:
        browser = player.chromium.launch(executable_path=CHROMIUM, args=list(OPTIONS))
        yield browser
        browser.close()
