"""The order of the tests."""

import os
from collections.abc import Iterator

import pytest

LONGEST = "test_operations"  # mostly waits: beside it, another process runs all the others (make test)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem != LONGEST)


@pytest.fixture(autouse=True)
def _same_process() -> Iterator[None]:
    """Undo what a command does to its process: its folder, the mask of its files, and where its children find modules."""
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
