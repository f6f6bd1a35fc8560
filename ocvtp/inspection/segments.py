"""Images to inspect, and the segmentations of their objects."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ocvtp.data.decoding import UnsafePath, safe_join
from ocvtp.errors import BadInput, Corrupt

SUFFIXES: Final = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass(frozen=True)
class Picture:
    """An image, and the segmentations of its objects as COCO writes them, if they are known."""

    path: Path
    segments: Sequence[Any] = ()


def pictures(source: Path, folder: Path | None = None, limit: int | None = None) -> list[Picture]:
    """The images of a folder, or of a COCO file with their objects, in order of name or of the file.

    Args:
        source: a folder of images, or the JSON file.
        folder: where a COCO file's images are; None: where it is.
        limit: the first so many.

    Raises:
        BadInput: there are none.
        Corrupt: not a COCO instances file.
    """
    if source.is_dir():
        found = [Picture(path) for path in sorted(source.iterdir()) if path.suffix.lower() in SUFFIXES]
    elif source.is_file():
        found = _coco(source, folder or source.parent)
    else:
        raise BadInput(f"{source} does not exist: a folder of images, or a COCO file, is needed")
    if not found:
        raise BadInput(f"{source} has no images ({', '.join(SUFFIXES)})")
    return found[:limit]


def _coco(path: Path, folder: Path) -> list[Picture]:
    try:
        coco = json.loads(path.read_bytes())
        segments: dict[Any, list[Any]] = {image["id"]: [] for image in coco["images"]}
        for annotation in coco["annotations"]:
            if not annotation.get("iscrowd") and annotation.get("segmentation"):
                segments[annotation["image_id"]].append(annotation["segmentation"])
        return [Picture(safe_join(folder, image["file_name"]), segments[image["id"]]) for image in coco["images"]]
    except UnsafePath:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise Corrupt(f"{path} is not a COCO instances file: {type(error).__name__} {error}") from error
