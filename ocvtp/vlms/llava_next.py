"""LLaVA-NeXT: a CLIP tower that sees the whole image and tiles of it; all of them together are one image of N tokens.

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

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from PIL import Image
from torch import Tensor

from ocvtp.errors import BadInput, Incompatible
from ocvtp.vlms import clip
from ocvtp.vlms.anyres import MERGES, Merge, Shape, shape_of
from ocvtp.vlms.family import Family, Vision, check_mode, take
from ocvtp.vlms.images import Facts, Grid, Images, Layout, Map, Placed


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


class LlavaNextVision(Vision):
    """Hidden states of the tiles, CLS first."""

    def __init__(self, family: "LlavaNextFamily", states: dict[int, Tensor], shapes: list[Shape]) -> None:
        self._family, self._states, self._shapes = family, states, shapes
        self.counts = [shape.count for shape in shapes]
        self.grids = [shape.grid for shape in shapes]
        ends = torch.tensor([shape.tiles for shape in shapes]).cumsum(0).tolist()
        self._tiles = [range(end - shape.tiles, end) for end, shape in zip(ends, shapes, strict=True)]

    def layout(self, member: int) -> Layout:  # noqa: D102 - as in Vision
        return self._shapes[member].layout

    def _seen(self, layer: int, members: Sequence[int]) -> Tensor:
        """Hidden states of the tiles of some images, [T, L, C]."""
        return take(self._states[layer], [tile for member in members for tile in self._tiles[member]])

    def _arranged(self, tiles_TNX: Tensor, members: Sequence[int]) -> Tensor:
        """Something of each patch of each tile of some images, for their tokens, [G, N, ...]."""
        parts = tiles_TNX.split([len(self._tiles[member]) for member in members])
        orders = [self._shapes[member].patches_N.to(tiles_TNX.device) for member in members]
        return torch.stack([part.flatten(0, 1)[order_N] for part, order_N in zip(parts, orders, strict=True)])

    def tokens(self, layer: int, members: Sequence[int]) -> Tensor:  # noqa: D102
        return self._arranged(self._seen(layer, members)[:, 1:], members)

    def values(self, members: Sequence[int]) -> Tensor:  # noqa: D102
        return self.tokens(self._family.facts.feature_layer, members)

    def received(self, block: int, members: Sequence[int]) -> Tensor:
        """Within each tile: mean over heads and over the queries of that tile."""
        return self._arranged(clip.received(self._family.tower, self._seen(block, members), block), members)

    def from_cls(self, block: int, members: Sequence[int]) -> Tensor:  # noqa: D102
        return self._arranged(clip.from_cls(self._family.tower, self._seen(block, members), block), members)

    def keys(self, block: int, members: Sequence[int]) -> Tensor:  # noqa: D102
        return self._arranged(clip.keys(self._family.tower, self._seen(block, members), block), members)

    def cls_values(self, members: Sequence[int]) -> Tensor:  # noqa: D102
        cls_TC = self._seen(self._family.facts.feature_layer, members)[:, 0]
        return cls_TC.view(len(members), -1, cls_TC.shape[1])


class LlavaNextFamily(Family):
    """`LlavaNextForConditionalGeneration` with a CLIP tower."""

    vision_inputs: ClassVar[frozenset[str]] = frozenset({"pixel_values", "image_sizes"})

    @classmethod
    def facts_of(cls, config: Any) -> Facts:
        """The tokens of an image are known if all images have as many: in paper mode."""
        clip.check_tower(config)
        vision, layer = config.vision_config, config.vision_feature_layer
        numbers = set()
        if _merge(config) != "spatial_unpad":
            side = vision.image_size // vision.patch_size
            numbers = {tiles * side * side for tiles in _tiles(config)}
        return Facts(
            tokens=numbers.pop() if len(numbers) == 1 else None,
            grid=None,
            width=vision.hidden_size,
            depth=vision.num_hidden_layers,
            feature_layer=layer if layer >= 0 else vision.num_hidden_layers + 1 + layer,
            cls=True,
        )

    @property
    def _merge(self) -> Merge:
        return _merge(self.model.config)

    def untrimmed(self) -> "LlavaNextFamily":  # noqa: D102 - as in Family
        return _Flat(self.model)

    @property
    def tower(self) -> Any:
        """The CLIP model."""
        return self.model.model.vision_tower

    def _shapes(self, images: Images) -> list[Shape]:
        assert images.sizes is not None  # noqa: S101 - as `images` has made sure
        config = self.model.config
        tile, patch = config.vision_config.image_size, config.vision_config.patch_size
        pinpoints = tuple((int(height), int(width)) for height, width in config.image_grid_pinpoints)
        return [
            shape_of((int(height), int(width)), pinpoints, tile, tile // patch, self._merge)
            for height, width in images.sizes.tolist()
        ]

    def _pixels(self, images: Images, shapes: Sequence[Shape]) -> list[Tensor]:
        """The tiles of each image, without those that fill up a batch."""
        numbers = [shape.tiles for shape in shapes]
        given = images.pixels.shape
        if len(given) == 4 and given[0] == sum(numbers):
            return list(images.pixels.split(numbers))
        if len(given) != 5 or given[0] != len(shapes) or given[1] < max(numbers):
            raise BadInput(
                f"pixel_values of shape {list(given)} for {len(shapes)} images of {numbers[:8]} tiles: use the "
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

    def pixels_of(self, images: Images, number: int) -> Tensor:  # noqa: D102
        return self._pixels(images, self._shapes(images))[number]

    def counts(self, images: Images) -> list[int]:  # noqa: D102
        return [shape.count for shape in self._shapes(images)]

    def grids(self, images: Images) -> list[Grid]:
        """As `Shape` has them; `Vision.layout` has those of the whole image and of its tiles."""
        return [shape.grid for shape in self._shapes(images)]

    def maps(self, images: Images, number: int) -> list[Map]:  # noqa: D102
        return self._shapes(images)[number].maps()

    def spans(self, images: Images) -> list[int]:  # noqa: D102
        return [shape.span for shape in self._shapes(images)]

    def encode(self, images: Images, layers: Collection[int], *, values: bool = True) -> LlavaNextVision:  # noqa: D102
        wanted = {*layers, *([self.facts.feature_layer] if values else [])}
        shapes = self._shapes(images)
        return LlavaNextVision(
            self, clip.hidden_states(self.tower, torch.cat(self._pixels(images, shapes)), wanted), shapes
        )

    def tiles(self, images: Images) -> clip.Tiles:
        """The whole image and its tiles; `Incompatible` where padding was cut off, for patches are missing then."""
        shapes = self._shapes(images)
        patches = self.tower.config.image_size // self.tower.config.patch_size
        for number, shape in enumerate(shapes):
            if shape.count != shape.tiles * patches**2:
                raise Incompatible(
                    f"of the {shape.tiles * patches**2} patches of image {number} padding is cut off, so that only "
                    f"{shape.count} are tokens: set mm_patch_merge_type to 'flat' (`ocvtp.vlms.llava_next.paper_mode`)"
                )
        numbers = [shape.patches_N.argsort().view(shape.tiles, -1) for shape in shapes]
        return clip.Tiles(torch.cat(self._pixels(images, shapes)), numbers)

    def project(self, values: Sequence[Tensor]) -> list[Tensor]:  # noqa: D102
        projected = self.model.model.multi_modal_projector(torch.cat(list(values)))
        return list(projected.split([len(each) for each in values]))

    def place(self, images: Images, number: int, indices_k: Tensor, features_kD: Tensor) -> Placed:
        """Tokens, and the newlines of rows of which one stays; without newlines, one place a token."""
        assert images.sizes is not None  # noqa: S101 - as `images` has made sure
        (shape,) = self._shapes(Images(images.pixels, images.sizes[number : number + 1]))
        if not shape.newlines:
            return Placed(features_kD, indices_k, indices_k, shape.count)
        tokens_k, ends_X = shape.newlines_of(indices_k)
        places_X, order_X = torch.cat([tokens_k, ends_X]).sort()
        newline_XD = self.model.model.image_newline.to(features_kD).expand(len(ends_X), -1)
        numbers_X = torch.cat([indices_k, torch.full_like(ends_X, -1)])[order_X]
        features_XD = torch.cat([features_kD, newline_XD])[order_X.to(features_kD.device)]
        return Placed(features_XD, places_X, numbers_X, shape.span)


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
