"""The store: published results, each in a folder named after all that determines it.

<root>/<kind>/<key>/       a result and its manifest.json
<root>/logs/<run>/         logs of a run and of its attempts
<root>/locks/<label>.json  owners of the runs at work
<root>/verdicts/           which results were read and found whole
<root>/code/<digest>.json   modules and files of data behind a digest of code
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.errors import BadTask
from cluster.store.layout import CODE, LOCKS, LOGS, VERDICTS
from cluster.store.publish import is_published
from cluster.task import Call, Resources, Task

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
        """A `Task` whose result lies in this store, in the folder `kind`, under a key of its call, spec and code.

        `code` may be a declared version, instead of the fingerprint of the source.
        """
        task = Task(name, call, spec, self.root, resources or Resources(), kind, code or "")
        return replace(task, out=self.path(kind, task.key))

    def published(self) -> Iterator[Path]:
        """Every published folder, by kind and key."""
        for kind in self.kinds():
            yield from (path for path in sorted(kind.iterdir()) if path.name[0] != "." and is_published(path))

    def kinds(self) -> list[Path]:
        """The folders that hold results."""
        folders = self.root.iterdir() if self.root.is_dir() else ()
        return sorted(path for path in folders if path.is_dir() and path.name not in _OWN)

    @property
    def logs(self) -> Path:
        """Folder of the logs of all runs."""
        return self.root / LOGS

    @property
    def locks(self) -> Path:
        """Folder of the locks of the runs at work."""
        return self.root / LOCKS
