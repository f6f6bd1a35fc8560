"""LLaVA-1.5 and LLaVA-NeXT in vLLM, pruned where their config has the entry `ocvtp`, and else as vLLM has them.

Of LLaVA-NeXT the tokens that stay must be as many as were promised, and newlines between rows of tiles stay or go with
the tokens beside them: so it is served without newlines alone (`mm_patch_merge_type` is `flat` or `spatial`).

Letters: I images, T tiles of an image, K tokens of an image that stay, D width of the language model.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.models import llava, llava_next
from vllm.model_executor.models.utils import WeightsMapper
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.parse import ImageSize

from ocvtp.errors import BadInput
from ocvtp.serving.section import Setting, family_in
from ocvtp.serving.vision import PrunedVision, tower_of
from ocvtp.vlms.images import Images

_NAMES = WeightsMapper(orig_to_new_substr={"vision_tower.vision_model.": "vision_tower."})
"""Published checkpoints have one more part in the names of their tower than the tower of transformers has."""


class _Info:
    """Sizes of prompts with fewer tokens; stands before the info of vLLM's own model."""

    architecture: str
    get_hf_config: Any

    def __init__(self, ctx: Any) -> None:
        super().__init__(ctx)  # type: ignore[call-arg]
        config = self.get_hf_config()
        setting = Setting.of(config)
        assert setting is not None  # noqa: S101 - else there is vLLM's own
        setting.check(self.architecture, config)
        self._setting, self._family = setting, family_in(self.architecture, config, None)

    def count(self, width: int, height: int) -> int:
        """Tokens of an image of so many pixels before any is dropped."""
        sizes = torch.tensor([[height, width]])
        return self._family.counts(Images(torch.empty(1, 0), sizes))[0]

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        """Placeholders of an image in a prompt."""
        return self._setting.budget.at_most(self.count(image_width, image_height))


class _LlavaInfo(_Info, llava.LlavaProcessingInfo):
    architecture = "LlavaForConditionalGeneration"


class _LlavaNextInfo(_Info, llava_next.LlavaNextProcessingInfo):
    architecture = "LlavaNextForConditionalGeneration"

    def __init__(self, ctx: Any) -> None:
        super().__init__(ctx)
        merge = getattr(self.get_hf_config(), "mm_patch_merge_type", None) or "spatial_unpad"
        if merge == "spatial_unpad":
            raise BadInput(
                "mm_patch_merge_type is 'spatial_unpad': how many newlines stay depends on which tokens do, but an "
                "engine counts them before it looks at an image. Give mm_patch_merge_type 'flat' or 'spatial' beside "
                "ocvtp, for a model without newlines"
            )

    def get_image_size_with_most_features(self) -> ImageSize:
        """The one with most tiles, which are what the tower works on."""
        sizes = [ImageSize(width=width, height=height) for height, width in self.get_hf_config().image_grid_pinpoints]
        return max(sizes, key=lambda size: self.count(size.width, size.height))


def _info(pruned: Any, plain: Any) -> Any:
    """Which info a model gets."""
    own = plain._processor_factory.info
    return lambda ctx: (own if Setting.of(ctx.get_hf_config()) is None else pruned)(ctx)


def _single(image_input: Any) -> Images:
    """Of [I, 3, height, width]."""
    return Images(image_input["pixel_values"])


def _tiled(image_input: Any) -> Images:
    """Of [T, 3, height, width] of each image, or a tensor of them; tiles of all images in a row."""
    tiles: list[Tensor] = list(image_input["pixel_values"])
    return Images(torch.cat(tiles), image_input["image_sizes"].cpu())


class _Pruned:
    """Stands before vLLM's own model: another tower and projector, if it is pruned."""

    supports_tower_connector_lora = False
    architecture: str
    images_of: Callable[[Any], Images]
    """What an image input of vLLM holds."""
    config: Any
    hf_to_vllm_mapper: WeightsMapper
    _vision: PrunedVision | None = None

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        setting = Setting.of(self.config)
        if setting is None:
            return
        from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

        self.vision_tower = tower_of(self.config.vision_config)
        self.multi_modal_projector = LlavaMultiModalProjector(self.config)
        self.hf_to_vllm_mapper = _NAMES | self.hf_to_vllm_mapper
        self._vision = PrunedVision(setting, self.architecture, self.config, self)

    def _process_image_input(self, image_input: Any) -> Any:
        """What stays of each image, [K, D]."""
        if self._vision is None or image_input["type"] != "pixel_values":
            return super()._process_image_input(image_input)  # type: ignore[misc]
        return [placed.features_XD for placed in self._vision.embed(self.images_of(image_input))]


@MULTIMODAL_REGISTRY.register_processor(
    llava.LlavaForConditionalGeneration._processor_factory.processor,
    info=_info(_LlavaInfo, llava.LlavaForConditionalGeneration),
    dummy_inputs=llava.LlavaDummyInputsBuilder,
)
class PrunedLlava(_Pruned, llava.LlavaForConditionalGeneration):
    """`LlavaForConditionalGeneration`."""

    architecture = "LlavaForConditionalGeneration"
    images_of = staticmethod(_single)


@MULTIMODAL_REGISTRY.register_processor(
    llava_next.LlavaNextForConditionalGeneration._processor_factory.processor,
    info=_info(_LlavaNextInfo, llava_next.LlavaNextForConditionalGeneration),
    dummy_inputs=llava.LlavaDummyInputsBuilder,
)
class PrunedLlavaNext(_Pruned, llava_next.LlavaNextForConditionalGeneration):
    """`LlavaNextForConditionalGeneration`."""

    architecture = "LlavaNextForConditionalGeneration"
    images_of = staticmethod(_tiled)
