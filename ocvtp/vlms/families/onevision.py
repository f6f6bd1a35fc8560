"""LLaVA-OneVision: a SigLIP tower; tiles are put together, resized if there are many of them, and rows get newlines.

All this happens behind the projector, so values are what the language model reads. A newline is none of the N tokens
and no part of a budget: it stays if a token of its row does. An image that shares its prompt with others is not cut
into tiles where the processor says so (`batch_num_images`), and has one newline at its end, which stays.

Letters: I images, N tokens of an image, P patches of a tile, k tokens kept.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ocvtp.errors import BadInput
from ocvtp.vlms.anyres import Shape, shape_of, with_newlines
from ocvtp.vlms.images import Facts, Grid, Images, Map, Part, Placed
from ocvtp.vlms.tiled import TiledFamily, Tiles
from ocvtp.vlms.tower import weight_of

_SHRINK = 1.1
"""Tiles are resized if they have more tokens than the limit by the square of this (as in transformers)."""


@dataclass(frozen=True)
class Alone(Tiles):
    """An image in one tile."""

    @property
    def span(self) -> int:
        """With its newline."""
        return self.count + 1

    def newlines_of(self, indices_k: Tensor) -> tuple[Tensor, Tensor]:
        """Places of tokens among placeholders, and of the newline."""
        return indices_k, torch.tensor([self.count])


@dataclass(frozen=True)
class Resized(Shape):
    """Tiles put together and made smaller, from rows and columns `whole`."""

    whole: Grid = (0, 0)

    @property
    def count(self) -> int:
        """N."""
        rows, columns = self.layout[1].grid
        return self.layout[1].start + rows * columns

    def arranged(self, patches_TPX: Tensor) -> Tensor:
        """As the model resizes features."""
        start, all_NX = self.layout[1].start, super().arranged(patches_TPX)
        tiles_1Xhw = all_NX[start:].view(*self.whole, -1).permute(2, 0, 1)[None]
        small_Xhw = interpolate(tiles_1Xhw.float(), self.layout[1].grid, mode="bilinear")[0]
        small_NX = small_Xhw.flatten(1).T.to(all_NX.dtype)
        return torch.cat([all_NX[:start], small_NX.view(-1, *all_NX.shape[1:])])


class OneVisionFamily(TiledFamily):
    """`LlavaOnevisionForConditionalGeneration`; `Images.sizes` are [I, 3]: height, width, and whether it has tiles."""

    vision_inputs: ClassVar[frozenset[str]] = frozenset({"pixel_values", "image_sizes", "batch_num_images"})
    nested: ClassVar[bool] = True

    @classmethod
    def facts_of(cls, config: Any) -> Facts:  # noqa: D102 - as in Family
        return cls.tiled_facts(config, None, None)

    def images(self, call: Mapping[str, Any]) -> Images | None:  # noqa: D102
        pixels, sizes, together = call.get("pixel_values"), call.get("image_sizes"), call.get("batch_num_images")
        if pixels is None:
            return None
        if sizes is None:
            raise BadInput("LLaVA-OneVision needs image_sizes beside pixel_values: use the processor of this model")
        sizes = torch.as_tensor(sizes)
        numbers = [1] * len(sizes) if together is None else torch.as_tensor(together).tolist()
        tiled = torch.tensor([number == 1 for number in numbers for _ in range(number)])
        if len(tiled) != len(sizes):
            raise BadInput(f"batch_num_images adds up to {len(tiled)} images, but image_sizes has {len(sizes)}")
        return Images(pixels, torch.cat([sizes, tiled[:, None].to(sizes)], 1))

    def shapes(self, images: Images) -> list[Alone | Shape]:  # noqa: D102 - as in TiledFamily
        assert images.sizes is not None  # noqa: S101 - as `images` has made sure
        vision = self.model.config.vision_config
        side = vision.image_size // vision.patch_size
        pinpoints = tuple((int(height), int(width)) for height, width in self.model.config.image_grid_pinpoints)
        limit = int(self.model.config.vision_aspect_ratio.removeprefix("anyres_max_"))
        found = list[Alone | Shape]()
        for height, width, tiled in images.sizes.tolist():
            if not tiled:
                found.append(Alone(1, side))
                continue
            shape = shape_of((int(height), int(width)), pinpoints, vision.image_size, side, "spatial_unpad")
            rows, columns = shape.layout[1].grid
            ratio = math.sqrt(rows * columns / (limit * side**2))
            found.append(_resized(shape, ratio) if ratio > _SHRINK else shape)
        return found

    def tiles(self, images: Images) -> list[Tensor]:
        """Without those that fill up a batch."""
        numbers = [shape.tiles for shape in self.shapes(images)]
        given = images.pixels.shape
        if len(given) != 5 or given[0] != len(numbers) or given[1] < max(numbers):
            raise BadInput(
                f"pixel_values of shape {list(given)} for {len(numbers)} images of {numbers[:8]} tiles: use the "
                "processor of this model, with the image_grid_pinpoints of its config"
            )
        return [pixels[:number] for pixels, number in zip(images.pixels, numbers, strict=True)]

    def inputs(self, images: Images) -> dict[str, Any]:
        """With sizes, and which images have tiles."""
        assert images.sizes is not None  # noqa: S101
        together = list[int]()
        for tiled, members in groupby(images.sizes[:, 2].tolist()):
            number = len(list(members))
            together += [1] * number if tiled else [number]
            if not tiled and number == 1:
                raise BadInput("one image of a prompt that has several, without the others: give all of them")
        return {"pixel_values": images.pixels, "image_sizes": images.sizes[:, :2], "batch_num_images": together}

    def own(self, images: Images, output: Any) -> list[Tensor]:
        """Without newlines."""
        found = []
        for made_XD, shape in zip(output.pooler_output, self.shapes(images), strict=True):
            places_N, _ = shape.newlines_of(torch.arange(shape.count))
            found.append(made_XD[places_N.to(made_XD.device)])
        return found

    def maps(self, images: Images, number: int) -> list[Map]:  # noqa: D102 - as in Family
        shape = self.shapes(images)[number]
        return shape.maps() if isinstance(shape, Shape) else super().maps(images, number)

    def place(self, images: Images, number: int, indices_k: Tensor, features_kD: Tensor) -> Placed:
        """Tokens, and the newlines of rows of which one stays."""
        shape = self.shapes(images)[number]
        return with_newlines(shape, indices_k, features_kD, weight_of(self.model.model, "image_newline"))


def _resized(shape: Shape, ratio: float) -> Resized:
    start, whole = shape.layout[1].start, shape.layout[1].grid
    rows, columns = int(whole[0] // ratio), int(whole[1] // ratio)
    layout = (shape.layout[0], Part(start, (rows, columns)))
    grid = (start + rows * columns, 1)
    return Resized(
        shape.tiles, shape.patches_N, layout, start + rows * (columns + 1), True, grid, shape.across, whole=whole
    )
