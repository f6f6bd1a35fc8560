"""Qwen2.5-VL: images of any shape, attention in windows, and a merger that makes one token of 2 x 2 patches.

The tower works on patches in the order of its windows. A token of an image is one that leaves the merger, in rows and
columns of the image; what a block knows of it is the mean over its patches. The language model reads merged tokens as
they are, so values are these, and nothing is left to project. `hidden_states[layer]` counts blocks: 0 is what the first
one reads, 32 what the merger reads. There is no CLS.

Positions are M-RoPE's: frame, row and column of a token in its image, and for text three times the same number.

Letters: I images, G images of a group, P patches, M patches merged into a token, N tokens of an image, C tower width,
H heads, E width of a head, D width of the language model, B prompts, L columns of them, q new columns.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from ocvtp.errors import BadInput, Incompatible
from ocvtp.vlms.family import Family, Vision, check_mode
from ocvtp.vlms.images import Facts, Grid, Images

_NUMBERS = 1 << 26
"""Of attention in memory at the same time: 256 MiB."""


@dataclass(frozen=True)
class Pass:
    """What all blocks of one pass share.

    Attributes:
        order_N: number of the token, through all images, that each group of M patches makes.
        rotation: cosines and sines of the patches' positions, [P, E].
        images: first patch of each image, and P at the end.
        windows: of each window.
    """

    order_N: Tensor
    rotation: tuple[Tensor, Tensor]
    images: Tensor
    windows: Tensor

    @cached_property
    def back_N(self) -> Tensor:
        """The group that makes each token."""
        return self.order_N.argsort()


class Qwen25VLVision(Vision):
    """Hidden states of all patches in the order of windows, and what the merger made of the last."""

    def __init__(
        self, family: "Qwen25VLFamily", states: dict[int, Tensor], merged_ND: Tensor | None, shared: Pass,
        grids: list[Grid],
    ) -> None:  # fmt: skip
        self._family, self._states, self._merged_ND, self._pass = family, states, merged_ND, shared
        self.grids = grids
        self.counts = [rows * columns for rows, columns in grids]

    def _of(self, tokens_NX: Tensor, members: Sequence[int]) -> Tensor:
        """Of something with an entry a token of all images that of some, [G, N, ...]."""
        parts = tokens_NX.split(self.counts)
        return torch.stack([parts[member] for member in members])

    def _means(self, patches_PX: Tensor) -> Tensor:
        """Mean over the patches of each token."""
        groups_NMX: Tensor = patches_PX.unflatten(0, (len(self._pass.order_N), -1))
        return groups_NMX.mean(1)[self._pass.back_N]

    def tokens(self, layer: int, members: Sequence[int]) -> Tensor:
        """Mean over the patches of each token."""
        return self._of(self._means(self._states[layer]), members)

    def values(self, members: Sequence[int]) -> Tensor:
        """Merged tokens."""
        assert self._merged_ND is not None  # noqa: S101 - without values nobody asks for them
        return self._of(self._merged_ND, members)

    @torch.no_grad()
    def received(self, block: int, members: Sequence[int]) -> Tensor:
        """Mean over heads and all queries of the image, and over the patches of a token.

        In a block with windows, queries of other windows pay nothing.
        """
        layer = self._family.tower.blocks[block]
        q_PHE, k_PHE, _ = self._projected(layer, block)
        q_PHE, k_PHE = self._rotated(layer, q_PHE, k_PHE)
        found_P = torch.zeros(len(q_PHE), dtype=torch.float32, device=q_PHE.device)
        for member in members:
            first, last = self._pass.images[member : member + 2].tolist()
            for start, end in self._spans(block, first, last):
                found_P[start:end] = _received(q_PHE[start:end], k_PHE[start:end], layer.attn.scaling) / (last - first)
        return self._of(self._means(found_P), members)

    def _spans(self, block: int, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Patches of an image that see each other in a block."""
        if block in self._family.tower.fullatt_block_indexes:
            yield first, last
            return
        edges = self._pass.windows
        yield from pairwise(edges[(edges >= first) & (edges <= last)].tolist())

    def _projected(self, layer: Any, block: int) -> tuple[Tensor, ...]:
        """Queries, keys and values as the block's projection makes them, [P, H, E]."""
        made_PX = layer.attn.qkv(layer.norm1(self._states[block]))
        parts: tuple[Tensor, ...] = made_PX.unflatten(1, (3, layer.attn.num_heads, -1)).unbind(1)
        return parts

    def _rotated(self, layer: Any, q_PHE: Tensor, k_PHE: Tensor) -> tuple[Tensor, Tensor]:
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

        rotated: tuple[Tensor, Tensor] = apply_rotary_pos_emb_vision(q_PHE, k_PHE, *self._pass.rotation)
        return rotated

    def from_cls(self, block: int, members: Sequence[int]) -> Tensor:  # noqa: D102 - as in Vision
        raise Incompatible("the vision tower of Qwen2.5-VL has no CLS token: use the attention that tokens receive")

    @torch.no_grad()
    def keys(self, block: int, members: Sequence[int]) -> Tensor:
        """Before rotary positions; mean over heads and over the patches of a token."""
        _, k_PHE, _ = self._projected(self._family.tower.blocks[block], block)
        return self._of(self._means(k_PHE.float().mean(1)), members)

    def cls_values(self, members: Sequence[int]) -> Tensor:  # noqa: D102
        raise Incompatible("the vision tower of Qwen2.5-VL has no CLS token: leave it out")


