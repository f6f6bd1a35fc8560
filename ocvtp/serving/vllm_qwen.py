"""Qwen2.5-VL and Qwen3-VL in vLLM, pruned where their config has the entry `ocvtp`, and else as vLLM has them.

Positions are M-RoPE's of the whole image. Those of text follow from the sizes of images alone; those of tokens that
stay are known when an image has been looked at. vLLM lets a model hand them over with the embeddings, as more columns
of these, and asks it for the positions of a prompt once more (`recompute_mrope_positions`), which its own pruning of
videos needs. Videos are not served here.

What Qwen3-VL's DeepStack makes of a token stands in the same row, behind what the last merger makes of it, here as in
vLLM: so one choice cuts all of it.

Letters: I images, K tokens of an image that stay, V width of what is handed over of each (the language model's, times
one and DeepStack's mergers), L columns of a prompt.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.models import qwen2_5_vl, qwen3_vl
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing import PromptReplacement

from ocvtp.serving.section import Setting
from ocvtp.serving.vision import PrunedVision
from ocvtp.vlms.images import Images, Placed

_DIGIT = 128
"""Numbers are handed over as two digits: bfloat16 has whole numbers to 256."""
_CHANNELS = 6
"""Row and column of a token, and positions that its image takes, two digits each."""


class _Info:
    """Sizes of prompts with fewer tokens, and no videos; stands before the info of vLLM's own model."""

    architecture: str
    get_hf_config: Any
    get_max_image_tokens: Callable[[], int]

    def __init__(self, ctx: Any) -> None:
        super().__init__(ctx)  # type: ignore[call-arg]
        config = self.get_hf_config()
        setting = Setting.of(config)
        assert setting is not None  # noqa: S101 - else there is vLLM's own
        setting.check(self.architecture, config)
        self.setting = setting

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """Any number of images, and no video."""
        return {"image": None, "video": 0}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        """Placeholders of the largest image."""
        return {"image": self.get_max_image_tokens()}

    def get_num_image_tokens(self, **size: Any) -> int:
        """Placeholders of an image."""
        whole: int = super().get_num_image_tokens(**size)  # type: ignore[misc]
        return self.setting.budget.at_most(whole)


class _Processor:
    """Prompts with as many placeholders as tokens stay; stands before the processor of vLLM's own model."""

    info: Any

    def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> Sequence[Any]:
        placeholder: int = self.info.get_hf_config().image_token_id
        merge = self.info.get_image_processor(**hf_processor_mm_kwargs).merge_size

        def placeholders(number: int) -> list[int]:
            item = out_mm_kwargs["image"][number]
            if "image_embeds" in item:
                raise ValueError("a pruned Qwen-VL takes images, not image_embeds")
            count = int(item["image_grid_thw"].data.prod()) // merge**2
            return [placeholder] * self.info.setting.budget.at_most(count)

        return [PromptReplacement(modality="image", target=[placeholder], replacement=placeholders)]


def _registered(plain: Any) -> Callable[[Any], Any]:
    """Puts a model into vLLM's register of processors, with those of its own where it is not pruned."""
    own = plain._processor_factory
    pruned_info = type("Info", (_Info, own.info), {"architecture": plain.__name__})
    pruned_processor = type("Processor", (_Processor, own.processor), {})

    def info(ctx: Any) -> Any:
        return (own.info if Setting.of(ctx.get_hf_config()) is None else pruned_info)(ctx)

    def processor(info: Any, dummy_inputs: Any, **more: Any) -> Any:
        return (pruned_processor if isinstance(info, _Info) else own.processor)(info, dummy_inputs, **more)

    registered: Callable[[Any], Any] = MULTIMODAL_REGISTRY.register_processor(
        processor, info=info, dummy_inputs=own.dummy_inputs
    )
    return registered


