"""Fixtures of all tests, and the order of the tests."""

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

LONGEST = "test_operations"  # mostly waits: beside it, another process runs all the others (make test)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem != LONGEST)


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    """Yield a headless Chromium, shared by the tests of a module; skip the test if there is none."""
    from tests.support.browser import open_browser

    with open_browser() as opened:
        yield opened


@pytest.fixture(autouse=True)
def _restore_process() -> Iterator[None]:
    """Restore the process's working folder, umask and environment variables that commands change."""
    folder, mask = os.getcwd(), os.umask(0o022)
    os.umask(mask)
    names = ("PYTHONPATH", "PYTHONSAFEPATH", "NO_PROXY", "no_proxy")
    before = {name: os.environ.get(name) for name in names}
    yield
    os.chdir(folder)
    os.umask(mask)
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