class Qwen25VLFamily(Family):
    """`Qwen2_5_VLForConditionalGeneration`."""

    vision_inputs: ClassVar[frozenset[str]] = frozenset({"pixel_values", "image_grid_thw", "mm_token_type_ids"})
    position_inputs: ClassVar[frozenset[str]] = frozenset({"image_grid_thw", "mm_token_type_ids"})

    @classmethod
    def facts_of(cls, config: Any) -> Facts:  # noqa: D102 - as in Family
        vision = config.vision_config
        return Facts(
            tokens=None, grid=None, width=vision.hidden_size, depth=vision.depth, feature_layer=vision.depth, cls=False
        )

    @property
    def tower(self) -> Any:
        """The vision model."""
        return self.model.model.visual

    # --- Images ------------------------------------------------------------------------------------------------------

    def preprocess(self, processor: Any, images: list[Image.Image], *, mode: str) -> Images:
        """Images as the processor makes them. The tower takes any shape, so that there is no `mode` to choose."""
        check_mode(mode)
        made = processor.image_processor(images=[image.convert("RGB") for image in images], return_tensors="pt")
        return Images(made["pixel_values"], made["image_grid_thw"])

    def images(self, call: Mapping[str, Any]) -> Images | None:  # noqa: D102
        pixels, sizes = call.get("pixel_values"), call.get("image_grid_thw")
        if pixels is None:
            return None
        if sizes is None:
            raise BadInput("Qwen2.5-VL needs image_grid_thw beside pixel_values: use the processor of this model")
        patches = sizes.prod(1)
        if len(pixels) != int(patches.sum()):
            raise BadInput(
                f"image_grid_thw asks for {patches.tolist()} patches, but pixel_values has {len(pixels)}: use the "
                "processor of this model"
            )
        return Images(pixels, sizes)

    def pixels_of(self, images: Images, number: int) -> Tensor:  # noqa: D102
        parts: Sequence[Tensor] = images.pixels.split([patches for patches, _ in self._sizes(images)])
        return parts[number]

    def _sizes(self, images: Images) -> list[tuple[int, Grid]]:
        """Of each image the patches, and the grid of its tokens."""
        assert images.sizes is not None  # noqa: S101 - as `images` has made sure
        merge = self.tower.spatial_merge_size
        found = []
        for number, (frames, rows, columns) in enumerate(images.sizes.tolist()):
            if frames != 1:
                raise BadInput(f"image {number} has {frames} frames: images have one, and videos are not pruned")
            found.append((rows * columns, (rows // merge, columns // merge)))
        return found

    def counts(self, images: Images) -> list[int]:  # noqa: D102
        return [rows * columns for rows, columns in self.grids(images)]

    def grids(self, images: Images) -> list[Grid]:  # noqa: D102
        return [grid for _, grid in self._sizes(images)]

    def spans(self, images: Images) -> list[int]:  # noqa: D102
        return self.counts(images)

    # --- Vision ------------------------------------------------------------------------------------------------------

    def encode(self, images: Images, layers: Collection[int], *, values: bool = True) -> Qwen25VLVision:  # noqa: D102
        assert images.sizes is not None  # noqa: S101
        tower = self.tower
        deepest = self.facts.depth if values else max(layers)
        hidden_PC, shared = self._started(images.pixels, images.sizes)
        states = {0: hidden_PC} if 0 in layers else {}
        for done, block in enumerate(tower.blocks[:deepest], start=1):
            edges = shared.images if done - 1 in tower.fullatt_block_indexes else shared.windows
            hidden_PC = block(hidden_PC, cu_seqlens=edges, position_embeddings=shared.rotation)
            if done in layers:
                states[done] = hidden_PC
        merged_ND = tower.merger(hidden_PC)[shared.back_N] if values else None
        return Qwen25VLVision(self, states, merged_ND, shared, self.grids(images))

    def _started(self, pixels: Tensor, sizes: Tensor) -> tuple[Tensor, Pass]:
        """What the first block reads, `hidden_states[0]`, [P, C] in the order of windows."""
        from transformers import vision_utils

        tower = self.tower
        weight = tower.patch_embed.proj.weight
        sizes = sizes.to(weight.device)
        hidden_PC = tower.patch_embed(pixels.to(weight.device, weight.dtype))
        order_N, windows = vision_utils.get_vision_window_index(
            sizes, spatial_merge_size=tower.spatial_merge_size, window_size=tower.window_size,
            patch_size=tower.patch_size,
        )  # fmt: skip
        order_N = order_N.to(weight.device)

        def arranged(patches_PX: Tensor) -> Tensor:
            groups_NMX: Tensor = patches_PX.unflatten(0, (len(order_N), -1))
            return groups_NMX[order_N].flatten(0, 1)

        hidden_PC = arranged(hidden_PC)
        places_P2 = vision_utils.get_vision_position_ids(sizes, tower.spatial_merge_size)
        cos_PE, sin_PE = tower.rotary_pos_emb(hidden_PC, places_P2)
        images = vision_utils.get_vision_cu_seqlens(sizes)
        return hidden_PC, Pass(order_N, (arranged(cos_PE), arranged(sin_PE)), images, windows)

    def project(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Merged tokens are what the language model reads."""
        return list(values)

    # --- Prompts -----------------------------------------------------------------------------------------------------

    def positions(self, call: Mapping[str, Any], mask_BL: Tensor, past: int) -> Tensor:
        """As the model has them: M-RoPE's where mm_token_type_ids says what is an image, else columns counted."""
        given: Tensor | None = call.get("position_ids")
        if given is not None:  # two dimensions: of text; a fourth row: columns counted, for packed prompts
            rows_PBL = given[None] if given.ndim == 2 else given[-3:]
            return rows_PBL.expand(3, len(mask_BL), -1)
        columns_BL = torch.arange(mask_BL.shape[1], device=mask_BL.device).expand(len(mask_BL), -1)
        if past:
            return self.spread(call, columns_BL[:, past:], mask_BL[:, past:])
        found_3BL = self._places(call, mask_BL)
        return columns_BL.expand(3, -1, -1) if found_3BL is None else found_3BL

    def spread(self, call: Mapping[str, Any], positions_Bq: Tensor, mask_Bq: Tensor) -> Tensor:  # noqa: D102
        found_3Bq = self._places(call, mask_Bq)
        if found_3Bq is None:
            return positions_Bq.expand(3, -1, -1)
        first_B1 = mask_Bq.long().argmax(1, keepdim=True)
        return found_3Bq + positions_Bq.gather(1, first_B1) * mask_Bq

    def _places(self, call: Mapping[str, Any], mask_Bq: Tensor) -> Tensor | None:
        """M-RoPE's positions of new columns, [3, B, q], from 0 on; None where the model has no way to know them."""
        kinds, sizes = call.get("mm_token_type_ids"), call.get("image_grid_thw")
        if kinds is None or sizes is None:
            return None
        ids_Bq = call["input_ids"]
        found: Tensor = self.model.model.get_rope_index(
            ids_Bq, mm_token_type_ids=kinds[:, -ids_Bq.shape[1] :], image_grid_thw=sizes, attention_mask=mask_Bq
        )[0]
        return found

    def position_ids(self, positions_PBS: Tensor) -> Tensor:
        """Three rows, also where all of them are the same."""
        return positions_PBS.expand(3, -1, -1)


def _received(q_PHE: Tensor, k_PHE: Tensor, scaling: float) -> Tensor:
    """Attention that each of some patches receives from all of them, mean over heads, [P] float32."""
    k_HEP = k_PHE.float().permute(1, 2, 0)
    found_P = torch.zeros(len(k_PHE), dtype=torch.float32, device=k_PHE.device)
    rows = max(1, _NUMBERS // (k_PHE.shape[1] * len(k_PHE)))
    for some_RHE in q_PHE.split(rows):
        weights_HRP = (some_RHE.float().transpose(0, 1) @ k_HEP * scaling).softmax(2)
        found_P += weights_HRP.mean(0).sum(0)
    return found_P
