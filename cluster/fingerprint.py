"""The code a task depends on, as one string: how a change of source reaches the keys of the store.

A fingerprint covers the module of the call and, transitively, every first-party module it imports, inside
functions too. Comments, docstrings and layout do not count, nor does the version of Python. First-party are the
top-level package of the call and those that its `__init__` declares: `FIRST_PARTY = ("name", ...)`. A module that
declares `CODE_VERSION = "..."` is represented, with all that it imports, by that string: its author promises to
raise it when results change.

A string that is the path of a file beside the module stands for data which the module reads: the file's bytes count.
`DATA_IN_SPECS = ("file", ...)` leaves out files of which specs hold what a task reads, entry by entry.

Importing a module runs the `__init__` of its packages: these count, save that of the top-level package, which
holds public names only. A string that is the dotted name of a first-party module counts as an import of it
(lazy tables).
"""

import ast
import contextlib
import hashlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import groupby, takewhile
from pathlib import Path
from typing import Any

from cluster.errors import BadTask

_FILE = re.compile(r"\w[\w./-]*\.\w+")


def module_name(call: Callable[..., Any]) -> str:
    """Importable name of the module of `call`, the same whether its file was imported or run as a script."""
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
    packages = [folder.name for folder in takewhile(lambda above: (above / "__init__.py").exists(), file.parents)]
    return ".".join([*reversed(packages), file.stem])


def call_name(call: Callable[..., Any]) -> str:
    """`module:function` of a call; `BadTask` if it is none that another process can import."""
    qualname = getattr(call, "__qualname__", None)
    if qualname is None or not hasattr(call, "__module__"):
        raise BadTask(f"{call!r} has no name another process could import: use a module-level function")
    if not qualname.isidentifier():
        raise BadTask(f"{qualname} is not at module level: move it there, so that workers can import it")
    return f"{module_name(call)}:{qualname}"


@cache
def source_of(name: str) -> Path | None:
    """Source file of a module, found by path alone: nothing is imported (that may take seconds)."""
    top, *rest = name.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        return None
    if spec.submodule_search_locations:
        path = Path(next(iter(spec.submodule_search_locations)), *rest)
        found = (path / "__init__.py", path.with_name(f"{path.name}.py"))
        return next((candidate for candidate in found if candidate.is_file()), None)
    return Path(spec.origin) if spec.origin and spec.origin.endswith(".py") and not rest else None


def _is_idle(node: object) -> bool:
    """A statement without effect: a docstring, of an attribute too, or `pass`."""
    return isinstance(node, ast.Pass) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))


def normal_form(node: object) -> str:
    """A text of a syntax tree that is equal on every Python (`ast.unparse` and `ast.dump` are not)."""
    if isinstance(node, list):
        return f"[{','.join(normal_form(item) for item in node if not _is_idle(item))}]"
    if isinstance(node, ast.JoinedStr):  # Pythons differ in where they cut the text between values
        runs = groupby(node.values, lambda value: isinstance(value, ast.Constant))
        texts = (
            [ascii("".join(getattr(part, "value", "") for part in run))] if fixed else map(normal_form, run)
            for fixed, run in runs
        )
        return f"JoinedStr({','.join(text for run in texts for text in run if text != ascii(''))})"
    if not isinstance(node, ast.AST):
        return hex(node) if type(node) is int else ascii(node)  # Python writes no int of 5,000 digits in decimal
    fields = ((name, value) for name, value in ast.iter_fields(node) if name not in ("ctx", "kind"))
    # Without what is empty: fields that an older Python does not know are, as long as nobody uses them.
    written = ((name, "None" if value is None else normal_form(value)) for name, value in fields)
    is_constant = isinstance(node, ast.Constant)
    kept = (f"{name}={text}" for name, text in written if is_constant or text not in ("None", "[]"))
    return f"{type(node).__name__}({','.join(kept)})"


def _declared(tree: ast.Module, name: str, kind: type, wanted: str) -> Any:
    """The literal that a module assigns to `name`; None if it does not."""
    for node in tree.body:
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        if isinstance(node, ast.Assign | ast.AnnAssign) and name in (getattr(one, "id", None) for one in targets):
            with contextlib.suppress(ValueError):
                if isinstance(value := ast.literal_eval(node.value or "None"), kind):
                    return value
            raise BadTask(f"line {node.lineno}: {name} must be a literal {wanted}")
    return None


