"""What tiny-qwen has of tiny-llava: the blocks of its tower and the layers of its language model.

Letters: C tower width.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ocvtp.data.scenes import make_scenes
from ocvtp.vlms.catalogue import resolve
from pipelines.tiny.pool import normalised


@torch.no_grad()
def inherit(model: Any, words: int) -> None:
    """Copy what tiny-llava, as it is shipped, has in common with a Qwen3-VL of the same sizes.

    Args:
        model: of `Qwen3VLForConditionalGeneration`.
        words: number of tokens that both vocabularies begin with.
    """
    from transformers import LlavaForConditionalGeneration

    parent = LlavaForConditionalGeneration.from_pretrained(resolve("tiny-llava").folder, dtype=torch.float32)
    _inherit_language(model.model.language_model, parent.model.language_model, words)
    tower = parent.model.vision_tower
    _inherit_tower(model.model.visual, getattr(tower, "vision_model", tower))


def _inherit_language(model: Any, parent: Any, words: int) -> None:
    model.embed_tokens.weight[:words] = parent.embed_tokens.weight[:words]
    model.norm.weight.copy_(parent.norm.weight)
    for layer, old in zip(model.layers, parent.layers, strict=True):
        result = layer.load_state_dict(old.state_dict(), strict=False)
        assert not result.unexpected_keys, result  # noqa: S101 - the sizes are the same by construction
        # Llama has no norm of queries and keys: one of the size that theirs have changes least.
        gain = old.input_layernorm.weight
        for norm, projection in (("q_norm", old.self_attn.q_proj), ("k_norm", old.self_attn.k_proj)):
            size = (projection.weight * gain).square().sum(1).mean().sqrt()
            getattr(layer.self_attn, norm).weight.fill_(float(size))


def _inherit_tower(model: Any, parent: Any) -> None:
    for block, old in zip(model.blocks, parent.encoder.layers, strict=True):
        attention = [getattr(old.self_attn, f"{name}_proj") for name in "qkv"]
        block.attn.qkv.weight.copy_(torch.cat([part.weight for part in attention]))
        block.attn.qkv.bias.copy_(torch.cat([part.bias for part in attention]))
        for new, source in (
            (block.attn.proj, old.self_attn.out_proj),
            (block.mlp.linear_fc1, old.mlp.fc1),
            (block.mlp.linear_fc2, old.mlp.fc2),
            (block.norm1, old.layer_norm1),
            (block.norm2, old.layer_norm2),
        ):
            new.load_state_dict(source.state_dict())
    # CLIP has a norm behind its embeddings. Its mean effect on scenes goes into the embeddings.
    gain_C = parent.pre_layrnorm.weight / _spread(parent.embeddings)
    frames = model.patch_embed.temporal_patch_size
    kernel = parent.embeddings.patch_embedding.weight * gain_C[:, None, None, None] / frames
    model.patch_embed.proj.weight.copy_(kernel[:, :, None].expand_as(model.patch_embed.proj.weight))
    model.patch_embed.proj.bias.copy_(parent.pre_layrnorm.bias)
    model.pos_embed.weight.copy_(parent.embeddings.position_embedding.weight[1:] * gain_C)


def _spread(embeddings: nn.Module) -> float:
    """Mean deviation of the entries of an embedding of a patch."""
    pixels_B3HW = normalised(np.stack([scene.pixels_HW3 for scene in make_scenes(0, "vlm", 64)]))
    embedded_BLC: Tensor = embeddings(pixels_B3HW)
    return float(embedded_BLC[:, 1:].std(2).mean())
