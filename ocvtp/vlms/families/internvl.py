"""InternVL 3 and 3.5: tiles and a thumbnail, each an image of its own to the tower, 2 x 2 patches made into a token.

How many tiles an image has is not in `pixel_values`: it follows from the run of its placeholders in the prompt. Tokens
are chosen after the pixel shuffle; what the tower says of a token is the mean over its patches.
"""

from collections.abc import Mapping
from itertools import groupby
from typing import Any, ClassVar

import torch
from torch import Tensor

from ocvtp.errors import BadInput
from ocvtp.vlms.images import Facts, Images, Kind, Map
from ocvtp.vlms.tiled import TiledFamily, Tiles


class InternVLFamily(TiledFamily):
    """`InternVLForConditionalGeneration`; `Images.sizes` are tiles of an image, [I]."""

    vision_inputs: ClassVar[frozenset[str]] = frozenset({"pixel_values"})

    @classmethod
    def facts_of(cls, config: Any) -> Facts:  # noqa: D102 - as in Family
        return cls.tiled_facts(config, None, None)

    @property
    def _tile(self) -> Tiles:
        vision = self.model.config.vision_config
        (height, width), (down, across) = vision.image_size, vision.patch_size
        if (height, down) != (width, across):
            raise BadInput(f"tiles of {height} x {width} pixels in patches of {down} x {across}: squares are supported")
        return Tiles(1, height // down, round(1 / self.model.config.downsample_ratio))

    def images(self, call: Mapping[str, Any]) -> Images | None:
        """From the prompts; from `num_patches` of an image processor where there are none."""
        pixels, tiles = call.get("pixel_values"), call.get("num_patches")
        if pixels is None:
            return None
        if tiles is None:
            ids = call.get("input_ids") if call.get("inputs") is None else call["inputs"]
            if ids is None:
                raise BadInput("InternVL needs input_ids beside pixel_values: they tell how many tiles an image has")
            tiles = runs(ids, self.placeholder, self._tile.count)
        tiles = torch.as_tensor(tiles).flatten()
        if len(pixels) != int(tiles.sum()):
            raise BadInput(
                f"the prompts have placeholders for images of {tiles.tolist()} tiles, but pixel_values has "
                f"{len(pixels)}: use the processor of this model"
            )
        return Images(pixels, tiles)

    def shapes(self, images: Images) -> list[Tiles]:  # noqa: D102 - as in TiledFamily
        assert images.sizes is not None  # noqa: S101 - as `images` has made sure
        tile = self._tile
        return [Tiles(tiles, tile.side, tile.merge) for tiles in images.sizes.tolist()]

    def maps(self, images: Images, number: int) -> list[Map]:
        """Of the thumbnail, which comes last: how tiles stand in the image is known to the processor alone."""
        shape, tile = self.shapes(images)[number], self._tile
        numbers_N = torch.arange(shape.count - tile.count, shape.count)
        return [Map(numbers_N.view(tile.grid), name="thumbnail" if shape.tiles > 1 else "")]

    def features(self, features_XD: Tensor, kind: Kind = "image") -> Any:
        """One tensor."""
        output = super().features(features_XD, kind)
        output.pooler_output = features_XD[None]
        return output


def runs(ids_BL: Tensor, placeholder: int, each: int) -> list[int]:
    """How many tiles of so many tokens stand side by side in prompts, in the order of the prompts."""
    found = []
    for row in (ids_BL == placeholder).tolist():
        lengths = [len(list(members)) for is_image, members in groupby(row) if is_image]
        for length in lengths:
            if length % each:
                raise BadInput(
                    f"{length} placeholders (token id {placeholder}) stand in a row, but a tile has {each} tokens: use "
                    "the processor of this model"
                )
            found.append(length // each)
    return found
