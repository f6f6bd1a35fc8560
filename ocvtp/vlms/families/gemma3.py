"""Gemma 3: a SigLIP tower whose patches are pooled into 256 tokens; image tokens attend to each other both ways.

Crops of pan and scan are images of their own, each with a budget.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from ocvtp.vlms.images import Facts, Images, Kind
from ocvtp.vlms.tiled import TiledFamily, Tiles


class Gemma3Family(TiledFamily):
    """`Gemma3ForConditionalGeneration`."""

    vision_inputs: ClassVar[frozenset[str]] = frozenset({"pixel_values"})
    nested: ClassVar[bool] = True
    column_inputs: ClassVar[Mapping[str, int]] = {"token_type_ids": 0}

    @classmethod
    def facts_of(cls, config: Any) -> Facts:  # noqa: D102 - as in Family
        side = int(config.mm_tokens_per_image**0.5)
        return cls.tiled_facts(config, side * side, (side, side))

    def images(self, call: Mapping[str, Any]) -> Images | None:  # noqa: D102
        pixels = call.get("pixel_values")
        return None if pixels is None else Images(pixels)

    def shapes(self, images: Images) -> list[Tiles]:  # noqa: D102 - as in TiledFamily
        vision = self.model.config.vision_config
        side = vision.image_size // vision.patch_size
        merge = side // int(self.model.config.mm_tokens_per_image**0.5)
        return [Tiles(1, side, merge)] * len(images)

    def features(self, features_XD: Tensor, kind: Kind = "image") -> Any:
        """One tensor."""
        output = super().features(features_XD, kind)
        output.pooler_output = features_XD[None]
        return output
