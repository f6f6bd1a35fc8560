"""What lies where in a store, and looking at file systems that fail for a moment, or are late, as shared ones do.

Names beside a target, which are known here alone:

<parent>/<name>                     the published folder
<parent>/.<name>.tmp-<attempt>/     one attempt: owner.json, result/ (what the call writes), resume/
<parent>/.<name>.corrupt-<random>/  a published folder that no longer agreed with its manifest
<parent>/.<name>.dropped-<random>/  a published folder that is being removed
"""

import contextlib
import errno
import functools
import logging
import os
import re
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, ParamSpec, TypeVar

from cluster.errors import BadTask, StoreUnavailable

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
LOGS, LOCKS, VERDICTS, CODE = "logs", "locks", "verdicts", "code"  # folders of the store that hold no results
STATUS, ATTEMPTS = "status.json", "attempts.jsonl"  # of a run, in its folder of the logs
RESULT, RESUME = "result", "resume"
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.tmp-(?P<attempt>[0-9a-f]{32})", re.DOTALL)
_PUT_ASIDE = re.compile(r"\..+\.(corrupt|dropped)(-[0-9a-f]{8})?", re.DOTALL)
_LONGEST_NAME = 180  # bytes of a folder name, so that the names beside it stay within the usual 255
PAUSES = (0.1, 0.5, 2.0, 5.0)  # seconds before the second, third, ... try
GONE = (FileNotFoundError, NotADirectoryError)  # say that a file is not there; other errors say nothing about it
_TRANSIENT = frozenset(
    getattr(errno, name, errno.EIO)  # not every system has them all
    for name in "EIO ESTALE EAGAIN EBUSY EINTR ETIMEDOUT EREMOTEIO EHOSTDOWN EHOSTUNREACH ENETDOWN ENETUNREACH"
    " ECONNREFUSED ECONNRESET ECONNABORTED ENOTCONN ESHUTDOWN ENOBUFS ENOMEM ENFILE EMFILE".split()
)

P = ParamSpec("P")
R = TypeVar("R")


@contextlib.contextmanager
def unavailable(what: str) -> Iterator[None]:
    """Raise `StoreUnavailable`, which begins with `what`, for an error that might be gone in a moment."""
    try:
        yield
    except OSError as error:
        if error.errno in _TRANSIENT:
            raise StoreUnavailable(f"{what}: {error}") from error
        raise


def patient(action: Callable[P, R]) -> Callable[P, R]:
    """Try an action that may be repeated again, with back-off, while the file system fails for a moment.

    Raises `StoreUnavailable` if it fails for longer, and at once any `OSError` that waiting does not mend.
    """

    @functools.wraps(action)
    def tried(*args: P.args, **kwargs: P.kwargs) -> R:
        for pause in PAUSES:
            try:
                return action(*args, **kwargs)
            except OSError as error:
                if error.errno not in _TRANSIENT:
                    raise
                log.warning("%s; again in %g s", error, pause)
            time.sleep(pause)
        with unavailable(f"the file system of the store failed {len(PAUSES) + 1} times"):
            return action(*args, **kwargs)
        raise AssertionError("it returned or raised")

    return tried


def appears(condition: Callable[[], object], seconds: float) -> bool:
    """Whether it comes true in so much time, which shared file systems take to show what another machine did."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def new_attempt() -> str:
    """A fresh name for an attempt."""
    return uuid.uuid4().hex


def check_out(out: Path) -> None:
    """Raise `BadTask` if `out` cannot have temporaries beside it: no folder name, or one that is too long."""
    if out.name in ("", ".", "..") or "\0" in str(out):
        raise BadTask(f"{str(out)!r} is not the path of a folder to publish")
    if len(os.fsencode(out.name)) > _LONGEST_NAME:
        raise BadTask(f"the folder name of {out} is longer than {_LONGEST_NAME} bytes: use a shorter one")


def is_published(folder: Path) -> bool:
    """Whether a result is there: one look-up. `verify` reads every byte."""
    try:
        return stat.S_ISREG(patient(os.stat)(Path(folder) / MANIFEST).st_mode)
    except GONE:
        return False


def temporary(out: Path, attempt: str | None = None) -> Path:
    """Temporary folder of one attempt to make `out`; of a new one that nobody makes if None."""
    return out.parent / f".{out.name}.tmp-{attempt or new_attempt()}"


def aside(out: Path, why: Literal["corrupt", "dropped"]) -> Path:
    """A fresh name for a published folder that is to be one no longer."""
    return out.parent / f".{out.name}.{why}-{uuid.uuid4().hex[:8]}"


def temporaries(parent: Path, name: str | None = None) -> list[tuple[Path, str, str]]:
    """(folder, name of its target, attempt) of every temporary in `parent`, or of those of one target."""
    matches = [(entry, _TEMPORARY.fullmatch(entry)) for entry in _names(parent)]
    return [(parent / entry, m["name"], m["attempt"]) for entry, m in matches if m and name in (None, m["name"])]


def put_aside(parent: Path) -> list[Path]:
    """Published folders in `parent` that were found corrupt, or whose removal was cut short."""
    return [parent / entry for entry in _names(parent) if _PUT_ASIDE.fullmatch(entry)]


def replace_text(path: Path, text: str) -> None:
    """Write a file so that readers find all of it, or what was there before."""
    fresh = path.with_name(f".{path.name}.{new_attempt()}")
    try:
        fresh.write_text(text)
        fresh.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            fresh.unlink()
        raise


@patient
def files_in(folder: Path) -> list[Path]:
    """All that is below `folder`, if there is one, and is no folder, sorted. Links, to folders too, are not followed.

    Raises `OSError`, where `Path.rglob` would leave out in silence what it cannot read.
    """

    def fail(error: OSError) -> None:
        if not isinstance(error, GONE):
            raise error

    found = []
    for root, folders, names in os.walk(folder, onerror=fail):
        links = [name for name in folders if Path(root, name).is_symlink()]
        found += [Path(root, name) for name in names + links]
    return sorted(found)


@patient
def _names(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir())
    except GONE:
        return []
