"""Cleaning up after attempts that are over, without losing what the next one can resume from."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from cluster.store.faults import GONE, patient
from cluster.store.layout import RESULT, RESUME, new_attempt, temporaries, temporary
from cluster.store.lease import Watch, read_owner, replace_owner

log = logging.getLogger(__name__)

Marks = list[list[str | int]]
"""Path (with `/`), size (bytes), mtime (ns), inode and ctime (ns) of each file of a folder, sorted by path."""


def files_in(folder: Path) -> list[Path]:
    """Every regular file below `folder`, sorted; none if there is no such folder."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def resume_of(root: Path) -> Path | None:
    """The `resume/` of an attempt, if it holds a file."""
    return next((found for found in (root / RESULT / RESUME, root / RESUME) if files_in(found)), None)


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
def has_progressed(out: Path, attempt: str) -> bool:
    """Whether a dead attempt left something new in its `resume/`."""
    root = temporary(out, attempt)
    owner, resume = read_owner(root), resume_of(root)
    return owner is not None and resume is not None and signature(resume) != owner.resume_at_start


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


def fence(out: Path, attempt: str) -> None:
    """Clean up after an attempt elsewhere, which from here on can never publish, even if it still runs."""
    target = temporary(out, new_attempt())
    with contextlib.suppress(*GONE):
        patient(temporary(out, attempt).rename)(target)
        discard(target)


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
    try:
        root.rmdir()
    except OSError as error:
        return isinstance(error, FileNotFoundError)
    return True


def remove(root: Path) -> None:
    """Remove a temporary folder, its owner file last, so that a half removed one still names its owner."""
    for folder in (root / RESULT, root / RESUME, root):
        remove_tree(folder)


@patient
def sweep(parent: Path, watch: Watch, *, published: Collection[str] = (), resume_too: bool = False) -> list[Path]:
    """Remove the temporaries in `parent` that nobody works in, and say which those were.

    `watch` remembers beats between calls: owners on other hosts are judged by the second call or later. A `resume/`
    that holds something is spared, but for targets that are `published`, or if it is to be dropped too.
    """
    removed = []
    for root, name, _ in temporaries(parent):
        if not remove_empty(root):
            is_useful = not resume_too and name not in published and resume_of(root) is not None
            if not watch.abandoned(root) or is_useful:
                continue
            remove(root)
        removed.append(root)
    return removed
