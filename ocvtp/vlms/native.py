"""What the Qwen-VL families share: images of any shape, and a merger that makes one token of 2 x 2 patches.

A token of an image is one that leaves the merger, in rows and columns of the image; what a block knows of it is the
mean over its patches. The language model reads merged tokens as they are, so values are these, and nothing is left to
project. `hidden_states[layer]` counts blocks: 0 is what the first one reads. There is no CLS.

Positions are M-RoPE's: frame, row and column of a token in its image, and for text three times the same number.

Letters: I images, G images of a group, P patches, M patches merged into a token, N tokens of an image, C tower width,
H heads, E width of a head, B prompts, L columns of them, q new columns.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from ocvtp.errors import BadInput
from ocvtp.vlms.family import Early, Family, Vision
from ocvtp.vlms.images import Facts, Grid, Images
from ocvtp.vlms.tower import Ready, device_of, recorded

_IMAGES, _VIDEOS = ("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw")
_NUMBERS = 1 << 26
"""Of attention in memory at the same time: 256 MiB."""


class NativeVision(Vision):
    """Hidden states of all patches as the tower orders them, and what the mergers made."""

    def __init__(
        self, family: "NativeFamily", states: dict[int, Tensor], merged_NV: Tensor | None, order_N: Tensor,
        rotation: tuple[Tensor, Tensor], edges: Mapping[int, Tensor], grids: list[Grid],
    ) -> None:  # fmt: skip
        """A pass of the tower.

        Args:
            family: of the model.
            states: hidden states [P, C] by layer.
            merged_NV: values of the tokens of all images; None if nobody asks for them.
            order_N: number of the token, through all images, that each group of M patches makes.
            rotation: cosines and sines of the patches' positions, [P, E].
            edges: for each block that was recorded, where runs of patches that see each other begin and end.
            grids: of the tokens of each image.
        """
        self._family, self._states, self._merged_NV = family, states, merged_NV
        self._back_N, self._rotation, self._edges = order_N.argsort(), rotation, edges
        self.grids = grids
        self.counts = [rows * columns for rows, columns in grids]

    def _of(self, tokens_NX: Tensor, members: Sequence[int]) -> Tensor:
        """Of something with an entry a token of all images that of some, [G, N, ...]."""
        parts = tokens_NX.split(self.counts)
        return torch.stack([parts[member] for member in members])

    def _means(self, patches_PX: Tensor) -> Tensor:
        """Mean over the patches of each token."""
        groups_NMX: Tensor = patches_PX.unflatten(0, (len(self._back_N), -1))
        return groups_NMX.mean(1)[self._back_N]

    def tokens(self, layer: int, members: Sequence[int]) -> Tensor:
        """Mean over the patches of each token."""
        return self._of(self._means(self._states[layer]), members)

    def values(self, members: Sequence[int]) -> Tensor:
        """Merged tokens."""
        assert self._merged_NV is not None  # noqa: S101 - without values nobody asks for them
        return self._of(self._merged_NV, members)

    @torch.no_grad()
    def received(self, block: int, members: Sequence[int]) -> Tensor:
        """Mean over heads and all queries of the image, and over the patches of a token.

        In a block with windows, queries of other windows pay nothing.
        """
        layer = self._family.tower.blocks[block]
        q_PHE, k_PHE, _ = self._projected(layer, block)
        q_PHE, k_PHE = self._family.rotated(q_PHE, k_PHE, *self._rotation)
        found_P = torch.zeros(len(q_PHE), dtype=torch.float32, device=q_PHE.device)
        patches = len(q_PHE) // len(self._back_N)
        ends = torch.tensor(self.counts).cumsum(0).mul(patches).tolist()
        for member in members:
            first, last = ends[member] - patches * self.counts[member], ends[member]
            for start, end in self._spans(block, first, last):
                found_P[start:end] = _received(q_PHE[start:end], k_PHE[start:end], layer.attn.scaling) / (last - first)
        return self._of(self._means(found_P), members)

    def _spans(self, block: int, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Patches of an image that see each other in a block."""
        edges = self._edges[block]
        yield from pairwise(edges[(edges >= first) & (edges <= last)].tolist())

    def _projected(self, layer: Any, block: int) -> tuple[Tensor, ...]:
        """Queries, keys and values as the block's projection makes them, [P, H, E]."""
        made_PX = layer.attn.qkv(layer.norm1(self._states[block]))
        parts: tuple[Tensor, ...] = made_PX.unflatten(1, (3, layer.attn.num_heads, -1)).unbind(1)
        return parts

    @torch.no_grad()
    def keys(self, block: int, members: Sequence[int]) -> Tensor:
        """Before rotary positions; mean over heads and over the patches of a token."""
        _, k_PHE, _ = self._projected(self._family.tower.blocks[block], block)
        return self._of(self._means(k_PHE.float().mean(1)), members)


