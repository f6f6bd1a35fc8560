"""What became of a task: its result, and the attempts that every run of its store has noted."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cluster.store.layout import ATTEMPTS, LOGS, temporaries
from cluster.store.lease import read_owner
from cluster.store.publish import is_published

Status = Literal["published", "running", "failed", "missing"]
"""Running: an attempt holds its lease, on whatever machine; failed: the last attempt did not publish."""


@dataclass(frozen=True)
class Lookup:
    """What is known of a task."""

    status: Status
    folder: Path
    """Of the result, once it is published."""
    attempts: tuple[dict[str, Any], ...]
    """Those that ended, oldest first, as the journals of the runs have them: time, attempt, cause, detail, node, ..."""
    log: Path | None
    """Of the last attempt that ended."""


def lookup(out: Path, key: str) -> Lookup:
    """Look up the task of this key that publishes `out` in a store."""
    found = []
    for path in sorted((out.parent.parent / LOGS).glob(f"*/{ATTEMPTS}")):
        lines = [line for line in path.read_text().splitlines() if key in line and line.endswith("}")]  # whole ones
        found += [(note, path.parent / note.get("log", "")) for note in map(json.loads, lines) if note["key"] == key]
    found.sort(key=lambda one: one[0]["time"])
    owners = [read_owner(root) for root, _, _ in temporaries(out.parent, out.name)]
    status: Status = "failed" if found else "missing"
    if is_published(out):
        status = "published"
    elif any(owner is not None and owner.alive() is not False for owner in owners):
        status = "running"
    logs = [log for _, log in found if log.is_file()]
    return Lookup(status, out, tuple(note for note, _ in found), logs[-1] if logs else None)
