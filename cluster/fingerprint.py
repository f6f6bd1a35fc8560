"""The code a task depends on, as one string: how a change of source reaches the keys of the store.

A fingerprint covers the module of the call and, transitively, every first-party module it imports, inside
functions too. Comments, docstrings and layout do not count. A module that declares `CODE_VERSION = "..."` is
represented, with all that it imports, by that string: its author promises to raise it when results change.

Importing a module runs the `__init__` of its packages: these count, save that of the top-level package, which
holds public names only. A string that is the dotted name of a first-party module counts as an import of it
(lazy tables).
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from cluster.errors import BadTask

# Packages whose source counts. This package is left out on purpose: how work is run never changes what it
# computes.
FIRST_PARTY = frozenset({"ocvtp", "pipelines"})
LEFT_OUT = frozenset({"cluster"})


def module_name(call: Callable[..., Any]) -> str:
    """Importable name of the module of `call`, the same whether its file was imported or run as a script.

    Raises:
        BadTask: the call was defined where no other process can import it.
    """
    name = call.__module__
    if name != "__main__":
        return name
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if spec is not None:
        return str(spec.name)
    file = getattr(main, "__file__", None)
    if file is None:
        raise BadTask(f"{call.__qualname__} is defined in an interactive session: move it into a module")
    return dotted_name(Path(file))


def dotted_name(file: Path) -> str:
    """Dotted name of a source file: its packages are the folders above it that hold an `__init__.py`."""
    file = file.resolve()
    parts = [file.stem]
    for folder in file.parents:
        if not (folder / "__init__.py").exists():
            break
        parts.append(folder.name)
    return ".".join(reversed(parts))


def call_name(call: Callable[..., Any]) -> str:
    """`module:function` of a module-level function.

    Raises:
        BadTask: a lambda, a nested function, a method, or an object without a name.
    """
    qualname = getattr(call, "__qualname__", None)
    if qualname is None or not hasattr(call, "__module__"):
        raise BadTask(f"{call!r} has no name another process could import: use a module-level function")
    if not qualname.isidentifier():
        raise BadTask(f"{qualname} is not at module level: move it there, so that workers can import it")
    return f"{module_name(call)}:{qualname}"


@cache
def _root_of(top: str) -> Path | None:
    """File of a top-level module, or folder of a top-level package, without importing it."""
    module = sys.modules.get(top)
    spec = getattr(module, "__spec__", None) if module is not None else None
    try:
        spec = spec or importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    return Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None


@cache
def source_of(name: str) -> Path | None:
    """Source file of a module, found by path alone: nothing is imported (that may take seconds)."""
    top, *rest = name.split(".")
    path = _root_of(top)
    if path is None:
        return None
    if path.suffix == ".py":
        return path if not rest else None
    path = path.joinpath(*rest)
    for candidate in (path / "__init__.py", path.with_name(path.name + ".py")):
        if candidate.is_file():
            return candidate
    return None


def _strip_docstrings(tree: ast.Module) -> None:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
            if not node.body and not isinstance(node, ast.Module):
                node.body = [ast.Pass()]


def _declared_version(tree: ast.Module) -> str | None:
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.AnnAssign):
            targets = [node.target]
        if not any(isinstance(target, ast.Name) and target.id == "CODE_VERSION" for target in targets):
            continue
        value = getattr(node, "value", None)
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            return value.value
        raise BadTask(f"line {node.lineno}: CODE_VERSION must be a literal string")
    return None


def _is_type_checking(test: ast.expr) -> bool:
    return getattr(test, "id", getattr(test, "attr", "")) == "TYPE_CHECKING"


def _executed(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node but those under `if TYPE_CHECKING:`, which never run."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and _is_type_checking(child.test):
            for other in child.orelse:
                yield other
                yield from _executed(other)
        else:
            yield child
            yield from _executed(child)


def _from_import(node: ast.ImportFrom, module: str, is_package: bool) -> Iterator[str]:
    base = node.module or ""
    if node.level:
        parents = module.split(".")
        keep = len(parents) - node.level + is_package
        base = ".".join([*parents[: max(keep, 0)], *([base] if base else [])])
    for alias in node.names:
        # `from package import x`: x is a submodule, or a name made by the package's `__init__`.
        inner = f"{base}.{alias.name}"
        yield inner if source_of(inner) else base


def _imports(tree: ast.Module, module: str, is_package: bool, packages: frozenset[str]) -> Iterator[str]:
    for node in _executed(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            top = module if node.level else node.module or ""
            if top.partition(".")[0] in packages:
                yield from _from_import(node, module, is_package)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value
            if "." in text and text.replace(".", "_").isidentifier():
                yield f"{module}{text}" if text.startswith(".") and is_package else text


def _with_packages(name: str) -> Iterator[str]:
    """The module and the packages whose `__init__` its import runs, without the top-level one."""
    parts = name.split(".")
    yield name
    yield from (".".join(parts[:stop]) for stop in range(2, len(parts)))


def _read(name: str, path: Path, packages: frozenset[str]) -> tuple[str, list[str]]:
    """What stands for one module, and the names of the first-party modules it imports."""
    try:
        tree = ast.parse(path.read_bytes())
        version = _declared_version(tree)
    except (SyntaxError, BadTask) as error:
        raise BadTask(f"cannot fingerprint {path}: {error}") from error
    if version is not None:
        return f"version {version}", []
    _strip_docstrings(tree)
    found: set[str] = set()
    for imported in _imports(tree, name, path.name == "__init__.py", packages):
        if imported.partition(".")[0] in packages:
            found.update(_with_packages(imported))
    return ast.unparse(tree), sorted(found)


@cache
def _closure(root: str) -> dict[str, str]:
    packages = (FIRST_PARTY | {root.partition(".")[0]}) - LEFT_OUT
    texts: dict[str, str] = {}
    todo = [root, *_with_packages(root)]
    while todo:
        name = todo.pop()
        path = source_of(name)
        if name in texts or path is None:
            continue
        texts[name], imported = _read(name, path, packages)
        todo.extend(imported)
    if root not in texts:
        raise BadTask(f"no Python source found for module {root!r}: declare a code version for its tasks")
    return texts


def modules(call_or_module: Callable[..., Any] | ModuleType | str) -> list[str]:
    """Names of the modules a fingerprint covers, sorted: what `fingerprint` would notice a change of."""
    return sorted(_closure(_name_of(call_or_module)))


def fingerprint(call_or_module: Callable[..., Any] | ModuleType | str) -> str:
    """Hash (32 hex digits) of the code behind a call or module; computed once a process.

    Raises:
        BadTask: no source, a syntax error, or a `CODE_VERSION` that is not a literal string.
    """
    return _digest(_name_of(call_or_module))


def _name_of(call_or_module: Callable[..., Any] | ModuleType | str) -> str:
    if isinstance(call_or_module, str):
        return call_or_module
    if isinstance(call_or_module, ModuleType):
        return call_or_module.__name__
    return module_name(call_or_module)


@cache
def _digest(root: str) -> str:
    digest = hashlib.sha256()
    for name, text in sorted(_closure(root).items()):
        digest.update(f"{name}\0{text}\0".encode())
    return digest.hexdigest()[:32]


def forget() -> None:
    """Drop what was remembered: for tests, and for sessions that reload modules."""
    for cached in (_root_of, source_of, _closure, _digest):
        cached.cache_clear()
