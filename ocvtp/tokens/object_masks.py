"""Which vision tokens lie on which of an image's objects: of segmentations, whatever way the image goes to the tower.

Letters: H, W height and width of an image in pixels; B images, S objects (of the image with most), N tokens.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from ocvtp.data.coverage import SMALL_TOKENS, Objects
from ocvtp.data.masks import Mask, check_code, decode_mask, encode_mask
from ocvtp.data.scenes import SceneSet
from ocvtp.data.training_splits import training_scene
from ocvtp.errors import BadInput, Corrupt
from ocvtp.vlms import resolve
from ocvtp.vlms.families import family_class
from ocvtp.vlms.family import Family
from ocvtp.vlms.images import Map

Size = tuple[int, int]
"""Width and height of an image in pixels."""
Segmented = tuple[Size, Sequence[Any]]
"""An image's size, and the segmentations of its objects as COCO writes them."""


def objects(segments: Sequence[Any], size: tuple[int, int], fit: str, maps: Sequence[Map]) -> Objects:
    """The tokens that each object's mask touches; objects outside of what the tower sees are left out.

    Args:
        segments: their segmentations, as `mask_of` reads them.
        size: width and height of the image.
        fit: `crop` if the tower sees the middle square alone, `pad` or `squash` if all of it.
        maps: where tokens lie over what the tower sees, which is padded to their ratio.
    """
    tokens, small = [], []
    for segment in segments:
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
    check_segment(segment, size)
    if isinstance(segment, dict):
        return decode_mask(segment)
    drawn = Image.new("1", size)
    for corners in segment:
        ImageDraw.Draw(drawn).polygon([float(number) for number in corners], fill=1)
    return np.asarray(drawn)


def check_segment(segment: Any, size: Size) -> None:
    """`BadInput` says what is wrong with a segmentation, by its form alone: nothing is drawn."""
    width, height = size
    if isinstance(segment, dict):
        check_code(segment)
        if segment["size"] != [height, width]:
            high, wide = segment["size"]
            raise BadInput(f"a mask of {wide} x {high} pixels on an image of {width} x {height}")
        return
    if not isinstance(segment, list) or not segment:
        raise BadInput(f"a segmentation is {str(segment)[:40]}: a run-length code or a list of polygons is needed")
    for corners in segment:
        if not isinstance(corners, list) or len(corners) < 4 or len(corners) % 2 or not all(map(_is_finite, corners)):
            raise BadInput(f"a polygon is {str(corners)[:40]}: a flat list of x, y, x, y, ... is needed, two corners "
                           "at least")  # fmt: skip


def _is_finite(number: Any) -> bool:
    return isinstance(number, int | float) and math.isfinite(number)


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


def check_one_grid(vlm: str) -> None:
    """`BadInput` if a VLM sees an image in tiles: shards do not say where in the image tiles lie."""
    if family_class(resolve(vlm).family, vlm).maps is not Family.maps:
        raise BadInput(f"{vlm} sees an image in tiles, and tokens do not say where these lie: which tokens an object "
                       "is on is known of VLMs that see an image as one grid")  # fmt: skip


