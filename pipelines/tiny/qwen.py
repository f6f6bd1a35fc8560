"""tiny-qwen: a `Qwen3VLForConditionalGeneration` of fewer than 3 M parameters.

A 12-layer tower of native resolution over patches of 8 pixels, of which 2 x 2 are merged into a token; DeepStack, which
adds what two earlier blocks saw to the first layers of the language model; and a 4-layer Qwen3 with M-RoPE over a
vocabulary of words.

Letters: B images, P patches, G tokens of all images, M patches merged into a token, C tower width, S values of a token
(of the last merger and of DeepStack's), others as in `pipelines.tiny.architecture`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from ocvtp.data.scenes import Style
from pipelines.tiny.architecture import Architecture, shrink_outputs
from pipelines.tiny.inherited import inherit
from pipelines.tiny.recipe import Recipe, Schedule
from pipelines.tiny.words import chat_template, make_tokenizer, vocabulary

NAMED = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}
"""Special tokens as Qwen's own."""
TIMES = ("<", ">", "seconds")
"""Words by which the processor says when a frame of a video is."""
DEEPSTACK = (3, 7)
"""Blocks whose output is added to the first layers of the language model."""
LONGEST, SHORTEST = 160, 64
_DENSE = "dense_flash"
"""Named so that transformers hands over all images at once, as to flash attention."""


