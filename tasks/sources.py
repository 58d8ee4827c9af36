"""The version of a stage: a digest of the code its program runs, found by reading the imports, never by running them.

Comments, docstrings and layout do not count, so tidying a file rebuilds nothing. Settings do not count either: their values are in the key.
"""

import ast
import hashlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]  # the folder that holds the packages flows and tasks
PROGRAMS = "tasks.programs"
COUNTED = ("tasks.programs", "tasks.rlhf")
LEFT_OUT = {"tasks.programs.config", "tasks.programs.settings", "tasks.programs.source"}


class Facts(NamedTuple):
    """What counts of one file."""

    digest: str
    imports: list[str]
    strings: set[str]


def sources_of(stage: str, *, root: Path | None = None) -> dict[str, str]:
    """Digest of every file behind ``stage``, by path relative to ``root``: its program, what that imports, and data files that those name."""
    root = root or ROOT
    found: dict[str, str] = {}
    for path, facts in _closure(stage, root):
        found[path.relative_to(root).as_posix()] = facts.digest
        for resource in _named_files(facts.strings, path.parent):
            found[resource.relative_to(root).as_posix()] = _sha256(resource.read_bytes())
    assert found, f"no program for the stage {stage}"
    return dict(sorted(found.items()))


def packages_of(stage: str, *, root: Path | None = None) -> set[str]:
    """Names of the top-level packages that the code behind ``stage`` imports."""
    return {name.partition(".")[0] for _, facts in _closure(stage, root or ROOT) for name in facts.imports}


def _closure(stage: str, root: Path) -> Iterator[tuple[Path, Facts]]:
    """Every file behind ``stage``."""
    waiting, seen = [f"{PROGRAMS}.{stage}"], set(LEFT_OUT)
    while waiting:
        module = waiting.pop()
        path = _file_of(module, root)
        if module in seen or path is None:
            continue
        seen.add(module)
        facts = _facts(path.read_text(encoding="utf-8"), module, is_package=path.name == "__init__.py")
        yield path, facts
        waiting += [module.rpartition(".")[0], *facts.imports]


@cache  # stages share most of their files
def _facts(text: str, module: str, *, is_package: bool) -> Facts:
    tree = ast.parse(text, module)
    strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return Facts(_sha256(_canonical(tree).encode()), _imports(tree, module, is_package=is_package), strings)


def _file_of(module: str, root: Path) -> Path | None:
    if not module.startswith(COUNTED):
        return None
    base = root.joinpath(*module.split("."))
    candidates = (base.with_suffix(".py"), base / "__init__.py")
    return next((path for path in candidates if path.is_file()), None)


def _imports(tree: ast.AST, module: str, *, is_package: bool) -> list[str]:
    """Every module that ``tree`` may import, wherever in it; ``from a import b`` names both a and a.b."""
    package = module if is_package else module.rpartition(".")[0]
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                parts = package.split(".")
                origin = ".".join([*parts[: len(parts) - node.level + 1], *([origin] if origin else [])])
            names += [origin, *(f"{origin}.{alias.name}" for alias in node.names)]
    return names


def _named_files(strings: set[str], folder: Path) -> list[Path]:
    """Data files beside a module whose name appears in it as a string (a page template, say)."""
    beside = {path.name: path for path in folder.iterdir() if path.is_file() and path.suffix != ".py"}
    return [beside[name] for name in sorted(strings & beside.keys())]


def _canonical(node: object) -> str:
    """A syntax tree as text, the same for every Python: without positions, empty fields and strings that stand alone (docstrings)."""
    if isinstance(node, list):
        return "[" + ",".join(_canonical(item) for item in node if not _is_docstring(item)) + "]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [f"{name}={_canonical(value)}" for name, value in ast.iter_fields(node) if value is not None and value != []]
    return f"{type(node).__name__}({','.join(fields)})"


def _is_docstring(node: object) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