@dataclass(frozen=True)
class ObjectMasks:
    """The objects of training images, as tokens see them: of VLMs that see one grid (`check_one_grid`).

    Attributes:
        identity: all that determines them, as JSON.
        segmented: of an image, by its id; None where nothing is known of it.
        fit: how images became pixels, as `Images` are made: `pad`, `squash` or `crop`.
        grid: height and width in tokens, if every image has the same.
    """

    identity: Mapping[str, Any]
    segmented: Callable[[str], Segmented | None]
    fit: str = "pad"
    grid: tuple[int, int] | None = None
    _known: dict[tuple[str, tuple[int, int]], list[NDArray[np.int32]]] = field(default_factory=dict, repr=False)

    @classmethod
    def of_coco(cls, path: Path, images: Sequence[str], fit: str, grid: tuple[int, int] | None) -> "ObjectMasks":
        """Those of an instances file of COCO; crowds are left out.

        Args:
            path: the file.
            images: ids of the images that matter; the others are not kept.
            fit: as above, and so is the next.
            grid: of all images.

        Raises:
            BadInput: there is no such file.
            Corrupt: it is something else.
        """
        try:
            data = path.read_bytes()
        except OSError as error:
            raise BadInput(f"segmentations in {path} cannot be read: {error}") from error
        wanted = set(images)
        try:
            coco = json.loads(data)
            found: dict[str, tuple[Size, list[Any]]] = {
                str(image["id"]): ((image["width"], image["height"]), [])
                for image in coco["images"]
                if str(image["id"]) in wanted
            }
            for one in coco["annotations"]:
                image = found.get(str(one["image_id"]))
                if image is not None and not one.get("iscrowd") and one.get("segmentation"):
                    image[1].append(one["segmentation"])
        except (KeyError, TypeError, ValueError) as error:
            raise Corrupt(f"{path} is not a COCO instances file: {type(error).__name__} {error}") from error
        return cls({"coco": hashlib.sha256(data).hexdigest(), "fit": fit}, found.get, fit, grid)

    @classmethod
    def of_scenes(cls, scenes: SceneSet, fit: str, grid: tuple[int, int] | None) -> "ObjectMasks":
        """The exact masks of scenes, by the ids that stage `sample` gives them."""

        def segmented(image: str) -> Segmented | None:
            found = training_scene(scenes, image)
            if found is None:
                return None
            _, scene = found
            return (scene.width, scene.height), [encode_mask(thing.mask_HW) for thing in scene.objects]

        return cls({"scenes": scenes.to_dict(), "fit": fit}, segmented, fit, grid)

    def check(self, images: Sequence[str]) -> None:
        """`BadInput` names images of which nothing is known, or a segmentation that is none, or says that none is."""
        unknown, some = [], False
        for image in images:
            segmented = self.segmented(image)
            if segmented is None:
                unknown.append(image)
                continue
            size, segments = segmented
            some = some or bool(segments)
            for segment in segments:
                try:
                    check_segment(segment, size)
                except BadInput as error:
                    raise BadInput(f"image {image}: {error}") from error
        if unknown:
            raise BadInput(f"no segmentations are known of {len(unknown)} of {len(images)} training images: "
                           f"{', '.join(unknown[:5])}{', ...' * (len(unknown) > 5)}")  # fmt: skip
        if not some:
            raise BadInput(f"none of the {len(images)} training images has an object with a segmentation")

    def touched(self, images: Sequence[str], grids: Sequence[tuple[int, int]], count: int) -> Tensor:
        """Which of `count` tokens each object's mask touches, [B, S, N]; rows of nothing where there is no object.

        Args:
            images: ids.
            grids: height and width in tokens of each.
            count: N, of the longest image or more.
        """
        lists = [self._tokens(image, grid) for image, grid in zip(images, grids, strict=True)]
        touched_BSN = torch.zeros(len(lists), max(map(len, lists), default=0), count, dtype=torch.bool)
        for image_SN, tokens in zip(touched_BSN, lists, strict=True):
            for object_N, numbers in zip(image_SN, tokens, strict=False):
                object_N[torch.from_numpy(numbers)] = True
        return touched_BSN

    def _tokens(self, image: str, grid: tuple[int, int]) -> list[NDArray[np.int32]]:
        known = self._known.get((image, grid))
        if known is None:
            segmented = self.segmented(image)
            if segmented is None:
                raise BadInput(f"no segmentations are known of image {image}")
            size, segments = segmented
            numbers_hw = torch.arange(grid[0] * grid[1]).view(grid)
            ratio = grid[1] / grid[0] if self.fit == "pad" and self.grid is not None else None
            try:
                found = objects(segments, size, self.fit, [Map(numbers_hw, ratio)])
            except BadInput as error:
                raise BadInput(f"image {image}: {error}") from error
            known = self._known[image, grid] = [np.array(sorted(tokens), dtype=np.int32) for tokens in found.tokens]
        return known
