"""What a stage puts out: exactly what the present params ask for, all of it at once.

An output is made in a folder beside its place and then takes that place, so that nothing of an earlier grid stays and
a stage that is killed leaves the old output or the new one.
"""

import hashlib
import json
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster import Corrupt, Manifest

SAMPLE, TOKENS, MODELS, RESULTS = "data/sample", "data/tokens", "models", "results"
"""Where stages put out, as in dvc.yaml."""
PRUNERS = f"{MODELS}/pruners.json"
"""Where the store has each pruner."""
_FRESH = ".fresh-"


@contextmanager
def folder(target: Path) -> Iterator[Path]:
    """An empty folder that becomes `target`, in place of what is there, unless an exception ends the `with`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for stale in target.parent.glob(f".{target.name}{_FRESH}*"):
        shutil.rmtree(stale)  # of a stage that was killed
    fresh = target.with_name(f".{target.name}{_FRESH}{uuid.uuid4().hex[:8]}")
    fresh.mkdir()
    try:
        yield fresh
        if target.exists():
            old = fresh.with_name(fresh.name + "-old")
            target.rename(old)
            fresh.rename(target)
            shutil.rmtree(old)
        else:
            fresh.rename(target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


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
        Corrupt: a file is missing or damaged; names it.
    """
    manifest = Manifest.read(published)
    for file in manifest.files:
        if file.path in leave:
            continue
        try:
            data = (published / file.path).read_bytes()
        except FileNotFoundError as error:
            raise Corrupt(f"{published / file.path} is missing, its manifest lists it") from error
        if hashlib.sha256(data).hexdigest() != file.sha256:
            raise Corrupt(f"{published / file.path} has other content than its manifest says (SHA-256 differs)")
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
