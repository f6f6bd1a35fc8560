"""Where a question set comes with the masks of its scenes: which of an image's objects the kept tokens lie on."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ocvtp.data.coverage import Covered, Grid, Objects, read_objects

MASKS = "scenes.json"
"""COCO instances of a question set's images, beside its parquet."""


def add_objects(samples: Sequence[dict[str, Any]], data: Path | None, grid: Grid | None) -> Covered | None:
    """Note in each answer its `image` and its `objects`: how many there are and are covered, of all and small ones.

    Args:
        samples: lines of samples.jsonl, which are changed. `kept` is what a method keeps of one image.
        data: the parquet that was asked; None for an official data set.
        grid: of an image's tokens.

    Returns:
        The sum over the images, each once; None, and nothing noted, without masks, without a grid, or where
        questions are about several images.
    """
    path = None if data is None else data.with_name(MASKS)
    if data is None or path is None or grid is None or not path.is_file():
        return None
    about = path.stat()
    objects = _objects(path, (about.st_ino, about.st_mtime_ns, about.st_size), grid)
    file = pq.ParquetFile(data)
    if "image" not in file.schema_arrow.names or not pa.types.is_struct(file.schema_arrow.field("image").type):
        return None  # questions about several images
    names = [image["path"] for image in file.read(columns=["image.path"])["image"].to_pylist()]
    images: dict[str, Covered] = {}
    for sample in samples:
        name, kept = names[sample["doc_id"]], sample["kept"]
        if name not in objects:
            continue
        everything = range(grid[0] * grid[1])  # an unpruned model's `kept` is a number
        covered = objects[name].covered_by(kept if isinstance(kept, list) else everything)
        sample |= {"image": name, "objects": list(covered.numbers)}
        images.setdefault(name, covered)
    return sum(images.values(), Covered())


@lru_cache(maxsize=4)
def _objects(path: Path, stamp: tuple[int, ...], grid: Grid) -> Mapping[str, Objects]:
    """Read once a process, as long as the file stays as `stamp` says: a worker scores many answers to one set."""
    return read_objects(path, grid)
