"""The CLIP tower of LLaVA and LLaVA-NeXT: hidden states, and attention of single blocks from their q and k.

Letters: T images or tiles, L positions (CLS first), N patches (L - 1), C width, H heads, E width of a head.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from ocvtp.errors import BadInput

_ROWS = 16
"""Images or tiles whose attention is in memory at the same time: 16 of 577 positions and 16 heads are 0.3 GB."""


def check_tower(config: Any) -> None:
    """`BadInput` unless a config's vision tower is CLIP, read at one layer, without CLS."""
    kind = config.vision_config.model_type
    if kind != "clip_vision_model":
        raise BadInput(f"the vision tower is a {kind}: of LLaVA and LLaVA-NeXT those with a CLIP tower are supported")
    if not isinstance(config.vision_feature_layer, int) or config.vision_feature_select_strategy != "default":
        raise BadInput(
            f"vision_feature_layer is {config.vision_feature_layer!r} and vision_feature_select_strategy is "
            f"{config.vision_feature_select_strategy!r}: one layer, and 'default' (no CLS), are supported"
        )


def hidden_states(tower: Any, pixels: Tensor, layers: Collection[int]) -> dict[int, Tensor]:
    """`hidden_states[layer]` with CLS, [T, L, C] each, as `transformers` has them; stops after the deepest."""
    hidden_TLC = tower.pre_layrnorm(tower.embeddings(pixels.to(tower.embeddings.patch_embedding.weight.device)))
    found = {0: hidden_TLC} if 0 in layers else {}
    for done, block in enumerate(tower.encoder.layers[: max(layers)], start=1):
        hidden_TLC = block(hidden_TLC, None)
        if done in layers:
            found[done] = hidden_TLC
    return found


def queries_and_keys(tower: Any, hidden_TLC: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Scaled queries and keys of an encoder block, [T, H, L, E], from the hidden states that it reads."""
    layer = tower.encoder.layers[block]
    attention, normed_TLC = layer.self_attn, layer.layer_norm1(hidden_TLC)
    shape = (*normed_TLC.shape[:2], -1, attention.head_dim)
    q_THLE = attention.q_proj(normed_TLC).view(shape).transpose(1, 2)
    k_THLE = attention.k_proj(normed_TLC).view(shape).transpose(1, 2)
    return q_THLE * attention.head_dim**-0.5, k_THLE


@torch.no_grad()
def received(tower: Any, hidden_TLC: Tensor, block: int) -> Tensor:
    """Attention that each patch receives in a block, mean over heads and all queries (CLS too), [T, N] float32."""
    parts = []
    for some_TLC in hidden_TLC.split(_ROWS):
        q_THLE, k_THLE = queries_and_keys(tower, some_TLC, block)
        weights_THLL = (q_THLE.float() @ k_THLE.float().transpose(2, 3)).softmax(3)
        parts.append(weights_THLL.mean((1, 2))[:, 1:])
    return torch.cat(parts)


@torch.no_grad()
def from_cls(tower: Any, hidden_TLC: Tensor, block: int) -> Tensor:
    """Attention that CLS pays to each patch in a block, mean over heads, [T, N] float32: one row of each head."""
    q_THLE, k_THLE = queries_and_keys(tower, hidden_TLC, block)
    weights_TH1L = (q_THLE[:, :, :1].float() @ k_THLE.float().transpose(2, 3)).softmax(3)
    return weights_TH1L.mean((1, 2))[:, 1:]


@torch.no_grad()
def keys(tower: Any, hidden_TLC: Tensor, block: int) -> Tensor:
    """Keys of a block, mean over heads, without CLS, [T, N, E]."""
    _, k_THLE = queries_and_keys(tower, hidden_TLC, block)
    return k_THLE.mean(1)[:, 1:]
