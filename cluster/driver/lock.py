"""One run at a time for each store and label: a lock file that names its owner.

The kernel holds the lock (flock), so it ends with its owner however that ends. Where the file system has no
locks the name in the file decides; that of a dead owner on another host is then to be removed by hand. Should both
fail, nothing is lost: publication is safe without any lock.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from filelock import FileLock, Timeout

from cluster.config import OnLocked
from cluster.errors import Locked
from cluster.host.process import Process

log = logging.getLogger(__name__)

PERIOD = 0.3
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@dataclass(frozen=True)
class Holder:
    """Content of a lock file."""

    process: Process
    run_id: str
    since: str

    def __str__(self) -> str:
        return f"run {self.run_id} on {self.process} since {self.since}"


def lock_path(folder: Path, label: str) -> Path:
    """The lock file of a label, of no other one."""
    return folder / f"{quote(label, safe=' ')}.json"


def read_holder(path: Path) -> Holder | None:
    """Who a lock file names; None if there is no lock file, or it names nobody."""
    try:
        data: dict[str, Any] = json.loads(path.read_bytes())
        return Holder(Process.from_json(data["process"]), str(data["run"]), str(data["since"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextlib.contextmanager
def run_lock(
    folder: Path, label: str, run_id: str, on_locked: OnLocked, check: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Hold the lock of `label`; without a label there is none.

    Args:
        folder: of the lock files.
        label: what the run is, such as the name of a stage.
        run_id: of this run, for others to read.
        on_locked: whether to wait for another run or to refuse.
        check: called while waiting; may raise to end it.

    Raises:
        Locked: another run holds it, and we are to refuse.
    """
    if not label:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = lock_path(folder, label)
    told = False
    while (lock := _try(path)) is None:
        holder = read_holder(path)
        if on_locked == "refuse":
            raise Locked(f"{label!r} is held by {holder or 'another run'} ({path}): wait for it, or stop it")
        if not told:
            log.warning("waiting: %r is held by %s (%s)", label, holder or "another run", path)
            told = True
        check()
        time.sleep(PERIOD)
    try:
        since = time.strftime("%Y-%m-%d %H:%M:%S %z")
        path.write_text(json.dumps({"process": Process.me().to_json(), "run": run_id, "since": since, "label": label}))
        yield
    finally:
        _end(lock)


def sweep_locks(folder: Path) -> list[Holder | None]:
    """Remove the lock files of dead owners; who holds the others."""
    held = []
    for path in sorted(folder.glob("*.json")):
        if (lock := _try(path)) is None:
            held.append(read_holder(path))
        else:
            _end(lock)
    return held


def _try(path: Path) -> FileLock | None:
    """The lock, held; None if somebody else has it."""
    lock = FileLock(path, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return None
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        holder = read_holder(path)
        return lock if holder is None or holder.process.alive() is False else None
    return lock


def _end(lock: FileLock) -> None:
    """Remove the file while we hold it, so that nobody can have locked it meanwhile, then let go."""
    Path(lock.lock_file).unlink(missing_ok=True)
    lock.release()