def _executed(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node but those under `if TYPE_CHECKING:`, which never run, and docstrings; in no order."""
    todo = [tree]
    while todo:
        node = todo.pop()
        yield node
        children: Iterable[ast.AST] = ast.iter_child_nodes(node)
        if isinstance(node, ast.If) and getattr(node.test, "id", getattr(node.test, "attr", "")) == "TYPE_CHECKING":
            children = node.orelse
        todo += [child for child in children if not _is_idle(child)]


def _imports(tree: ast.Module, module: str, is_package: bool, packages: frozenset[str]) -> Iterator[str]:
    """Names of first-party modules that a module imports, and of some that are none."""
    package = module if is_package else module.rpartition(".")[0]
    for node in _executed(tree):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=base, names=names, level=level):
                base = base or ""
                if level:
                    base = f"{package.rsplit('.', level - 1)[0]}.{base}".strip(".")
                if base.partition(".")[0] in packages:
                    # `from package import x`: x is a submodule, or a name made by the package's `__init__`.
                    inner = [f"{base}.{alias.name}" for alias in names]
                    yield from (name if source_of(name) else base for name in inner)
            case ast.Constant(value=str(text)) if "." in text and text.replace(".", "_").isidentifier():
                if text.strip("."):  # dots alone would be the package itself, again and again
                    yield f"{module}{text}" if text.startswith(".") and is_package else text


def _with_packages(name: str) -> set[str]:
    """The module and the packages whose `__init__` its import runs, without the top-level one."""
    parts = name.split(".")
    return {name, *(".".join(parts[:stop]) for stop in range(2, len(parts)))}


@cache
def _read(name: str, path: Path, packages: frozenset[str]) -> tuple[dict[str, str], set[str]]:
    """What stands for one module and for each file of data that it reads, and the first-party modules it imports."""
    try:
        tree = ast.parse(path.read_bytes())
        version = _declared(tree, "CODE_VERSION", str, "string")
        in_specs = _declared(tree, "DATA_IN_SPECS", tuple, "tuple of file names") or ()
    except (SyntaxError, BadTask) as error:
        raise BadTask(f"cannot fingerprint {path}: {error}") from error
    if version is not None:
        return {name: f"version {version}"}, set()
    digests = {name: hashlib.sha256(normal_form(tree).encode()).hexdigest()}
    for node in _executed(tree):
        text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
        if text not in in_specs and _FILE.fullmatch(text) and (path.parent / text).is_file():
            digests[f"{name}:{text}"] = hashlib.sha256((path.parent / text).read_bytes()).hexdigest()
    imported = _imports(tree, name, path.name == "__init__.py", packages)
    first_party = [found for found in imported if found.partition(".")[0] in packages]
    return digests, set().union(*map(_with_packages, first_party))


@cache
def _closure(root: str) -> dict[str, str]:
    top = root.partition(".")[0]
    path = source_of(top)
    declared = path and _declared(ast.parse(path.read_bytes()), "FIRST_PARTY", tuple, "tuple of packages")
    packages = frozenset({top, *(declared or ())})
    found: dict[str, str] = {}
    seen, todo = set[str](), _with_packages(root)
    while todo:
        name = todo.pop()
        seen.add(name)
        if (path := source_of(name)) is not None:
            digests, imported = _read(name, path, packages)
            found |= digests
            todo |= imported - seen
    if root not in found:
        raise BadTask(f"no Python source found for module {root!r}: declare a code version for its tasks")
    return dict(sorted(found.items()))


def parts(code: Callable[..., Any] | str) -> dict[str, str]:
    """All that a fingerprint covers: modules, and files of data as `module:path`, each with its digest."""
    return dict(_closure(code if isinstance(code, str) else module_name(code)))


def fingerprint(code: Callable[..., Any] | str) -> str:
    """Hash (32 hex digits) of the code behind a call, or a module of that name, which is read once a process.

    `BadTask` if there is no source, a syntax error in it, or a declaration that is not a literal.
    """
    text = "".join(f"{name}\0{digest}\0" for name, digest in parts(code).items())
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def forget() -> None:
    """Drop what was remembered: for tests, and for sessions that reload modules."""
    for cached in (source_of, _read, _closure):
        cached.cache_clear()
