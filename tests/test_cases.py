"""The small inputs of shared/cases: files in the shape of public ones that alignflow once read wrongly."""

from pathlib import Path

import pytest

CASES = Path(__file__).parents[2] / "shared" / "cases"
pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason="the small inputs of shared/cases are not on this machine")


def test_every_folder_of_cases_has_a_test() -> None:
    text = Path(__file__).read_text()
    assert [folder.name for folder in sorted(CASES.iterdir()) if folder.is_dir() and f'CASES / "{folder.name}"' not in text] == []
