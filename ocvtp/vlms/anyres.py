"""Of an image for LLaVA-NeXT and OneVision: which tiles the tower sees, and which patches are tokens, in which order.

Letters: N tokens of an image, k tokens kept, X those and newlines, D width of the language model.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ocvtp.vlms.images import Grid, Layout, Map, Part, Placed

Merge = Literal["spatial_unpad", "spatial", "flat"]
MERGES: tuple[Merge, ...] = ("spatial_unpad", "spatial", "flat")
Sizes = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Shape:
    """How the tokens of an image of one size come from its tiles.

    Attributes:
        tiles: how many the tower sees, the whole image among them.
        patches_N: of each token which patch it is, counted through all tiles.
        layout: where tokens stand.
        span: placeholders in an unpruned prompt.
        newlines: rows end with one.
        grid: rows and columns of the tokens: of tiles in a column, or, where tiles are put together, one column of all
            tokens, since the whole image and its tiles do not fill one grid.
        across: tiles side by side.
    """

    tiles: int
    patches_N: Tensor
    layout: Layout
    span: int
    newlines: bool
    grid: Grid
    across: int

    @property
    def count(self) -> int:
        """N."""
        return len(self.patches_N)

    def arranged(self, patches_TPX: Tensor) -> Tensor:
        """Something of each patch of its tiles for its tokens, [N, ...]."""
        return patches_TPX.flatten(0, 1)[self.patches_N.to(patches_TPX.device)]

    def maps(self) -> list[Map]:
        """Where tokens lie over the image: those of the whole of it, then those of its tiles."""
        side, width = self.layout[0].grid
        whole = Map(torch.arange(side * width).view(side, width), name="whole image")
        if self.newlines:  # without padding
            height, width = self.layout[1].grid
            numbers_hw = torch.arange(side * side, self.count).view(height, width)
            return [whole, Map(numbers_hw, name="tiles")] if width else [whole]
        down = (self.tiles - 1) // self.across
        places_P = self.patches_N.argsort()[side * side :].view(down, self.across, side, side)
        numbers_hw = places_P.transpose(1, 2).reshape(down * side, self.across * side)
        return [whole, Map(numbers_hw, self.across / down, "tiles")]

    def newlines_of(self, indices_k: Tensor) -> tuple[Tensor, Tensor]:
        """Places of tokens among placeholders, and of the newlines that stay with them."""
        tiled = self.layout[1]
        height, width = tiled.grid
        if not width:  # of an extremely narrow image nothing but newlines is left: they stay if everything does
            rows = height if len(indices_k) == self.count else 0
            return indices_k, tiled.start + torch.arange(rows)
        rows_k = (indices_k - tiled.start).div(width, rounding_mode="floor").clamp(min=0)
        stay = torch.unique(rows_k[indices_k >= tiled.start])
        return indices_k + rows_k, tiled.start + (stay + 1) * (width + 1) - 1


@dataclass(frozen=True)
class Resized(Shape):
    """Tiles put together and made smaller, from rows and columns `whole`, as LLaVA-OneVision does with many."""

    whole: Grid = (0, 0)

    @property
    def count(self) -> int:
        """N."""
        rows, columns = self.layout[1].grid
        return self.layout[1].start + rows * columns

    def arranged(self, patches_TPX: Tensor) -> Tensor:
        """As the model resizes features."""
        start, all_NX = self.layout[1].start, super().arranged(patches_TPX)
        return torch.cat([all_NX[:start], shrunk(all_NX[start:], self.whole, self.layout[1].grid)])


def resized(shape: Shape, ratio: float) -> Resized:
    """A shape whose tiles, put together, are smaller by a ratio on each side."""
    start, whole = shape.layout[1].start, shape.layout[1].grid
    rows, columns = int(whole[0] // ratio), int(whole[1] // ratio)
    layout, grid = (shape.layout[0], Part(start, (rows, columns))), (start + rows * columns, 1)
    return Resized(
        shape.tiles, shape.patches_N, layout, start + rows * (columns + 1), True, grid, shape.across, whole=whole
    )


def shrunk(patches_PX: Tensor, whole: Grid, grid: Grid) -> Tensor:
    """Something of each patch of a grid, of fewer rows and columns, as the model resizes features, [N, ...]."""
    tiles_1Xhw = patches_PX.view(*whole, -1).permute(2, 0, 1)[None]
    small_Xhw = interpolate(tiles_1Xhw.float(), grid, mode="bilinear")[0]
    return small_Xhw.flatten(1).T.to(patches_PX.dtype).view(-1, *patches_PX.shape[1:])


def with_newlines(shape: Any, indices_k: Tensor, features_kD: Tensor, newline_D: Tensor) -> Placed:
    """Tokens, and the newlines of rows of which one stays, where they go among `shape.span` placeholders."""
    tokens_k, ends_X = shape.newlines_of(indices_k)
    places_X, order_X = torch.cat([tokens_k, ends_X]).sort()
    newline_XD = newline_D.to(features_kD).expand(len(ends_X), -1)
    numbers_X = torch.cat([indices_k, torch.full_like(ends_X, -1)])[order_X]
    features_XD = torch.cat([features_kD, newline_XD])[order_X.to(features_kD.device)]
    return Placed(features_XD, places_X, numbers_X, shape.span)


@lru_cache(maxsize=4096)
def shape_of(size: tuple[int, int], pinpoints: Sizes, tile: int, side: int, merge: Merge) -> Shape:
    """The shape of an image.

    Args:
        size: height and width of the original.
        pinpoints: heights and widths in pixels that tiles may cover.
        tile: height and width of a tile in pixels.
        side: height and width of a tile in tokens.
        merge: as in `ocvtp.vlms.families.llava_next`.
    """
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

    down, across = get_anyres_image_grid_shape(size, [list(each) for each in pinpoints], tile)
    patches = side * side
    whole = Part(0, (side, side))
    numbers_hw = torch.arange(patches, (1 + down * across) * patches).view(down, across, side, side)
    numbers_hw = numbers_hw.transpose(1, 2).reshape(down * side, across * side)
    unpadded_hw = unpad_image(numbers_hw[None], size)[0]
    height, width = unpadded_hw.shape
    span = patches + height * (width + 1)
    seen = 1 + down * across
    if merge == "flat":
        parts = tuple(Part(i * patches, (side, side)) for i in range(1, seen))
        return Shape(seen, torch.arange(seen * patches), (whole, *parts), span, False, (seen * side, side), across)
    if merge == "spatial":
        unpadded_hw, (height, width), offset = numbers_hw, numbers_hw.shape, (0, 0)
    else:
        offset = ((down * side - height) // 2, (across * side - width) // 2)
    tiles = Part(patches, (height, width), tile=(side, side), offset=offset)
    order_N = torch.cat([torch.arange(patches), unpadded_hw.flatten()])
    return Shape(seen, order_N, (whole, tiles), span, merge == "spatial_unpad", (len(order_N), 1), across)
