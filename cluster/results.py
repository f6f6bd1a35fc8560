"""The store: published results, each in a folder named after all that determines it.

<root>/<kind>/<key>/      a result and its manifest.json
<root>/logs/<run>/        logs of a run and of its attempts
<root>/locks/<label>.json owners of the runs at work
<root>/verdicts/         which files were read and found whole
<root>/code/<digest>.json modules and files of data behind a digest of code
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import fingerprint as code_module
from cluster.errors import BadTask
from cluster.store.layout import CODE, LOCKS, LOGS, VERDICTS
from cluster.store.publish import is_published
from cluster.task import Call, Resources, Task, check_json, task_key

_OWN = (LOGS, LOCKS, VERDICTS, CODE)
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Store:
    """A folder of published results, typically on a file system that all machines share."""

    root: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", Path(self.root).absolute())

    def path(self, kind: str, key: str) -> Path:
        """Where the result `key` of this kind is, or would be, published."""
        for name, value in (("kind", kind), ("key", key)):
            if not _NAME.fullmatch(value):
                raise BadTask(f"{name} {value!r}: use letters, digits, `_`, `-` and `.`, not at the start")
        if kind in _OWN:
            raise BadTask(f"kind {kind!r} is a folder of the store itself: use another name")
        return self.root / kind / key

    def task(
        self,
        kind: str,
        name: str,
        call: Call,
        spec: dict[str, Any],
        *,
        resources: Resources | None = None,
        code: str | None = None,
    ) -> Task:
        """A task whose result lies in this store under a key of its call, spec and code.

        Args:
            kind: folder of the store, such as "tokens".
            name: for people: progress, logs, reports.
            call: module-level `call(spec, folder)`.
            spec: JSON that determines the result.
            resources: what one attempt may use; one core without GPU if left out.
            code: a declared version instead of the fingerprint of the source.
        """
        try:
            check_json(spec)
            code = code or code_module.fingerprint(call)
            key = task_key(code_module.call_name(call), spec, code)
        except BadTask as error:
            raise BadTask(f"task {name!r}: {error}") from error
        return Task(name, call, spec, self.path(kind, key), resources or Resources(), kind, code, key)

    def published(self) -> Iterator[Path]:
        """Every published folder, by kind and key."""
        for parent in self.kinds():
            folders = (folder for folder in sorted(parent.iterdir()) if not folder.name.startswith("."))
            yield from (folder for folder in folders if is_published(folder))

    def kinds(self) -> list[Path]:
        """The folders that hold results."""
        if not self.root.is_dir():
            return []
        return sorted(path for path in self.root.iterdir() if path.is_dir() and path.name not in _OWN)

    @property
    def logs(self) -> Path:
        """Folder of the logs of all runs."""
        return self.root / LOGS

    @property
    def locks(self) -> Path:
        """Folder of the locks of the runs at work."""
        return self.root / LOCKS
