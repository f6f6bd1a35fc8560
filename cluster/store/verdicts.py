"""What was found whole once is not read again as long as the file system says that nobody touched it.

<store>/verdicts/<kind>/<key>.json has, for each file of a result, its size, mtime, inode, ctime and the SHA-256 that
its content had. A file that was changed, or replaced under an old mtime, has another ctime or inode, and is read again.
What a disk loses by itself shows in none of these: `verify` without verdicts reads every byte.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
import uuid
from collections.abc import Mapping
from pathlib import Path

from cluster.store.layout import VERDICTS

log = logging.getLogger(__name__)

Mark = tuple[int, int, int, int]
"""Size (bytes), mtime (ns), inode and ctime (ns) of a file."""
Verdict = tuple[Mark, str]
"""What a file looked like when it was read, and its SHA-256."""
_TICK_NS = 20_000_000
"""Two changes within a tick of a file system's clock (10 ms at most) may leave the same times."""


def mark(status: os.stat_result) -> Mark:
    """What changes whenever the file does."""
    return status.st_size, status.st_mtime_ns, status.st_ino, status.st_ctime_ns


def marks(folder: Path) -> dict[str, Mark]:
    """The mark of every file below a folder whose next change will show, by path with `/`."""
    files = {path.relative_to(folder).as_posix(): mark(path.lstat()) for path in folder.rglob("*") if path.is_file()}
    return {path: found for path, found in files.items() if settled(found)}


def settled(found: Mark) -> bool:
    """Whether the next change of the file will show in its times."""
    return time.time_ns() - found[3] > _TICK_NS


def recall(folder: Path) -> dict[str, Verdict]:
    """Mark and SHA-256 of the files of a published folder, as they were when they were read; empty if never."""
    try:
        found = json.loads(_path(folder).read_bytes())
        return {path: ((size, mtime, inode, ctime), sha) for path, (size, mtime, inode, ctime, sha) in found.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        log.warning("%s: %r; the files are read again", _path(folder), error)
        return {}


def remember(folder: Path, found: Mapping[str, Verdict]) -> None:
    """Keep what `recall` gives; a store that cannot be written to remembers nothing."""
    path = _path(folder)
    fresh = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    text = json.dumps({name: [*one, sha256] for name, (one, sha256) in found.items()}, sort_keys=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(text)
        fresh.replace(path)
    except OSError as error:
        log.info("%s is not remembered to be whole: %s", folder, error)
        with contextlib.suppress(OSError):
            fresh.unlink()


def remember_linked(read: Mapping[Path, Mapping[str, Verdict]]) -> None:
    """Remember files that were read when they had these marks, and that were linked or unlinked since.

    That changes their ctime; their size, mtime and inode must still be those of before.
    """
    time.sleep(_TICK_NS / 1e9)
    for folder, files in read.items():
        now = marks(folder)
        same = {path: now[path] for path, (old, _) in files.items() if path in now and now[path][:3] == old[:3]}
        remember(folder, {path: (found, files[path][1]) for path, found in same.items()})


def forget_absent(root: Path) -> None:
    """Drop the verdicts on results that the store `root` no longer has."""
    for path in (root / VERDICTS).glob("*/*"):
        if not (root / path.parent.name / path.name.removesuffix(".json")).is_dir():
            path.unlink(missing_ok=True)


def _path(folder: Path) -> Path:
    return folder.parents[1] / VERDICTS / folder.parent.name / f"{folder.name}.json"
