"""One run at a time for each store and label: a lock file that names its owner.

The kernel holds the lock (flock), so it ends with its owner however that ends. Where the file system has no
locks the name in the file decides; that of a dead owner on another host is then to be removed by hand. Should both
fail, nothing is lost: publication is safe without any lock.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

from cluster.config import OnLocked
from cluster.errors import Locked
from cluster.host import Process

log = logging.getLogger(__name__)

PERIOD = 0.3
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextlib.contextmanager
def run_lock(
    folder: Path, label: str, run_id: str, on_locked: OnLocked, check: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Hold the lock of `label`; without a label there is none. `check` is called while waiting; it may raise.

    Raises `Locked` if another run holds it, and `on_locked` says to refuse.
    """
    if not label:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{quote(label, safe=' ')}.json"  # of no other label
    told = False
    while (lock := _try(path)) is None:
        holder = _holder(path)[1]
        if on_locked == "refuse":
            raise Locked(f"{label!r} is held by {holder} ({path}): wait for it, or stop it")
        if not told:
            log.warning("waiting: %r is held by %s (%s)", label, holder, path)
            told = True
        check()
        time.sleep(PERIOD)
    try:
        since = time.strftime("%Y-%m-%d %H:%M:%S %z")
        path.write_text(json.dumps({"process": vars(Process.me()), "run": run_id, "since": since, "label": label}))
        yield
    finally:
        _end(path, lock)


def sweep_locks(folder: Path) -> list[str]:
    """Remove the lock files of dead owners; who holds the others."""
    held = []
    for path in sorted(folder.glob("*.json")):
        if (lock := _try(path)) is None:
            held.append(_holder(path)[1])
        else:
            _end(path, lock)
    return held


def _holder(path: Path) -> tuple[Process | None, str]:
    """Whom a lock file names, also in words."""
    try:
        data = json.loads(path.read_bytes())
        process = Process.from_json(data["process"])
        return process, f"run {data['run']} on {process} since {data['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return None, "another run"


def _try(path: Path) -> int | None:
    """An open handle of the locked file; None if somebody else has it."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        free = True
    except OSError as error:
        if error.errno not in (*_UNSUPPORTED, errno.EWOULDBLOCK):
            raise
        process = _holder(path)[0]
        free = error.errno in _UNSUPPORTED and (process is None or process.alive() is False)
    with contextlib.suppress(FileNotFoundError):  # its owner removed it meanwhile: the next try makes a new one
        if free and os.path.samestat(os.fstat(handle), path.stat()):
            return handle
    os.close(handle)
    return None


def _end(path: Path, handle: int) -> None:
    """Remove the file while we hold it, so that nobody can have locked it meanwhile, then let go."""
    path.unlink(missing_ok=True)
    os.close(handle)
