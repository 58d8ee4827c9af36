"""Sort the tests, show failures when they happen, and provide the fixtures that all tests share."""

import gc
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING
from zlib import crc32

import hypothesis
import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

# at the size of tests threads only wait for each other, which takes a fifth more CPU; read by libraries when
# they are imported
os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

hypothesis.settings.register_profile("alignflow", deadline=None)  # how long a case takes is no result
hypothesis.settings.load_profile("alignflow")

LONGEST = "test_operations"  # mostly waits for servers: it starts first, and all other tests run beside it


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the tests: the longest module, then the fast ones, then the other slow ones.

    Modules of slow ones are mixed, so that not all that start servers run at the same time.
    """

    def rank(item: pytest.Item) -> tuple[int, int]:
        if item.path.stem == LONGEST:
            return 0, 0
        return (2, crc32(item.path.stem.encode())) if item.get_closest_marker("slow") else (1, 0)

    items.sort(key=rank)


def pytest_collection_finish() -> None:
    """Freeze the million objects of all imports: each full garbage collection scans them for a second."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Return one process more than there are cores, since one of them waits for servers; at most 8."""
    return min((os.cpu_count() or 1) + 1, 8)


class FailureLines:
    """A line for each failure when it happens; its traceback follows at the end of the run."""

    def __init__(self, terminal: pytest.TerminalReporter) -> None:
        self.terminal = terminal

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            message = crash.message if crash else str(report.longrepr)
            self.terminal.write(f"\nFAILED {report.nodeid} ({report.when}): {message.splitlines()[0]}\n")


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    if terminal is not None:  # processes of pytest-xdist have none
        config.pluginmanager.register(FailureLines(terminal))


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    """Yield a headless Chromium, shared by the tests of a module; skip the test if there is none."""
    from tests.support.pages.browser import open_browser

    with open_browser() as opened:
        yield opened


@pytest.fixture(autouse=True)
def _restore_process() -> Iterator[None]:
    """Restore the working folder, umask and environment variables that commands change."""
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
