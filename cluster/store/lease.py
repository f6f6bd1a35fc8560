"""Leases: who is at work in a temporary folder, whether they still are, and cleaning up once they are not.

An owner file names the process at work and holds a counter that its heartbeat raises. In its own domain a process is
looked up exactly. From elsewhere it counts as dead when its counter has not moved for a lease by the *observer's*
monotonic clock: no decision rests on file times or on two clocks that agree. What the next attempt can resume from is
not cleaned up.
"""

import contextlib
import hashlib
import json
import logging
import shutil
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from cluster.host import Process
from cluster.store import layout
from cluster.store.layout import GONE, RESULT, RESUME, files_in, patient, temporaries, temporary

log = logging.getLogger(__name__)

OWNER_FILE = "owner.json"
Marks = list[list[str | int]]
"""Path (with `/`), size (bytes), mtime (ns), inode and ctime (ns) of each file of a folder, sorted by path."""
UNOWNED_PATIENCE = 2.0  # seconds for a folder without a readable owner file: just made, or of one just killed


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


def replace_owner(root: Path, owner: Owner) -> None:
    """Write the owner file in one step; `FileNotFoundError` if the folder was taken away: the lease is lost."""
    layout.replace_text(root / OWNER_FILE, json.dumps(asdict(owner)))


@dataclass
class Watch:
    """Remembers when each beat was first seen, to tell leases that have run out."""

    _seen: dict[str, tuple[int, float]] = field(default_factory=dict)

    def abandoned(self, root: Path) -> bool:
        """Whether nobody is at work in the temporary folder `root`, by what was seen until now."""
        owner, now = read_owner(root), time.monotonic()
        if owner is not None and (alive := owner.alive()) is not None:
            return not alive
        beat, patience = (-1, UNOWNED_PATIENCE) if owner is None else (owner.beat, owner.lease)
        known = self._seen.get(root.name)
        if known is None or known[0] != beat:
            self._seen[root.name] = (beat, now)
            return False
        return now - known[1] >= patience


def resume_of(root: Path) -> Path | None:
    """The `resume/` of an attempt, if it holds a file."""
    return next((found for found in (root / RESULT / RESUME, root / RESUME) if files_in(found)), None)


@patient
def marks(folder: Path) -> Marks:
    """What changes whenever a file below `folder` is added, changed or replaced, and in its ctime if it is linked."""
    found: Marks = []
    for path in files_in(folder):
        with contextlib.suppress(*GONE):
            stat, name = path.lstat(), path.relative_to(folder).as_posix()
            found.append([name, stat.st_size, stat.st_mtime_ns, stat.st_ino, stat.st_ctime_ns])
    return found


def signature(folder: Path) -> str:
    """Changes whenever a file below `folder` is added, grown or replaced; "" if there is none."""
    found = [one[:4] for one in marks(folder)]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest() if found else ""


@patient
def discard(root: Path) -> None:
    """Clean up after an attempt that is over: all of it, or all but a `resume/` that holds something."""
    with contextlib.suppress(*GONE):  # somebody else fenced or swept it
        resume = resume_of(root)
        if resume is None:
            remove(root)
            return
        owner = read_owner(root)
        if owner is not None and not owner.released:
            replace_owner(root, replace(owner, released=True))
        if resume.parent != root:
            resume.rename(root / RESUME)
        remove_tree(root / RESULT)


def fence(out: Path, attempt: str) -> bool:
    """Clean up after an attempt elsewhere, which from here on can never publish, even if it still runs.

    Says whether it left something new in its `resume/`.
    """
    target, progressed = temporary(out), False
    with contextlib.suppress(*GONE):
        patient(temporary(out, attempt).rename)(target)
        owner, resume = read_owner(target), resume_of(target)
        progressed = owner is not None and resume is not None and signature(resume) != owner.resume_at_start
        discard(target)
    return progressed


def remove_tree(path: Path) -> None:
    """Remove a folder; a warning if that cannot be done."""
    for _ in range(5):  # children of a killed worker may still be writing for an instant
        shutil.rmtree(path, ignore_errors=True)
        if not path.exists():
            return
        time.sleep(0.05)
    log.warning("could not remove %s", path)


def remove_empty(root: Path) -> bool:
    """Remove `root` if nothing at all is in it; True if it is gone."""
    with contextlib.suppress(OSError):
        root.rmdir()
    return not root.exists()


def remove(root: Path) -> None:
    """Remove a temporary folder, its owner file last, so that a half removed one still names its owner."""
    for folder in (root / RESULT, root / RESUME, root):
        remove_tree(folder)


@patient
def sweep(parent: Path, watch: Watch, *, resume_too: bool = False) -> list[Path]:
    """Remove the temporaries in `parent` that nobody works in, and say which those were.

    `watch` remembers beats between calls: owners on other hosts are judged by the second call or later. A `resume/`
    that holds something is spared, but for targets that are published, or if it is to be dropped too.
    """
    removed = []
    for root, name, _ in temporaries(parent):
        if not remove_empty(root):
            is_useful = not (resume_too or layout.is_published(parent / name)) and resume_of(root) is not None
            if not watch.abandoned(root) or is_useful:
                continue
            remove(root)
        removed.append(root)
    return removed
