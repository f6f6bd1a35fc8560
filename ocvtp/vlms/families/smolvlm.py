"""SmolVLM: each tile of an image, and the whole of it, has placeholders of its own in the prompt, and so a budget."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ocvtp.errors import BadInput
from ocvtp.vlms.families.internvl import runs
from ocvtp.vlms.images import Facts, Images, Kind
from ocvtp.vlms.tiled import TiledFamily, Tiles


class SmolVLMFamily(TiledFamily):
    """`SmolVLMForConditionalGeneration`; an image is a tile."""

    vision_inputs: ClassVar[frozenset[str]] = frozenset({"pixel_values", "pixel_attention_mask"})
    outer: ClassVar[int] = 2

    @classmethod
    def facts_of(cls, config: Any) -> Facts:  # noqa: D102 - as in Family
        side = config.vision_config.image_size // config.vision_config.patch_size // config.scale_factor
        return cls.tiled_facts(config, side * side, (side, side))

    @property
    def tower(self) -> Any:
        """The vision model."""
        return self.model.model.vision_model

    @property
    def projectors(self) -> list[Any]:  # noqa: D102 - as in TiledFamily
        return [self.model.model.connector]

    def images(self, call: Mapping[str, Any]) -> Images | None:
        """The tiles for which a prompt has placeholders; without prompts, all."""
        pixels = call.get("pixel_values")
        if pixels is None:
            return None
        ids = call.get("input_ids") if call.get("inputs") is None else call["inputs"]
        if ids is None:
            return Images(pixels.flatten(0, 1))
        tiles_B = torch.tensor([sum(runs(row_L[None], self.placeholder, self.facts.tokens or 1)) for row_L in ids])
        if len(pixels) != len(ids) or int(tiles_B.max()) > pixels.shape[1]:
            raise BadInput(
                f"the prompts have placeholders for {tiles_B.tolist()} tiles, but pixel_values is of shape "
                f"{list(pixels.shape)}: use the processor of this model"
            )
        return Images(torch.cat([row[:tiles] for row, tiles in zip(pixels, tiles_B.tolist(), strict=True)]))

    def shapes(self, images: Images) -> list[Tiles]:  # noqa: D102 - as in TiledFamily
        config = self.model.config
        return [Tiles(1, images.pixels.shape[-1] // config.vision_config.patch_size, config.scale_factor)] * len(images)

    def inputs(self, images: Images) -> dict[str, Any]:
        """A row a tile."""
        return {"pixel_values": images.pixels[:, None]}

    def features(self, features_XD: Tensor, kind: Kind = "image") -> Any:
        """One tensor, each token a tile of its own, since older models count by tiles."""
        output = super().features(features_XD, kind)
        output.pooler_output = features_XD[:, None]
        return output

    def own(self, images: Images, output: Any) -> list[Tensor]:
        """Of each tile."""
        return list(output.pooler_output)
