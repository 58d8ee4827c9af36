"""Find the source files that a Python module consists of, without importing it, and hash them."""

import ast
import hashlib
import importlib.util
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from threading import Lock

INSTALLED = ("site-packages", "dist-packages")

# Stages run in threads of one flow, and Python 3.11 confuses the depths of trees made at the same time:
# "SystemError: AST constructor recursion depth mismatch" (python/cpython#106905).
_PARSING = Lock()


def parse(text: str, name: str) -> ast.Module:
    """Return the syntax tree of a module's text. Raises SyntaxError."""
    with _PARSING:
        return ast.parse(text, name)


def list_imports(tree: ast.AST, module: str, *, is_package: bool) -> list[str]:
    """Return every module that ``tree`` may import; ``from a import b`` names both a and a.b."""
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


def find_module(name: str) -> Path | None:
    """Return the file of a module that can be imported here; None if there is none, or it has no file."""
    spec = _find_spec(name)
    return Path(spec.origin) if spec and spec.has_location and spec.origin else None


def _find_spec(name: str) -> ModuleSpec | None:
    """Return a module's spec. Packages above it are not imported, as importlib.util would."""
    first, *rest = name.split(".")
    try:
        spec = importlib.util.find_spec(first)
    except (ValueError, ImportError):  # it is loaded without a spec, as __main__ is
        return None
    for part in rest:
        if spec is None or spec.submodule_search_locations is None:
            return None
        # by its last name: by the whole one a namespace package looks for its parent among imported modules
        spec = PathFinder.find_spec(part, [*spec.submodule_search_locations])
    return spec


def source_files(name: str) -> dict[str, Path]:
    """Return the files of a module, of the packages that it lies in, and of what it imports from beside it.

    "Beside" is the folder that holds its top-level package; of an installed package, that package alone.
    Raises SyntaxError.
    """
    top = name.partition(".")[0]
    found: dict[str, Path] = {}
    pending, seen = [name], set[str]()
    root = _root(name)
    while pending:
        module = pending.pop()
        path = None if module in seen else find_module(module)
        seen.add(module)
        if parent := module.rpartition(".")[0]:
            pending.append(parent)
        if path is None or root is None or not path.is_relative_to(root):
            continue
        if root.name not in INSTALLED and {*path.relative_to(root).parts} & {*INSTALLED}:
            continue  # of an environment inside the checkout
        if root.name in INSTALLED and module.partition(".")[0] != top:
            continue
        found[module] = path
        if path.suffix == ".py":
            text, is_package = path.read_text(encoding="utf-8"), path.name == "__init__.py"
            pending += _read_imports(text, module, str(path), is_package=is_package)
        pending = [one for one in pending if one not in seen]
    return dict(sorted(found.items()))


@cache  # modules of one program share most of their files
def _read_imports(text: str, module: str, path: str, *, is_package: bool) -> list[str]:
    """Return every module that a module's text may import. Raises SyntaxError."""
    return list_imports(parse(text, path), module, is_package=is_package)


def _root(name: str) -> Path | None:
    """Return the folder that holds the top-level module or package of ``name``."""
    spec = _find_spec(name.partition(".")[0])
    if spec is None:
        return None
    if spec.submodule_search_locations is not None:
        return Path(next(iter(spec.submodule_search_locations))).parent
    return Path(spec.origin).parent if spec.has_location and spec.origin else None


def source_digest(name: str) -> str:
    """Return the sha256 over the names and contents of `source_files`. Raises SyntaxError."""
    digest = hashlib.sha256()
    for module, path in source_files(name).items():
        digest.update(f"{module} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def defined_names(path: Path) -> set[str] | None:
    """Return the names that a module's file may define; None if that cannot be read from it."""
    if path.suffix != ".py":
        return None
    names = set[str]()
    for node in ast.walk(parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
    return None if "*" in names or "__getattr__" in names else names