class NativeFamily(Family):
    """A Qwen-VL."""

    vision_inputs: ClassVar[frozenset[str]] = frozenset(
        {"pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw", "second_per_grid_ts"}
    )
    position_inputs: ClassVar[frozenset[str]] = frozenset({"image_grid_thw", "video_grid_thw", "second_per_grid_ts"})
    column_inputs: ClassVar[Mapping[str, int]] = {"mm_token_type_ids": 0}

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

    @property
    def projectors(self) -> list[Any]:
        """The mergers, which lie in the tower: the last one, and DeepStack's."""
        return [self.tower.merger, *getattr(self.tower, "deepstack_merger_list", ())]

    def rotated(self, q_PHE: Tensor, k_PHE: Tensor, cos_PE: Tensor, sin_PE: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys at their positions, by the function that stands beside the tower's attention."""
        import inspect

        module: Any = inspect.getmodule(type(self.tower.blocks[0].attn))
        rotated: tuple[Tensor, Tensor] = module.apply_rotary_pos_emb_vision(q_PHE, k_PHE, cos_PE, sin_PE)
        return rotated

    # --- Images ------------------------------------------------------------------------------------------------------

    @property
    def pixel_shape(self) -> tuple[int | None, ...]:
        """Any number of patches."""
        vision = self.model.config.vision_config
        return None, vision.in_channels * vision.temporal_patch_size * vision.patch_size**2

    def images(self, call: Mapping[str, Any]) -> Images | None:
        """Images, and behind them the frames of videos, which the tower sees one by one."""
        found = [self._given(call, *names) for names in (_IMAGES, _VIDEOS)]
        if found == [None, None]:
            return None
        (pixels, sizes), (moving, frames) = (each or (None, None) for each in found)
        if sizes is not None and int(sizes[:, 0].max()) != 1:
            raise BadInput(f"image_grid_thw has images of {sizes[:, 0].tolist()} frames: those of a video are needed")
        videos = () if frames is None else tuple(frames[:, 0].tolist())
        if 0 in videos:
            raise BadInput(f"video_grid_thw has videos of {list(videos)} frames: one at least is needed")
        if frames is not None:
            frames = frames.repeat_interleave(frames[:, 0], 0)
            frames[:, 0] = 1
        seconds = call.get("second_per_grid_ts")
        return Images(
            torch.cat([each for each in (pixels, moving) if each is not None]),
            torch.cat([each for each in (sizes, frames) if each is not None]),
            videos,
            None if seconds is None else tuple(torch.as_tensor(seconds).tolist()),
        )

    def _given(self, call: Mapping[str, Any], pixels_name: str, sizes_name: str) -> tuple[Tensor, Tensor] | None:
        pixels, sizes = call.get(pixels_name), call.get(sizes_name)
        if pixels is None:
            return None
        if sizes is None:
            raise BadInput(f"this model needs {sizes_name} beside {pixels_name}: use its processor")
        merge = self.model.config.vision_config.spatial_merge_size
        for frames, rows, columns in sizes.tolist():
            if not (rows and columns) or rows % merge or columns % merge:
                raise BadInput(
                    f"{sizes_name} has {frames} x {rows} x {columns} patches: a token is made of {merge} x {merge}, so "
                    f"rows and columns are multiples of {merge}, at least {merge}"
                )
        patches = sizes.prod(1)
        if len(pixels) != int(patches.sum()):
            raise BadInput(
                f"{sizes_name} asks for {patches.tolist()} patches, but {pixels_name} has {len(pixels)}: use the "
                "processor of this model"
            )
        return pixels, sizes

    def pixels_of(self, images: Images, number: int) -> Tensor:  # noqa: D102
        parts: Sequence[Tensor] = images.pixels.split([patches for patches, _ in self._sizes(images)])
        return parts[number]

    def _sizes(self, images: Images) -> list[tuple[int, Grid]]:
        """Of each image the patches, and the grid of its tokens."""
        assert images.sizes is not None  # noqa: S101 - as `images` has made sure
        merge = self.model.config.vision_config.spatial_merge_size
        return [(rows * columns, (rows // merge, columns // merge)) for _, rows, columns in images.sizes.tolist()]

    def counts(self, images: Images) -> list[int]:  # noqa: D102
        return [rows * columns for rows, columns in self.grids(images)]

    def grids(self, images: Images) -> list[Grid]:  # noqa: D102
        return [grid for _, grid in self._sizes(images)]

    # --- Vision ------------------------------------------------------------------------------------------------------

    def encode(  # noqa: D102
        self, images: Images, layers: Collection[int], *, values: bool = True, ready: Early | None = None
    ) -> NativeVision:
        assert images.sizes is not None  # noqa: S101
        tower = self.tower
        device = device_of(tower, images.pixels.device)
        pixels, sizes = images.pixels.to(device), images.sizes.to(device)
        rotation, edges = list[tuple[Tensor, Tensor]](), dict[int, Tensor]()

        def note(block: int, kwargs: dict[str, Any]) -> None:
            edges[block] = kwargs["cu_seqlens"]
            rotation[:] = [kwargs["position_embeddings"]]

        order_N, grids = self.order(sizes).to(device), self.grids(images)

        def seen(states: dict[int, Tensor], merged_NV: Tensor | None = None) -> NativeVision:
            return NativeVision(self, states, merged_NV, order_N, rotation[0], edges, grids)

        states, output = recorded(
            tower.blocks, layers, lambda: tower(pixels, grid_thw=sizes, return_dict=True), whole=values, note=note,
            ready=None if ready is None else Ready(max(layers), lambda states: ready(seen(states))),
        )  # fmt: skip
        return seen(states, self.merged(output) if values else None)

    def order(self, sizes: Tensor) -> Tensor:
        """Number of the token, through all images, that each group of M patches makes, [N]. Here: as they come."""
        return torch.arange(int(sizes.prod(1).sum()) // self.tower.spatial_merge_size**2)

    def merged(self, output: Any) -> Tensor:
        """Values of the tokens of all images, [N, V], from what the tower returned."""
        merged_ND: Tensor = output.pooler_output
        return merged_ND

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
        kinds = call.get("mm_token_type_ids")
        sizes = {name: call[name] for name in self.position_inputs if call.get(name) is not None}
        if kinds is None or not sizes:
            return None
        ids_Bq = call["input_ids"]
        found: Tensor = self.model.model.get_rope_index(
            ids_Bq, mm_token_type_ids=kinds[:, -ids_Bq.shape[1] :], attention_mask=mask_Bq, **sizes
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
