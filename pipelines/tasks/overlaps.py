"""Tasks of stage `sample`: which training images of a benchmark are among the images that it asks about.

The spec of a task that reads the result of another holds that one's key, which is a function of all that determines it.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cluster import progress
from ocvtp.data.overlaps import Fingerprint, Fingerprints
from ocvtp.data.training_splits import official_fingerprints
from pipelines.tasks.places import in_store

SEEN, OVERLAPS = "seen.json", "overlaps.json"
IMAGES = "images"
"""The folder of a result in which its images are."""


def seen_scenes(spec: dict[str, Any], folder: Path, inputs: dict[str, Any]) -> None:
    """`seen.json`: fingerprints of the scenes that questions are about."""
    _write(folder / SEEN, _fingerprints(in_store(folder, inputs["questions"])))


def seen_official(spec: dict[str, Any], folder: Path) -> None:
    """`seen.json`: fingerprints of the images that the official questions are about."""
    _write(folder / SEEN, official_fingerprints(spec["benchmark"]))


def overlaps(spec: dict[str, Any], folder: Path, inputs: dict[str, Any]) -> None:
    """`overlaps.json`: of the images of one task those that are among the seen ones."""
    known = json.loads((in_store(folder, inputs["seen"]) / SEEN).read_bytes())
    seen = Fingerprints(Fingerprint(**one) for one in known)
    found = (seen.find(one) for one in _fingerprints(in_store(folder, inputs["images"])))
    _write(folder / OVERLAPS, (one for one in found if one is not None))


def _fingerprints(place: Path) -> Iterable[Fingerprint]:
    """Of the images of a result, by their paths in it."""
    paths = sorted(path for path in (place / IMAGES).rglob("*") if path.is_file())
    for done, path in enumerate(paths, start=1):
        yield Fingerprint.of(path.relative_to(place).as_posix(), path.read_bytes())
        progress(done, len(paths))


def _write(path: Path, found: Iterable[Any]) -> None:
    path.write_text(json.dumps([one.to_dict() for one in found], indent=1) + "\n")
