"""LLaVA-1.5 and its like: a CLIP or SigLIP tower, one square grid of tokens an image.

Letters: I images, N tokens of an image.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from PIL import Image
from torch import Tensor

from ocvtp.vlms.family import check_mode
from ocvtp.vlms.images import Facts, Images
from ocvtp.vlms.tiled import ProjectedLate, Tiles


class LlavaFamily(ProjectedLate):
    """`LlavaForConditionalGeneration`."""

    vision_inputs: ClassVar[frozenset[str]] = frozenset({"pixel_values", "image_sizes"})

    @classmethod
    def facts_of(cls, config: Any) -> Facts:  # noqa: D102 - as in Family
        side = config.vision_config.image_size // config.vision_config.patch_size
        return cls.tiled_facts(config, side * side, (side, side))

    def prepare(self, processor: Any, image: Image.Image) -> Image.Image:
        """Padded to a square, as LLaVA-1.5 is evaluated; the processor of transformers would cut its sides off."""
        return pad_to_square(image, _mean_colour(processor.image_processor))

    def preprocess(self, processor: Any, images: list[Image.Image], *, mode: str) -> Images:  # noqa: D102
        check_mode(mode)
        side = self.model.config.vision_config.image_size
        squares = [
            self.prepare(processor, image)
            if mode == "pad"
            else image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
            for image in images
        ]
        return Images(processor.image_processor(images=squares, return_tensors="pt")["pixel_values"])

    def images(self, call: Mapping[str, Any]) -> Images | None:  # noqa: D102
        pixels = call.get("pixel_values")
        return None if pixels is None else Images(pixels)

    def pixels_of(self, images: Images, number: int) -> Tensor:  # noqa: D102
        return images.pixels[number]

    def shapes(self, images: Images) -> list[Tiles]:  # noqa: D102 - as in TiledFamily
        vision = self.model.config.vision_config
        return [Tiles(1, vision.image_size // vision.patch_size)] * len(images)


def pad_to_square(image: Image.Image, fill: tuple[int, ...]) -> Image.Image:
    """The image in the middle of a square of one colour, as LLaVA-1.5 has it in evaluation."""
    image = image.convert("RGB")
    if image.width == image.height:
        return image
    side = max(image.size)
    square = Image.new("RGB", (side, side), fill)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _mean_colour(image_processor: Any) -> tuple[int, ...]:
    return tuple(int(255 * mean) for mean in image_processor.image_mean)