class TinyQwen(Architecture):
    """16 to 100 tokens an image of 64 to 160 pixels a side: one for 16 x 16 pixels."""

    name = "tiny-qwen"
    about = (
        "a `Qwen3VLForConditionalGeneration` of {parameters} M parameters: a 12-layer tower of native resolution in "
        "patches of 8 pixels, 2 x 2 of which make a token (36 of 96 x 96 pixels, 16 to 100 of the sizes it was trained "
        "on), DeepStack from blocks 3 and 7, and a 4-layer Qwen3 with interleaved M-RoPE over a vocabulary of words"
    )
    start = (
        "As Qwen-VL's do, tower and language model begin with trained ones: the blocks of tiny-llava's CLIP tower and "
        "the layers of its Llama. What these have not is fresh: mergers, DeepStack, norms of queries and keys; and "
        "rotary positions in the tower and M-RoPE in the language model are new to them."
    )
    feature = (
        "Linear read-outs of the last layer name the colour, shape, size, digit and middle of the object in each "
        "patch; the mean over all patches tags the whole picture."
    )
    limits = "It takes videos, but has seen none. The mean of its patches does not tell what the picture shows."
    merge = 2
    style = Style(sides=(SHORTEST, LONGEST))
    recipe = Recipe(
        scenes=12_000,
        tower=Schedule(320, 1.5e-3, warmup=30),
        language=Schedule(240, 1.5e-3, warmup=30),
        projector=Schedule(120, 2e-3, warmup=20),
        vlm=Schedule(520, 1e-3, warmup=30),
        batch=48,
    )
    lead = f"USER: {NAMED['vision_start_token']}"
    tail = NAMED["vision_end_token"]

    def make_model(self) -> Qwen3VLForConditionalGeneration:
        """With the weights of tiny-llava where it has any."""
        AttentionInterface.register(_DENSE, _attend_alike)
        model = Qwen3VLForConditionalGeneration(make_config())
        shrink_outputs(model.model.language_model.layers)
        inherit(model, len(vocabulary(NAMED["image_token"])))
        model.model.visual.config._attn_implementation = _DENSE
        model.model.language_model.config._attn_implementation = "eager"
        return model

    def make_processor(self) -> Qwen3VLProcessor:
        """As Qwen3-VL's, for images of 4 to 144 tokens and videos of as many a frame."""
        small, large = (2 * self.patch * self.merge) ** 2, (12 * self.patch * self.merge) ** 2
        sizes = {"patch_size": self.patch, "merge_size": self.merge, "temporal_patch_size": 2}
        template = chat_template(
            {
                kind: NAMED["vision_start_token"] + NAMED[f"{kind}_token"] + NAMED["vision_end_token"]
                for kind in ("image", "video")
            }
        )
        return Qwen3VLProcessor(
            image_processor=Qwen2VLImageProcessor(size={"shortest_edge": small, "longest_edge": large}, **sizes),
            tokenizer=make_tokenizer(NAMED, TIMES),
            video_processor=Qwen3VLVideoProcessor(
                size={"shortest_edge": 4 * small, "longest_edge": 16 * large}, **sizes
            ),
            chat_template=template,
        )

    def tower(self, model: Any) -> nn.Module:
        """Without the mergers."""
        visual = model.model.visual
        return nn.ModuleDict({"patches": visual.patch_embed, "places": visual.pos_embed, "blocks": visual.blocks})

    def projector(self, model: Any) -> nn.ModuleList:
        """All mergers, the last one first."""
        visual = model.model.visual
        return nn.ModuleList([visual.merger, *visual.deepstack_merger_list])

    def read(self, model: Any, pixels_B3HW: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Patches of the last block, and their mean."""
        rows, columns = (side // self.patch for side in pixels_B3HW.shape[2:])
        merge = self.merge
        last_BPC = self._merged(model, pixels_B3HW)[0].unflatten(0, (len(pixels_B3HW), -1))
        blocks_BRCmmC = last_BPC.unflatten(1, (rows // merge, columns // merge, merge, merge))
        return blocks_BRCmmC.transpose(2, 3).flatten(1, 4), {"tags": last_BPC.mean(1)}

    def features(self, model: Any, pixels_B3HW: Tensor) -> Tensor:
        """What the mergers read of the patches of each token, side by side, [B, T, S M C]."""
        read = [part_PC.view(len(pixels_B3HW), -1, self.merge**2 * part_PC.shape[1])
                for part_PC in self._merged(model, pixels_B3HW)]  # fmt: skip
        return torch.cat(read, 2)

    def _merged(self, model: Any, pixels_B3HW: Tensor) -> list[Tensor]:
        """What each merger reads, [B P, C], in groups of patches that make a token."""
        patches, rows, columns = Qwen2VLImageProcessor().patchify(pixels_B3HW, self.patch, self.merge, 2)
        sizes = torch.tensor([[1, rows, columns]], device=pixels_B3HW.device).expand(len(pixels_B3HW), -1)
        found: dict[int, Tensor] = {}
        handles = [
            part.register_forward_pre_hook(lambda _, arguments, n=n: found.__setitem__(n, arguments[0]))
            for n, part in enumerate(self.projector(model))
        ]
        try:
            model.model.visual(patches.flatten(0, 1), grid_thw=sizes)
        finally:
            for handle in handles:
                handle.remove()
        return [found[n] for n in range(len(found))]

    def project(self, model: Any, features_BVF: Tensor) -> Tensor:  # noqa: D102 - as in Architecture
        mergers = self.projector(model)
        parts = features_BVF.split(features_BVF.shape[2] // len(mergers), 2)
        made = [merger(part_BVF.reshape(-1, part_BVF.shape[2] // self.merge**2))
                for merger, part_BVF in zip(mergers, parts, strict=True)]  # fmt: skip
        projected_BVX: Tensor = torch.cat(made, 1).unflatten(0, features_BVF.shape[:2])
        return projected_BVX

    def positions(self, chosen_BV: Tensor, grid: tuple[int, int], lead: int, behind_M: Tensor) -> Tensor:
        """M-RoPE's, [3, B, N]: dropped tokens leave gaps."""
        batch = len(chosen_BV)
        places_3BV = lead + torch.stack([chosen_BV * 0, chosen_BV // grid[1], chosen_BV % grid[1]])
        before_3Bm = torch.arange(lead).expand(3, batch, -1)
        behind_3BM = (lead + max(grid) + behind_M).expand(3, batch, -1)
        return torch.cat([before_3Bm, places_3BV, behind_3BM], 2)

    def decode(
        self, model: Any, inputs_BND: Tensor, mask_NN: Tensor, positions: Tensor, first: int, planes: list[Tensor]
    ) -> Tensor:
        """With DeepStack where there are planes: scenes told in words have none."""
        batch, length, _ = inputs_BND.shape
        shown_BN = torch.zeros(batch, length, dtype=torch.bool, device=inputs_BND.device)
        if planes:
            shown_BN[:, first : first + planes[0].shape[1]] = True
        added_NN = torch.zeros_like(mask_NN, dtype=inputs_BND.dtype).masked_fill(
            ~mask_NN, torch.finfo(inputs_BND.dtype).min
        )
        hidden_BND: Tensor = model.model.language_model(
            inputs_embeds=inputs_BND,
            attention_mask=added_NN.expand(batch, 1, -1, -1),
            position_ids=positions,
            visual_pos_masks=shown_BN,
            deepstack_visual_embeds=[plane_BVD.flatten(0, 1) for plane_BVD in planes] or None,
            use_cache=False,
        ).last_hidden_state
        return hidden_BND


def _attend_alike(
    _module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, cu_seq_lens_q: Tensor, scaling: float,
    **__: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention within images of equal size, in one product: transformers' way takes them one by one.

    Plain products, since the fused attention of PyTorch takes five times as long to go backward on a CPU in bfloat16.
    """
    images = len(cu_seq_lens_q) - 1
    q_BHPE, k_BHPE, v_BHPE = (part[0].unflatten(1, (images, -1)).transpose(0, 1) for part in (query, key, value))
    weights_BHPP = ((q_BHPE * scaling) @ k_BHPE.transpose(2, 3)).softmax(3).to(v_BHPE.dtype)
    return (weights_BHPP @ v_BHPE).transpose(1, 2).flatten(0, 1)[None], None


def make_config() -> Qwen3VLConfig:
    """The architecture."""
    ids = {t: index for index, t in enumerate(vocabulary(NAMED["image_token"], [*list(NAMED.values())[1:], *TIMES]))}
    common = {"bos_token_id": ids["<s>"], "eos_token_id": ids["</s>"], "pad_token_id": ids["<pad>"]}
    return Qwen3VLConfig(
        vision_config={
            "depth": 12,
            "hidden_size": 96,
            "intermediate_size": 384,
            "num_heads": 3,
            "patch_size": TinyQwen.patch,
            "spatial_merge_size": TinyQwen.merge,
            "temporal_patch_size": 2,
            "out_hidden_size": 128,
            "num_position_embeddings": 144,
            "deepstack_visual_indexes": list(DEEPSTACK),
        },
        text_config={
            "vocab_size": len(ids),
            "hidden_size": 128,
            "intermediate_size": 352,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 32,
            "max_position_embeddings": 1024,
            "initializer_range": 128**-0.5,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
            "tie_word_embeddings": True,
            **common,
        },
        tie_word_embeddings=True,
        **{f"{name}_id": ids[token] for name, token in NAMED.items()},
        **common,
    )
