"""LLaVA-NeXT: a tower that sees the whole image and tiles of it; all of them together are one image of N tokens.

Three ways to make tokens of tiles, by LLaVA's own name for them, `model.config.mm_patch_merge_type`:

- `spatial_unpad`, and a stock model, which has no such entry: what transformers does. Tokens of the whole image come
  first, then the tiles put together, row by row, without rows and columns that are padding. A newline ends each row of
  the tiles. It is none of the N tokens and no part of a budget: it stays if a token of its row does. So keep=100% is
  the unpruned model, and the language model reads at most one token a row more than `keep`. Methods inside the language
  model treat newlines as they treat the image's tokens, as PyramidDrop does.
- `flat`: padding is kept and there are no newlines; the whole image first, then tile after tile. With
  `image_grid_pinpoints` [[672, 672]] every image has 5 x 576 = 2880 tokens: the setting of the papers, and with the
  tiles in this order OC-VTP's.
- `spatial`: likewise, but the tiles are put together row by row, as in VisionZip and HiPrune.

The last two are for pruned models only: an unpruned one is left as transformers has it. `paper_mode` sets them, and so
does the catalogue's llava-next-7b. Pruners are trained on `flat` in every mode: all that the tower sees, whose tiles of
24 x 24 tokens, one below the other, are a grid of (tiles x 24) x 24.

Letters: I images, G images of a group, T tiles of all images (the whole image is its first), L positions in the tower
(CLS first), N tokens of an image, C tower width, k tokens kept, X those and newlines, D width of the language model.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from PIL import Image
from torch import Tensor

from ocvtp.errors import BadInput
from ocvtp.vlms.anyres import MERGES, Merge, Shape, shape_of, with_newlines
from ocvtp.vlms.family import check_mode
from ocvtp.vlms.images import Facts, Images, Map, Placed
from ocvtp.vlms.tiled import ProjectedLate
from ocvtp.vlms.tower import weight_of


def paper_mode(model: Any, processor: Any, order: Literal["flat", "spatial"] = "flat") -> None:
    """Have a model, once it is pruned, read 2880 tokens an image, as the papers do.

    Sets `image_grid_pinpoints` of model and processor to four tiles, and the model's `mm_patch_merge_type` to `order`.

    Args:
        model: a LLaVA-NeXT that is not pruned yet.
        processor: of the model.
        order: of the tiles' tokens, as in the docstring of this module.

    Raises:
        BadInput: an unknown order, or a model that is pruned already.
    """
    if order not in ("flat", "spatial"):
        raise BadInput(f"order is {order!r}: flat or spatial is needed")
    if "_ocvtp_handle" in model.__dict__:
        raise BadInput("this model is pruned already: call remove() on its handle first")
    side = 2 * model.config.vision_config.image_size
    model.config.image_grid_pinpoints = [[side, side]]
    model.config.mm_patch_merge_type = order
    processor.image_processor.image_grid_pinpoints = [[side, side]]


class LlavaNextFamily(ProjectedLate):
    """`LlavaNextForConditionalGeneration`."""

    vision_inputs: ClassVar[frozenset[str]] = frozenset({"pixel_values", "image_sizes"})
    outer: ClassVar[int] = 2

    @classmethod
    def facts_of(cls, config: Any) -> Facts:
        """The tokens of an image are known if all images have as many: in paper mode."""
        numbers = set()
        if _merge(config) != "spatial_unpad":
            side = config.vision_config.image_size // config.vision_config.patch_size
            numbers = {tiles * side * side for tiles in _tiles(config)}
        return cls.tiled_facts(config, numbers.pop() if len(numbers) == 1 else None, None)

    @property
    def _merge(self) -> Merge:
        return _merge(self.model.config)

    def untrimmed(self) -> "LlavaNextFamily":  # noqa: D102 - as in Family
        return _Flat(self.model)

    def shapes(self, images: Images) -> list[Shape]:  # noqa: D102 - as in TiledFamily
        assert images.sizes is not None  # noqa: S101 - as `images` has made sure
        config = self.model.config
        tile, patch = config.vision_config.image_size, config.vision_config.patch_size
        pinpoints = tuple((int(height), int(width)) for height, width in config.image_grid_pinpoints)
        return [
            shape_of((int(height), int(width)), pinpoints, tile, tile // patch, self._merge)
            for height, width in images.sizes.tolist()
        ]

    def tiles(self, images: Images) -> list[Tensor]:
        """Without those that fill up a batch."""
        numbers = [shape.tiles for shape in self.shapes(images)]
        given = images.pixels.shape
        if len(given) == 4 and given[0] == sum(numbers):
            return list(images.pixels.split(numbers))
        if len(given) != 5 or given[0] != len(numbers) or given[1] < max(numbers):
            raise BadInput(
                f"pixel_values of shape {list(given)} for {len(numbers)} images of {numbers[:8]} tiles: use the "
                "processor of this model, with the image_grid_pinpoints of its config"
            )
        return [pixels[:number] for pixels, number in zip(images.pixels, numbers, strict=True)]

    def preprocess(self, processor: Any, images: list[Image.Image], *, mode: str) -> Images:
        """Images as the processor makes them, which pads them to tiles; `squash` fills the tiles with the image."""
        from transformers.image_processing_utils import select_best_resolution

        check_mode(mode)
        images = [image.convert("RGB") for image in images]
        if mode == "squash":
            pinpoints = self.model.config.image_grid_pinpoints
            best = [select_best_resolution((image.height, image.width), pinpoints) for image in images]
            images = [
                image.resize((width, height), Image.Resampling.BICUBIC)
                for image, (height, width) in zip(images, best, strict=True)
            ]
        made = processor.image_processor(images=images, return_tensors="pt")
        return Images(made["pixel_values"], made["image_sizes"])

    def images(self, call: Mapping[str, Any]) -> Images | None:  # noqa: D102 - as in Family
        pixels, sizes = call.get("pixel_values"), call.get("image_sizes")
        if pixels is None:
            return None
        if sizes is None:
            raise BadInput("LLaVA-NeXT needs image_sizes beside pixel_values: use the processor of this model")
        return Images(pixels, torch.as_tensor(sizes))

    def maps(self, images: Images, number: int) -> list[Map]:  # noqa: D102
        return self.shapes(images)[number].maps()

    def place(self, images: Images, number: int, indices_k: Tensor, features_kD: Tensor) -> Placed:
        """Tokens, and the newlines of rows of which one stays; without newlines, one place a token."""
        assert images.sizes is not None  # noqa: S101 - as `images` has made sure
        (shape,) = self.shapes(Images(images.pixels, images.sizes[number : number + 1]))
        if not shape.newlines:
            return Placed(features_kD, indices_k, indices_k, shape.count)
        return with_newlines(shape, indices_k, features_kD, weight_of(self.model.model, "image_newline"))


class _Flat(LlavaNextFamily):
    """Every patch of every tile is a token, whatever the model's config says."""

    @classmethod
    def facts_of(cls, config: Any) -> Facts:
        """One grid, if all images have as many tiles."""
        facts, tiles = super().facts_of(config), _tiles(config)
        side = config.vision_config.image_size // config.vision_config.patch_size
        grid = (max(tiles) * side, side) if len(tiles) == 1 else None
        return replace(facts, grid=grid, tokens=None if grid is None else grid[0] * side)

    @property
    def _merge(self) -> Merge:
        return "flat"

    def untrimmed(self) -> LlavaNextFamily:
        return self


def _merge(config: Any) -> Merge:
    found = getattr(config, "mm_patch_merge_type", None) or "spatial_unpad"
    if found not in MERGES:
        raise BadInput(f"mm_patch_merge_type is {found!r}: {', '.join(MERGES)} are supported")
    merge: Merge = found
    return merge


def _tiles(config: Any) -> set[int]:
    """How many tiles images can have, the whole image among them."""
    tile = config.vision_config.image_size
    return {1 + (height // tile) * (width // tile) for height, width in config.image_grid_pinpoints}