def _mend_cpu_runner() -> None:
    """Have the runner for CPUs look at that switch, as the one for GPUs does when it has loaded a model.

    In 0.32 it loads models in its own way and leaves out this part.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    def asked(runner: Any) -> bool:
        model = runner.__dict__.get("model")
        enabled: bool = runner.model_config.multimodal_config.is_multimodal_pruning_enabled()
        return enabled and getattr(model, "supports_multimodal_pruning", False)

    CPUModelRunner.is_multimodal_pruning_enabled = property(asked, lambda runner, value: None)


class _Pruned:
    """Stands before vLLM's own model: another tower, and positions, if it is pruned."""

    supports_tower_connector_lora = False
    supports_mm_device_do_normalize = False
    architecture: str
    tower_class: Callable[[], Any]
    """The tower of transformers."""
    config: Any
    _vision: PrunedVision | None = None

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        setting = Setting.of(vllm_config.model_config.hf_config)
        if setting is not None:
            # The switch that makes vLLM ask for positions again, and take larger ones; there are no videos.
            vllm_config.model_config.get_multimodal_config().video_pruning_rate = 0.5
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        if setting is None:
            return
        self.visual = (
            self.tower_class()
            ._from_config(self.config.vision_config, dtype=torch.get_default_dtype(), attn_implementation="sdpa")
            .eval()
        )
        self._vision = PrunedVision(setting, self.architecture, self.config, self)
        self.use_data_parallel = self.supports_encoder_cudagraph = self.is_multimodal_pruning_enabled = False
        _mend_cpu_runner()

    def _process_image_input(self, image_input: Any) -> Any:
        """What stays of each image, and where it stood, [K, V + channels]."""
        if self._vision is None:
            return super()._process_image_input(image_input)  # type: ignore[misc]
        sizes = image_input["image_grid_thw"].cpu()
        placed = self._vision.embed(Images(image_input["pixel_values"], sizes))
        return tuple(
            torch.cat([each.features_XD, self._channels(each, size).to(each.features_XD)], 1)
            for each, size in zip(placed, sizes.tolist(), strict=True)
        )

    def _grid(self, size: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of the tokens of an image, from those of its patches."""
        merge = self.config.vision_config.spatial_merge_size
        return size[1] // merge, size[2] // merge

    def _channels(self, placed: Placed, size: Sequence[int]) -> Tensor:
        """Row, column and span of each token that stays, in digits, [K, 6]."""
        rows, columns = self._grid(size)
        numbers_K = placed.numbers_X
        span_K = torch.full_like(numbers_K, max(rows, columns))
        told_K3 = torch.stack([numbers_K // columns, numbers_K % columns, span_K], 1)
        return torch.cat([told_K3 // _DIGIT, told_K3 % _DIGIT], 1)

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        """Positions [3, L] of a prompt, and by how much the next one is ahead of L.

        Those of text are right; an image's are all that of its beginning, until it has been looked at.
        """
        if self._vision is None:
            found: tuple[Tensor, int] = super().get_mrope_input_positions(  # type: ignore[misc]
                input_tokens, mm_features
            )
            return found
        parts, at, done = list[Tensor](), 0, 0
        for feature in sorted(mm_features, key=lambda feature: feature.mm_position.offset):
            start, count = feature.mm_position.offset, feature.mm_position.length
            parts.append(torch.arange(at, at + start - done))
            at, done = at + start - done, start + count
            parts.append(torch.full((count,), at))
            at += max(self._grid(feature.data["image_grid_thw"].data.tolist()))
        length = len(input_tokens)
        parts.append(torch.arange(at, at + length - done))
        return torch.cat(parts).expand(3, -1).clone(), at - done

    def recompute_mrope_positions(
        self,
        input_ids: list[int] | Tensor,
        multimodal_embeddings: Sequence[Tensor],
        mrope_positions: Tensor,
        num_computed_tokens: int,
    ) -> tuple[Sequence[Tensor], Tensor, int]:
        """Embeddings [K, V], positions [3, L] with those of the tokens that they are of, and as above."""
        if self._vision is None:
            asked: tuple[Sequence[Tensor], Tensor, int] = super().recompute_mrope_positions(  # type: ignore[misc]
                input_ids, multimodal_embeddings, mrope_positions, num_computed_tokens
            )
            return asked
        positions_3L = mrope_positions.clone()
        device, length = positions_3L.device, positions_3L.shape[1]
        marks_L = torch.as_tensor(input_ids, device=device) == self.config.image_token_id
        columns_L = torch.arange(length, device=device)
        begins_L = marks_L & ~torch.nn.functional.pad(marks_L[:-1], (1, 0))
        # Where the image of each column begins, and the position there: one after the text before it.
        first_L = torch.where(begins_L, columns_L, 0).cummax(0).values
        base_L = torch.where(first_L > 0, positions_3L[0, (first_L - 1).clamp(min=0)] + 1, 0)
        following = int(positions_3L.max()) + 1 if length else 0
        if multimodal_embeddings:
            digits_X6 = torch.cat([each[:, -_CHANNELS:] for each in multimodal_embeddings]).to(device).long()
            told_X3 = digits_X6[:, :3] * _DIGIT + digits_X6[:, 3:]
            where_X = columns_L[marks_L & (columns_L >= num_computed_tokens)][: len(told_X3)]
            positions_3L[0, where_X] = base_L[where_X]
            positions_3L[1:, where_X] = base_L[where_X] + told_X3[:, :2].T
            following = max(following, int((base_L[where_X] + told_X3[:, 2]).max()))
        return [each[:, :-_CHANNELS] for each in multimodal_embeddings], positions_3L, following - length


@_registered(qwen2_5_vl.Qwen2_5_VLForConditionalGeneration)
class PrunedQwen25VL(_Pruned, qwen2_5_vl.Qwen2_5_VLForConditionalGeneration):
    """`Qwen2_5_VLForConditionalGeneration`."""

    architecture = "Qwen2_5_VLForConditionalGeneration"

    @staticmethod
    def tower_class() -> Any:  # noqa: D102 - as in _Pruned
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

        return Qwen2_5_VisionTransformerPretrainedModel


@_registered(qwen3_vl.Qwen3VLForConditionalGeneration)
class PrunedQwen3VL(_Pruned, qwen3_vl.Qwen3VLForConditionalGeneration):
    """`Qwen3VLForConditionalGeneration`."""

    architecture = "Qwen3VLForConditionalGeneration"

    @staticmethod
    def tower_class() -> Any:  # noqa: D102 - as in _Pruned
        from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

        return Qwen3VLVisionModel
