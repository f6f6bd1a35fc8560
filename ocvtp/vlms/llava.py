"""LLaVA-1.5 and its like: a CLIP tower, one square grid of tokens an image.

Letters: I images, G images of a group, N tokens of an image, L positions in the tower (CLS first), C tower width,
k tokens kept, D width of the language model.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from ocvtp.vlms import clip
from ocvtp.vlms.family import Family, Vision, check_mode, pad_to_square, take
from ocvtp.vlms.images import Facts, Grid, Images


class LlavaVision(Vision):
    """Hidden states of the tower, CLS first."""

    def __init__(self, family: "LlavaFamily", states: dict[int, Tensor], counts: list[int], grids: list[Grid]) -> None:
        self._family, self._states = family, states
        self.counts, self.grids = counts, grids

    def tokens(self, layer: int, members: Sequence[int]) -> Tensor:  # noqa: D102 - as in Vision
        return take(self._states[layer], members)[:, 1:]

    def values(self, members: Sequence[int]) -> Tensor:  # noqa: D102
        return self.tokens(self._family.facts.feature_layer, members)

    def received(self, block: int, members: Sequence[int]) -> Tensor:  # noqa: D102
        return clip.received(self._family.tower, take(self._states[block], members), block)

    def from_cls(self, block: int, members: Sequence[int]) -> Tensor:  # noqa: D102
        return clip.from_cls(self._family.tower, take(self._states[block], members), block)

    def keys(self, block: int, members: Sequence[int]) -> Tensor:  # noqa: D102
        return clip.keys(self._family.tower, take(self._states[block], members), block)

    def cls_values(self, members: Sequence[int]) -> Tensor:  # noqa: D102
        return take(self._states[self._family.facts.feature_layer], members)[:, :1]


class LlavaFamily(Family):
    """`LlavaForConditionalGeneration` with a CLIP tower."""

    vision_inputs: ClassVar[frozenset[str]] = frozenset({"pixel_values", "image_sizes"})

    @classmethod
    def facts_of(cls, config: Any) -> Facts:  # noqa: D102 - as in Family
        clip.check_tower(config)
        vision, layer = config.vision_config, config.vision_feature_layer
        side = vision.image_size // vision.patch_size
        return Facts(
            tokens=side * side,
            grid=(side, side),
            width=vision.hidden_size,
            depth=vision.num_hidden_layers,
            feature_layer=layer if layer >= 0 else vision.num_hidden_layers + 1 + layer,
            cls=True,
        )

    @property
    def _grid(self) -> Grid:
        vision = self.model.config.vision_config
        return (vision.image_size // vision.patch_size,) * 2

    @property
    def tower(self) -> Any:
        """The CLIP model."""
        return self.model.model.vision_tower

    def prepare(self, processor: Any, image: Image.Image) -> Image.Image:
        """Padded to a square, as LLaVA-1.5 is evaluated; the processor of transformers would cut its sides off."""
        return pad_to_square(image, _mean_colour(processor.image_processor))

    def preprocess(self, processor: Any, images: list[Image.Image], *, mode: str) -> Images:  # noqa: D102
        check_mode(mode)
        processor = processor.image_processor
        side = self.model.config.vision_config.image_size
        fill = _mean_colour(processor)
        squares = [
            pad_to_square(image, fill)
            if mode == "pad"
            else image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
            for image in images
        ]
        return Images(processor(images=squares, return_tensors="pt")["pixel_values"])

    def images(self, call: Mapping[str, Any]) -> Images | None:  # noqa: D102
        pixels = call.get("pixel_values")
        return None if pixels is None else Images(pixels)

    def pixels_of(self, images: Images, number: int) -> Tensor:  # noqa: D102
        return images.pixels[number]

    def counts(self, images: Images) -> list[int]:  # noqa: D102
        rows, columns = self._grid
        return [rows * columns] * len(images)

    def grids(self, images: Images) -> list[Grid]:  # noqa: D102
        return [self._grid] * len(images)

    def spans(self, images: Images) -> list[int]:  # noqa: D102
        return self.counts(images)

    def encode(self, images: Images, layers: Collection[int], *, values: bool = True) -> LlavaVision:  # noqa: D102
        wanted = {*layers, *([self.facts.feature_layer] if values else [])}
        states = clip.hidden_states(self.tower, images.pixels, wanted)
        return LlavaVision(self, states, self.counts(images), self.grids(images))

    def tiles(self, images: Images) -> clip.Tiles:
        """Each image is one tile."""
        numbers_1N = torch.arange(self.counts(images)[0])[None]
        return clip.Tiles(images.pixels, [numbers_1N] * len(images))

    def project(self, values: Sequence[Tensor]) -> list[Tensor]:  # noqa: D102
        projected = self.model.model.multi_modal_projector(torch.cat(list(values)))
        return list(projected.split([len(each) for each in values]))


def _mean_colour(image_processor: Any) -> tuple[int, ...]:
    return tuple(int(255 * mean) for mean in image_processor.image_mean)
