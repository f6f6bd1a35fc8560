"""Images to inspect, and which of their tokens lie on which of their objects.

Letters: H, W height and width of an image in pixels.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image, ImageDraw

from ocvtp.data.coverage import SMALL_TOKENS, Objects
from ocvtp.data.decoding import UnsafePath, safe_join
from ocvtp.data.masks import Mask, decode_mask
from ocvtp.errors import BadInput, Corrupt
from ocvtp.vlms.images import Map

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


def objects(picture: Picture, size: tuple[int, int], fit: str, maps: Sequence[Map]) -> Objects:
    """The tokens that each object's mask touches; objects outside of what the tower sees are left out.

    Args:
        picture: with its segmentations.
        size: width and height of the image.
        fit: `crop` if the tower sees the middle square alone, `pad` or `squash` if all of it.
        maps: where tokens lie over what the tower sees, which is padded to their ratio.
    """
    tokens, small = [], []
    for segment in picture.segments:
        mask_HW = mask_of(segment, size)
        if fit == "crop":
            side = min(mask_HW.shape)
            top, left = ((length - side) // 2 for length in mask_HW.shape)
            mask_HW = mask_HW[top : top + side, left : left + side]
        if not mask_HW.any():
            continue
        per_map = [_under(mask_HW, map_) for map_ in maps]
        tokens.append(frozenset().union(*(numbers for numbers, _ in per_map)))
        small.append(bool(mask_HW.sum() < SMALL_TOKENS * min(area for _, area in per_map)))
    return Objects(tuple(tokens), tuple(small))


def mask_of(segment: Any, size: tuple[int, int]) -> Mask:
    """The mask [H, W] of a segmentation: uncompressed run lengths or polygons; `BadInput` for anything else."""
    width, height = size
    if isinstance(segment, dict) and isinstance(segment.get("counts"), list):
        mask_HW = decode_mask(segment)
        if mask_HW.shape != (height, width):
            raise BadInput(
                f"a mask of {mask_HW.shape[1]} x {mask_HW.shape[0]} pixels on an image of {width} x {height}"
            )
        return mask_HW
    if not isinstance(segment, list):
        raise BadInput("a segmentation is a compressed run-length code: uncompressed codes and polygons are read")
    drawn = Image.new("1", size)
    for corners in segment:
        ImageDraw.Draw(drawn).polygon([float(number) for number in corners], fill=1)
    return np.asarray(drawn)


def _under(mask_HW: Mask, map_: Map) -> tuple[frozenset[int], float]:
    """Tokens of a map that a mask touches, and a token's area in pixels."""
    height, width = mask_HW.shape
    high, wide = (float(height), float(width))
    if map_.ratio is not None:
        high, wide = max(high, wide / map_.ratio), max(wide, high * map_.ratio)
    rows, columns = map_.numbers_hw.shape
    y, x = np.nonzero(mask_HW)
    down = ((y + (high - height) / 2) * rows / high).astype(int).clip(0, rows - 1)
    across = ((x + (wide - width) / 2) * columns / wide).astype(int).clip(0, columns - 1)
    return frozenset(map_.numbers_hw.numpy()[down, across].tolist()), high * wide / (rows * columns)
