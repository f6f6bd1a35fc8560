"""A digest of code: of modules and of what these import of the packages that they belong to."""

import ast
import hashlib
import importlib.util
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path


def code_digest(modules: Iterable[str]) -> str:
    """A digest of the code of modules as it stands on disk now, and of all that it imports of their own packages.

    Imports inside functions count, other installed packages do not: their versions tell them apart. Comments and layout
    do not count. What a module imports by a name that it computes is not seen: name that module, too.
    """
    digest = hashlib.sha256()
    for name, path in sorted(sources(modules).items()):
        digest.update(f"{name}\0{_read(path, path.stat().st_mtime_ns, path.stat().st_size)[0]}\0".encode())
    return digest.hexdigest()[:32]


def sources(modules: Iterable[str]) -> dict[str, Path]:
    """The modules that `code_digest` covers, and the file of each."""
    left = list(modules)
    own = {name.partition(".")[0] for name in left}
    found: dict[str, Path] = {}
    while left:
        name = left.pop()
        path = None if name in found or name.partition(".")[0] not in own else _file_of(name)
        if path is None:
            continue
        found[name] = path
        package = name if path.stem == "__init__" else name.rpartition(".")[0]
        for base, level, names in _read(path, path.stat().st_mtime_ns, path.stat().st_size)[1]:
            if level:
                above = package.split(".")[: len(package.split(".")) - level + 1]
                base = ".".join([*above, base] if base else above)
            inner = [f"{base}.{each}" for each in names]
            left += [each if _file_of(each) else base for each in inner] or [base]
        if "." in (parent := name.rpartition(".")[0]):  # its __init__ runs; the top one holds public names alone
            left.append(parent)
    return found


def _file_of(name: str) -> Path | None:
    """Of a module; None if it has none, or if the name is that of something inside a module."""
    try:
        spec = importlib.util.find_spec(name) if name else None
    except (ImportError, ValueError, AttributeError):
        return None
    return Path(spec.origin) if spec is not None and spec.origin and spec.origin.endswith(".py") else None


@lru_cache(maxsize=1024)
def _read(path: Path, changed: int, size: int) -> tuple[str, tuple[tuple[str, int, tuple[str, ...]], ...]]:
    """A file's code without comments and layout, and what it imports: base, dots before it, names."""
    tree = ast.parse(path.read_bytes())
    return ast.unparse(tree), tuple(_imports(tree))


def _imports(tree: ast.Module) -> Iterator[tuple[str, int, tuple[str, ...]]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0, ()) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", node.level, tuple(alias.name for alias in node.names)
