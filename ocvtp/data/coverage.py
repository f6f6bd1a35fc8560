"""Object coverage: how many of an image's objects have a kept vision token on their mask.

What a pruner of objects must not do is lose one. Letters: H, W height and width of an image in pixels, N vision tokens
of a grid over it.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ocvtp.data.masks import Mask, decode_mask
from ocvtp.errors import BadInput, Corrupt

Grid = tuple[int, int]

SMALL_TOKENS = 2
"""An object is small if its area is below that of so many tokens: on LLaVA-1.5's 576 about COCO's own limit (32^2
pixels of a picture of 640 x 480), on 144 tokens the small shapes of `ocvtp.data.scenes`."""


@dataclass(frozen=True)
class Covered:
    """Objects of some images, and how many of them are covered; of all, and of the small ones."""

    objects: int = 0
    covered: int = 0
    small_objects: int = 0
    small_covered: int = 0

    def __add__(self, other: "Covered") -> "Covered":
        pairs = zip(self.numbers, other.numbers, strict=True)
        return Covered(*(a + b for a, b in pairs))

    @property
    def numbers(self) -> tuple[int, int, int, int]:
        """`objects`, `covered`, `small_objects`, `small_covered`."""
        return self.objects, self.covered, self.small_objects, self.small_covered

    @property
    def share(self) -> float | None:
        """Of objects; None without any."""
        return self.covered / self.objects if self.objects else None

    @property
    def small_share(self) -> float | None:
        """Of small objects; None without any."""
        return self.small_covered / self.small_objects if self.small_objects else None


@dataclass(frozen=True)
class Objects:
    """The objects of one image on a grid: the tokens that each one's mask touches, and whether it is small."""

    tokens: tuple[frozenset[int], ...]
    small: tuple[bool, ...]

    def covered_by(self, kept: Iterable[int]) -> Covered:
        """Count those that a kept token lies on."""
        chosen = frozenset(kept)
        hits = [not chosen.isdisjoint(tokens) for tokens in self.tokens]
        small_hits = [hit for hit, small in zip(hits, self.small, strict=True) if small]
        return Covered(len(hits), sum(hits), len(small_hits), sum(small_hits))


def touched(mask_HW: Mask, grid: Grid) -> frozenset[int]:
    """The tokens, counted row by row, that a mask touches on a grid over its image padded to a square in the middle."""
    height, width = mask_HW.shape
    side = max(height, width)
    rows, columns = np.nonzero(mask_HW)
    down = (rows + (side - height) // 2) * grid[0] // side
    across = (columns + (side - width) // 2) * grid[1] // side
    return frozenset((down * grid[1] + across).tolist())


def read_objects(path: Path, grid: Grid) -> dict[str, Objects]:
    """The objects of each image of a COCO instances file with uncompressed masks, by file name.

    Args:
        path: as `ocvtp.data.scenes.write_scenes` makes them. Crowds and objects without a mask are left out.
        grid: rows and columns of tokens over each image, padded to a square.

    Raises:
        Corrupt: not a COCO instances file.
    """
    try:
        coco = json.loads(path.read_bytes())
        names = {image["id"]: image["file_name"] for image in coco["images"]}
        found: dict[str, list[tuple[frozenset[int], bool]]] = {name: [] for name in names.values()}
        for annotation in coco["annotations"]:
            one = _object(annotation, grid)
            if one is not None:
                found[names[annotation["image_id"]]].append(one)
    except (KeyError, TypeError, ValueError, BadInput) as error:
        raise Corrupt(f"{path} is not a COCO instances file: {type(error).__name__} {error}") from error
    return {name: Objects(tuple(t for t, _ in some), tuple(s for _, s in some)) for name, some in found.items()}


def _object(annotation: Mapping[str, Any], grid: Grid) -> tuple[frozenset[int], bool] | None:
    code = annotation.get("segmentation")
    if annotation.get("iscrowd") or not isinstance(code, dict) or not isinstance(code.get("counts"), list):
        return None
    mask_HW = decode_mask(code)
    if not mask_HW.any():
        return None
    token_area = max(mask_HW.shape) ** 2 / (grid[0] * grid[1])
    return touched(mask_HW, grid), bool(mask_HW.sum() < SMALL_TOKENS * token_area)
