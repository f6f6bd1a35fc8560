"""What a stage puts out: exactly what the present params ask for, all of it at once.

An output is made in a folder beside its place and then takes that place, so that nothing of an earlier grid stays and
a stage that is killed leaves the old output or the new one: in one step where there is renameat2, else the next stage
that comes puts the old one back.
"""

import ctypes
import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster import CorruptResult, Manifest
from cluster.driver.lock import run_lock

SAMPLE, TOKENS, MODELS, RESULTS = "data/sample", "data/tokens", "models", "results"
"""Where stages put out, as in dvc.yaml."""
IMAGES, TRAINING = "images.json", "training.json"
"""In `SAMPLE`: images to train on, those of the data set, and by benchmark those of its training split."""
PRUNERS = f"{MODELS}/pruners.json"
"""Where the store has each pruner."""
_FRESH, _OLD = ".fresh-", "-old"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of linux/fcntl.h and linux/fs.h


@contextmanager
def folder(target: Path) -> Iterator[Path]:
    """An empty folder that becomes `target`, in place of what is there, unless an exception ends the `with`.

    One process at a time makes a target: others wait for its lock. So what lies beside it was left by one that died.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with run_lock(target.parent, f".{target.name}.lock", "that writes this output", "wait"):
        _recover(target)
        fresh = target.with_name(f".{target.name}{_FRESH}{uuid.uuid4().hex[:8]}")
        fresh.mkdir()
        try:
            yield fresh
            _take_place(fresh, target)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)


def _recover(target: Path) -> None:
    """Clean up after a stage that was killed, also between the two renames of `_take_place`."""
    for stale in sorted(target.parent.glob(f".{target.name}{_FRESH}*"), reverse=True):  # `x-old` before `x`
        if stale.name.endswith(_OLD) and not target.exists():
            stale.rename(target)
        else:
            shutil.rmtree(stale)


def _take_place(fresh: Path, target: Path) -> None:
    """Let `fresh` be `target`; what was there is then where `fresh` was, or gone."""
    if not target.exists():
        fresh.rename(target)
    elif not _exchange(fresh, target):
        old = fresh.with_name(fresh.name + _OLD)
        target.rename(old)
        fresh.rename(target)  # killed before this, the next to come puts the old one back
        shutil.rmtree(old)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; False if this system (not Linux) or file system (NFS) cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(other))


def write_json(path: Path, data: Any) -> None:
    """One text for equal data, whole or not at all."""
    write_text(path, json.dumps(data, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """The whole text or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}{_FRESH}{uuid.uuid4().hex[:8]}")
    try:
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


def copy_published(published: Path, target: Path, leave: Sequence[str] = ()) -> Manifest:
    """Copy every file of a published result but those to `leave`, each compared with its checksum on the way.

    Raises:
        CorruptResult: a file is missing or damaged; names it.
    """
    manifest = Manifest.read(published)
    for file in manifest.files:
        if file.path in leave:
            continue
        try:
            data = (published / file.path).read_bytes()
        except FileNotFoundError as error:
            raise CorruptResult(f"{published / file.path} is missing, its manifest lists it") from error
        if hashlib.sha256(data).hexdigest() != file.sha256:
            raise CorruptResult(f"{published / file.path} has other content than its manifest says (SHA-256 differs)")
        path = target / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return manifest


def checksums(place: Path) -> Mapping[str, str]:
    """SHA-256 of every file below a folder, by path with `/`."""
    found = {}
    for path in sorted(place.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                found[path.relative_to(place).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
