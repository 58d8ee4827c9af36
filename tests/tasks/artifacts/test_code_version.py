"""Test the version of a stage's code: which changes count."""

from pathlib import Path

import pytest

from tasks.artifacts.code_version import program_module, source_digests

PROGRAM = '''"""Docs."""
from tasks.config.jobs import SftJob
from tasks.programs.runtime.program import main
from tasks.rlhf import losses
from tasks.system import files


def f():
    return 1
'''


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    files = {
        "programs/__init__.py": "",  # holds no code, so it does not count
        "config/__init__.py": "",
        "config/jobs.py": "A = 1",
        "programs/runtime/__init__.py": "",
        "programs/runtime/program.py": "B = 1",
        "programs/sft.py": PROGRAM,
        "rlhf/__init__.py": "",
        "rlhf/losses.py": "def loss():\n    from .masks import mask\n    return mask",
        "rlhf/masks.py": "import json\nmask = open('names.txt')",
        "rlhf/names.txt": "names",
        "rlhf/other.py": "C = 1",
        "system/files.py": "D = 1",
    }
    for name, text in files.items():
        path = tmp_path / "tasks" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_what_a_program_imports_counts_however_far_down(tree: Path) -> None:
    expected = [
        "programs/runtime/program.py",
        "programs/sft.py",
        "rlhf/losses.py",
        "rlhf/masks.py",
        "rlhf/names.txt",
    ]
    assert list(source_digests("sft", root=tree)) == [f"tasks/{name}" for name in expected]


@pytest.mark.parametrize(
    "name",
    ["programs/runtime/program.py", "programs/sft.py", "rlhf/losses.py", "rlhf/masks.py", "rlhf/names.txt"],
)
def test_a_change_of_code_counts(tree: Path, name: str) -> None:
    before = source_digests("sft", root=tree)
    with (tree / "tasks" / name).open("a") as file:
        file.write("\nextra = 2\n")
    after = source_digests("sft", root=tree)
    assert [path for path in after if after[path] != before[path]] == [f"tasks/{name}"]


@pytest.mark.parametrize("name", ["config/jobs.py", "rlhf/other.py", "system/files.py"])
def test_code_that_the_program_does_not_run_does_not_count(tree: Path, name: str) -> None:
    before = source_digests("sft", root=tree)
    (tree / "tasks" / name).write_text("changed = True")
    assert source_digests("sft", root=tree) == before


def test_comments_docstrings_and_layout_do_not_count(tree: Path) -> None:
    before = source_digests("sft", root=tree)
    tidied = (
        PROGRAM.replace("Docs.", "Better docs.")
        .replace("def f():\n", 'def f():  # why\n    """What."""\n')
        .replace("return 1", "return (1)")
    )
    (tree / "tasks" / "programs" / "sft.py").write_text(tidied)
    assert source_digests("sft", root=tree) == before
    (tree / "tasks" / "programs" / "sft.py").write_text(tidied.replace("(1)", "'1'"))
    assert source_digests("sft", root=tree) != before


def test_a_moved_file_is_the_same_code(tree: Path) -> None:
    """Another folder, and therefore its imports in another order."""
    before = sorted(source_digests("sft", root=tree).values())
    (tree / "tasks" / "rlhf" / "algorithms").mkdir()
    (tree / "tasks" / "rlhf" / "algorithms" / "__init__.py").write_text("")
    (tree / "tasks" / "rlhf" / "losses.py").rename(tree / "tasks" / "rlhf" / "algorithms" / "losses.py")
    (tree / "tasks" / "rlhf" / "algorithms" / "losses.py").write_text(
        "def loss():\n    from tasks.rlhf.masks import mask\n    return mask"
    )
    moved = PROGRAM.replace("from tasks.rlhf import losses\n", "").replace(
        "from tasks.config", "from tasks.rlhf.algorithms import losses\nfrom tasks.config"
    )
    (tree / "tasks" / "programs" / "sft.py").write_text(moved)
    after = source_digests("sft", root=tree)
    assert sorted(after.values()) == before
    assert "tasks/rlhf/algorithms/losses.py" in after


def test_a_package_counts_once_it_holds_code(tree: Path) -> None:
    (tree / "tasks" / "rlhf" / "__init__.py").write_text("A = 1")
    assert "tasks/rlhf/__init__.py" in source_digests("sft", root=tree)


def test_another_import_is_other_code(tree: Path) -> None:
    before = source_digests("sft", root=tree)["tasks/programs/sft.py"]
    (tree / "tasks" / "programs" / "sft.py").write_text(
        PROGRAM.replace("import losses", "import other as losses")
    )
    assert source_digests("sft", root=tree)["tasks/programs/sft.py"] != before


def test_a_program_is_found_in_its_subfolder_too(tree: Path) -> None:
    folder = tree / "tasks" / "programs" / "rounds"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "asked.py").write_text("from tasks.rlhf import masks\n")
    assert program_module("asked", root=tree) == "tasks.programs.rounds.asked"
    assert program_module("sft", root=tree) == "tasks.programs.sft"
    assert program_module("sft") == "tasks.programs.sft"
    expected = ["tasks/programs/rounds/asked.py", "tasks/rlhf/masks.py", "tasks/rlhf/names.txt"]
    assert list(source_digests("asked", root=tree)) == expected
