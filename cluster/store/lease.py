"""Leases: who is at work in a temporary folder, and whether they still are.

An owner file names the process at work and holds a counter that its heartbeat raises. In its own domain a process is
looked up exactly. From elsewhere it counts as dead when its counter has not moved for a lease by the *observer's*
monotonic clock: no decision rests on file times or on two clocks that agree.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from cluster.host.process import Process
from cluster.store.faults import GONE, patient

OWNER_FILE = "owner.json"
UNOWNED_PATIENCE = 2.0
"""Seconds for a folder without a readable owner file: just made, or of one stopped between two system calls."""


@dataclass(frozen=True)
class Owner:
    """Content of an owner file."""

    process: Process
    lease: float
    beat: int = 0  # of a claim that is not decided yet; from 1 on it is at work
    released: bool = False  # its process ended the attempt, though it may go on serving other tasks
    resume_at_start: str = ""  # signature of `resume/` when the attempt began

    def alive(self) -> bool | None:
        """Whether its attempt still runs; None if only its beat can tell."""
        return False if self.released else self.process.alive()


@patient
def read_owner(root: Path) -> Owner | None:
    """The owner of a temporary folder; None if there is no owner file, or none that can be read."""
    try:
        data = json.loads((root / OWNER_FILE).read_bytes())
        return Owner(**{**data, "process": Process.from_json(data["process"])})
    except (*GONE, PermissionError, ValueError, KeyError, TypeError):
        return None


def create_owner(root: Path, owner: Owner) -> None:
    """Write the first owner file of a folder nobody else uses yet."""
    (root / OWNER_FILE).write_text(json.dumps(asdict(owner)))


def replace_owner(root: Path, owner: Owner) -> None:
    """Replace the owner file in one step; `FileNotFoundError` if the folder was taken away: the lease is lost."""
    fresh = root / f"{OWNER_FILE}.new"
    fresh.write_text(json.dumps(asdict(owner)))
    fresh.replace(root / OWNER_FILE)


@dataclass
class Watch:
    """Remembers when each beat was first seen, to tell leases that have run out."""

    _seen: dict[str, tuple[int, float]] = field(default_factory=dict)

    def expired(self, name: str, beat: int, patience: float) -> bool:
        """Whether the beat of `name` has not moved for `patience` seconds of watching."""
        now = time.monotonic()
        known = self._seen.get(name)
        if known is None or known[0] != beat:
            self._seen[name] = (beat, now)
            return False
        return now - known[1] >= patience

    def abandoned(self, root: Path) -> bool:
        """Whether nobody is at work in the temporary folder `root`, by what was seen until now."""
        owner = read_owner(root)
        if owner is None:
            return self.expired(root.name, -1, UNOWNED_PATIENCE)
        alive = owner.alive()
        return self.expired(root.name, owner.beat, owner.lease) if alive is None else not alive
