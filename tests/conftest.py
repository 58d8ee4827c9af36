"""The order of the tests."""

import pytest

LONGEST = "test_operations"  # mostly waits: beside it, another process runs all the others (make test)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem != LONGEST)
