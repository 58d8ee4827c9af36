"""Hash the code that a stage's program runs. Its files are found by reading imports; nothing is imported.

Comments, docstrings, formatting and the folder of a file do not count, so tidying or moving files rebuilds
nothing. Neither do tasks.config, as the values of settings are in the key, and tasks.system, which affects no
result.
"""

import ast
import hashlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from tasks.system.module_sources import list_imports, parse

ROOT = Path(__file__).resolve().parents[2]  # the folder that holds the packages flows and tasks
PROGRAMS = "tasks.programs"
SUBFOLDERS = ("rounds",)  # of it that hold programs of stages too
OWN = ("tasks", "flows")
LEFT_OUT = ("tasks.config", "tasks.system")
# but these decide which files of a source and which rows of a benchmark are read, and what is compared how
COUNTED = (
    "tasks.config.dump_files", "tasks.config.benchmark_files", "tasks.config.policies",
    "tasks.config.trusted_judges",
)  # fmt: skip


class FileFacts(NamedTuple):
    """The parts of one file that a version depends on."""

    digest: str  # "" if the file holds no code
    imports: list[str]
    strings: set[str]


def program_module(stage: str, *, root: Path | None = None) -> str:
    """Return the module of a stage's program, which may lie in a subfolder of the programs."""
    for package in (PROGRAMS, *(f"{PROGRAMS}.{name}" for name in SUBFOLDERS)):
        module = f"{package}.{stage}"
        if _file_of(module, root or ROOT):
            return module
    return f"{PROGRAMS}.{stage}"


def source_digests(program: str, *, root: Path | None = None) -> dict[str, str]:
    """Return the digest of every file that ``program`` runs, by path relative to ``root``.

    These are the program, the modules that it imports, also indirectly, and the data files that they name.
    """
    root = root or ROOT
    found: dict[str, str] = {}
    for path, facts in _closure(program, root):
        if facts.digest:
            found[path.relative_to(root).as_posix()] = facts.digest
        for resource in _named_files(facts.strings, path.parent):
            found[resource.relative_to(root).as_posix()] = _sha256(resource.read_bytes())
    assert found, f"no program {program}"
    return dict(sorted(found.items()))


def imported_packages(program: str, *, root: Path | None = None) -> set[str]:
    """Return the names of the top-level packages that the code of ``program`` imports."""
    return {name.partition(".")[0] for _, facts in _closure(program, root or ROOT) for name in facts.imports}


def _closure(program: str, root: Path) -> Iterator[tuple[Path, FileFacts]]:
    """Yield every file that ``program`` runs."""
    pending, seen = [program_module(program, root=root)], set[str]()
    while pending:
        module = pending.pop()
        path = _file_of(module, root)
        if module in seen or path is None:
            continue
        seen.add(module)
        facts = _facts(path.read_text(encoding="utf-8"), module, is_package=path.name == "__init__.py")
        yield path, facts
        pending += [module.rpartition(".")[0], *facts.imports]


@cache  # stages share most of their files
def _facts(text: str, module: str, *, is_package: bool) -> FileFacts:
    tree = parse(text, module)
    strings = {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    imports = list_imports(tree, module, is_package=is_package)
    content = [module.rpartition(".")[2], *sorted(_imported_names(tree)), _canonical(tree)]
    holds_code = any(not _is_docstring(node) for node in tree.body)
    return FileFacts(_sha256("\n".join(content).encode()) if holds_code else "", imports, strings)


def _is_counted(module: str) -> bool:
    left_out = module.startswith(tuple(f"{name}." for name in LEFT_OUT)) or module in LEFT_OUT
    return module.partition(".")[0] in OWN and (module in COUNTED or not left_out)


def _file_of(module: str, root: Path) -> Path | None:
    if not _is_counted(module):
        return None
    base = root.joinpath(*module.split("."))
    candidates = (base.with_suffix(".py"), base / "__init__.py")
    return next((path for path in candidates if path.is_file()), None)


def _is_own_import(node: object) -> bool:
    if isinstance(node, ast.Import):
        return all(alias.name.partition(".")[0] in OWN for alias in node.names)
    return isinstance(node, ast.ImportFrom) and (
        node.level > 0 or (node.module or "").partition(".")[0] in OWN
    )


def _imported_names(tree: ast.AST) -> Iterator[str]:
    """Yield the names that a file imports from our packages, without the folders of their modules."""
    for node in ast.walk(tree):
        if _is_own_import(node):
            assert isinstance(node, ast.Import | ast.ImportFrom)
            yield from (f"{alias.name.rpartition('.')[2]} as {alias.asname or ''}" for alias in node.names)


def _named_files(strings: set[str], folder: Path) -> list[Path]:
    """Return the data files beside a module whose names appear in it as strings (a page template, say)."""
    beside = {path.name: path for path in folder.iterdir() if path.is_file() and path.suffix != ".py"}
    return [beside[name] for name in sorted(strings & beside.keys())]


def _canonical(node: object) -> str:
    """Return a syntax tree as text that is the same for every Python version.

    Left out are positions, empty fields, docstrings and imports of our own modules.
    """
    if isinstance(node, list):
        return (
            "["
            + ",".join(_canonical(item) for item in node if not (_is_docstring(item) or _is_own_import(item)))
            + "]"
        )
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [
        f"{name}={_canonical(value)}"
        for name, value in ast.iter_fields(node)
        if value is not None and value != []
    ]
    return f"{type(node).__name__}({','.join(fields)})"


def _is_docstring(node: object) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
