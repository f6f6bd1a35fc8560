"""The CLIP tower of LLaVA and LLaVA-NeXT: hidden states, and attention of single blocks from their q and k.

Letters: T images or tiles, L positions (CLS first), N patches (L - 1), C width, H heads, E width of a head.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ocvtp.errors import BadInput
from ocvtp.vlms.images import Images

_ROWS = 16
"""Images or tiles whose attention is in memory at the same time: 16 of 577 positions and 16 heads are 0.3 GB."""


@dataclass(frozen=True)
class Tiles:
    """What a tower sees one by one.

    Attributes:
        pixels_T3HW: all tiles of all images, in a row.
        numbers: for each image, [its tiles, N of a tile]: which of the image's tokens each patch is.
    """

    pixels_T3HW: Tensor
    numbers: list[Tensor]

    @property
    def patches(self) -> int:
        """N of a tile."""
        return int(self.numbers[0].shape[1])


@runtime_checkable
class Tiled(Protocol):
    """A family with a CLIP tower."""

    @property
    def tower(self) -> Any:
        """The CLIP model."""

    def tiles(self, images: Images) -> Tiles:
        """The tiles of images, for methods that run the tower themselves.

        `Incompatible` where not every patch is a token.
        """


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


def embed(tower: Any, pixels: Tensor) -> Tensor:
    """What the first block reads, `hidden_states[0]`, [T, L, C]."""
    hidden_TLC: Tensor = tower.pre_layrnorm(tower.embeddings(pixels.to(tower.embeddings.patch_embedding.weight.device)))
    return hidden_TLC


def hidden_states(tower: Any, pixels: Tensor, layers: Collection[int]) -> dict[int, Tensor]:
    """`hidden_states[layer]` with CLS, [T, L, C] each, as `transformers` has them; stops after the deepest."""
    hidden_TLC = embed(tower, pixels)
    found = {0: hidden_TLC} if 0 in layers else {}
    for done, block in enumerate(tower.encoder.layers[: max(layers)], start=1):
        hidden_TLC = block(hidden_TLC, None)
        if done in layers:
            found[done] = hidden_TLC
    return found


def queries(tower: Any, hidden_TLC: Tensor, block: int) -> Tensor:
    """Scaled queries of an encoder block, [T, H, L, E], from (some of) the hidden states that it reads."""
    layer = tower.encoder.layers[block]
    attention = layer.self_attn
    q_THLE: Tensor = _heads(attention.q_proj(layer.layer_norm1(hidden_TLC)), attention) * attention.head_dim**-0.5
    return q_THLE


def _keys(tower: Any, hidden_TLC: Tensor, block: int) -> Tensor:
    """Keys of an encoder block, [T, H, L, E]."""
    layer = tower.encoder.layers[block]
    return _heads(layer.self_attn.k_proj(layer.layer_norm1(hidden_TLC)), layer.self_attn)


def _heads(projected_TLC: Tensor, attention: Any) -> Tensor:
    return projected_TLC.view(*projected_TLC.shape[:2], -1, attention.head_dim).transpose(1, 2)


@torch.no_grad()
def received(tower: Any, hidden_TLC: Tensor, block: int) -> Tensor:
    """Attention that each patch receives in a block, mean over heads and all queries (CLS too), [T, N] float32."""
    parts = []
    for some_TLC in hidden_TLC.split(_ROWS):
        q_THLE, k_THLE = queries(tower, some_TLC, block), _keys(tower, some_TLC, block)
        weights_THLL = (q_THLE.float() @ k_THLE.float().transpose(2, 3)).softmax(3)
        parts.append(weights_THLL.mean((1, 2))[:, 1:])
    return torch.cat(parts)


@torch.no_grad()
def from_cls(tower: Any, hidden_TLC: Tensor, block: int) -> Tensor:
    """Attention that CLS pays to each patch in a block, mean over heads, [T, N] float32: one row of each head."""
    q_TH1E, k_THLE = queries(tower, hidden_TLC[:, :1], block), _keys(tower, hidden_TLC, block)
    weights_TH1L = (q_TH1E.float() @ k_THLE.float().transpose(2, 3)).softmax(3)
    return weights_TH1L.mean((1, 2))[:, 1:]


@torch.no_grad()
def keys(tower: Any, hidden_TLC: Tensor, block: int) -> Tensor:
    """Keys of a block, mean over heads, without CLS, [T, N, E] float32."""
    return _keys(tower, hidden_TLC, block).float().mean(1)[:, 1:]
