"""ToMe: tokens that are alike are merged in every block of the CLIP tower, until k are left.

In each block, between attention and MLP, with the block's keys (mean over heads) as what is compared:

1. tokens are split in turns, the even places against the odd; CLS, at place 0, takes no part;
2. each even one finds the odd one that is most like it by cosine, the r most alike pairs are merged, by a mean weighted
   by how many patches are in each already;
3. what goes on is the even ones that are left, then the odd ones.

Attention is proportional: a token of n patches counts as n (log n is added to its logits). Here attention is always
PyTorch's SDPA, with that as its mask.

The authors give no schedule for VLMs. Here the blocks up to that whose output the LLM is fed from (23 of 24) share what
has to go evenly, the first ones take one more where it does not come out even: 16 x 17 + 7 x 16 for 192 of 576. A block
can merge half of its tokens at most; what the last ones cannot, the earlier ones do.

A token is listed by the patch that others were merged into, the odd one of each pair.

Where this differs from the authors' code (`behaviour="reference"`): `order="merged"` hands tokens on in the order in
which the last block left them; by default they stand where their numbers say.

LLaVA-NeXT: each tile is merged by itself and keeps an even share of k. Qwen2.5-VL attends in windows, which merging
would tear apart: there is no ToMe for it.

Letters: T images or tiles, L positions (CLS first), C tower width, H heads, E width of a head, A even and B odd places,
r merged pairs, n tokens that are left, G images of a group, V = C.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import one_hot, scaled_dot_product_attention

from ocvtp.errors import BadInput, Incompatible
from ocvtp.methods.base import Encoded, Entry, Kept, Method, behave, no_pruner, one_of
from ocvtp.methods.tiles import share_evenly
from ocvtp.selection.cosines import unit
from ocvtp.selection.ranking import ranked
from ocvtp.vlms.family import Family, Vision, take
from ocvtp.vlms.images import Images
from ocvtp.vlms.tiled import ProjectedLate
from ocvtp.vlms.tower import Tower

_REFERENCE = {"order": ("raster", "merged")}


def schedule(patches: int, keep: int, blocks: int) -> list[int]:
    """How many pairs each block merges, so that `keep` patches are left.

    Raises:
        BadInput: not so few can be reached.
    """
    merges, left, gone = list[int](), keep, patches - keep
    for remaining in range(blocks, 0, -1):  # from the last block, which can merge as many pairs as it leaves tokens
        merges.append(min(gone // remaining, left))
        gone, left = gone - merges[-1], left + merges[-1]
    if gone:
        least = -(-patches // 2**blocks)
        raise BadInput(f"tome cannot merge {patches} tokens into {keep} in {blocks} blocks: at least {least} are left")
    return merges[::-1]


def merge(tokens_TLC: Tensor, sizes_TL: Tensor, seeds_TL: Tensor, keys_TLE: Tensor, pairs: int) -> tuple[Tensor, ...]:
    """Merge the most alike pairs; tokens, sizes and seeds of what is left."""
    keys_TLE = unit(keys_TLE)
    likeness_TAB = keys_TLE[:, ::2] @ keys_TLE[:, 1::2].transpose(1, 2)
    likeness_TAB[:, 0] = -torch.inf
    best_TA, partner_TA = likeness_TAB.max(2)
    order_TA = ranked(best_TA)
    goes_Tr, stays_TX = order_TA[:, :pairs], order_TA[:, pairs:].sort(1).values
    into_TBr = one_hot(partner_TA.gather(1, goes_Tr), likeness_TAB.shape[2]).transpose(1, 2).float()
    even_TAC, odd_TBC = tokens_TLC[:, ::2], tokens_TLC[:, 1::2].float()
    even_TA, odd_TB = sizes_TL[:, ::2], sizes_TL[:, 1::2]
    heavy_Tr1 = even_TA.gather(1, goes_Tr)[..., None]
    grown_TB = odd_TB + (into_TBr @ heavy_Tr1)[..., 0]
    # A product adds in the same order each time, which scattered additions on a GPU do not.
    sums_TBC = odd_TBC * odd_TB[..., None] + into_TBr @ (_rows(even_TAC, goes_Tr).float() * heavy_Tr1)
    merged_TBC = (sums_TBC / grown_TB[..., None]).to(tokens_TLC.dtype)
    return (
        torch.cat([_rows(even_TAC, stays_TX), merged_TBC], 1),
        torch.cat([even_TA.gather(1, stays_TX), grown_TB], 1),
        torch.cat([seeds_TL[:, ::2].gather(1, stays_TX), seeds_TL[:, 1::2]], 1),
    )


def run(tower: Tower, pixels: Tensor, merges: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Pass tiles through the first blocks of the tower, and merge that many pairs in each.

    Returns:
        Tokens [T, n, C] without CLS, how many patches each stands for [T, n], and the patch it is listed by [T, n].
    """
    tokens_TLC = tower.states(pixels, {0})[0]
    sizes_TL = torch.ones(tokens_TLC.shape[:2], device=tokens_TLC.device)
    seeds_TL = torch.arange(-1, tokens_TLC.shape[1] - 1, device=tokens_TLC.device).repeat(len(tokens_TLC), 1)
    merged = False
    for block, pairs in zip(tower.blocks[: len(merges)], merges, strict=True):
        if not merged and not pairs:
            tokens_TLC = block(tokens_TLC, None)
            continue
        attended_TLC, keys_TLE = _attention(block, tokens_TLC, sizes_TL if merged else None)
        tokens_TLC = tokens_TLC + attended_TLC
        if pairs:
            tokens_TLC, sizes_TL, seeds_TL = merge(tokens_TLC, sizes_TL, seeds_TL, keys_TLE, pairs)
            merged = True
        tokens_TLC = tokens_TLC + block.mlp(block.layer_norm2(tokens_TLC))
    return tokens_TLC[:, 1:], sizes_TL[:, 1:], seeds_TL[:, 1:]


def _attention(block: Any, tokens_TLC: Tensor, sizes_TL: Tensor | None) -> tuple[Tensor, Tensor]:
    """Proportional attention of a block, [T, L, C], and its keys, [T, L, E]."""
    attention, normed_TLC = block.self_attn, block.layer_norm1(tokens_TLC)
    shape = (*normed_TLC.shape[:2], -1, attention.head_dim)
    q_THLE, k_THLE, v_THLE = (
        project(normed_TLC).view(shape).transpose(1, 2)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    bias = None if sizes_TL is None else sizes_TL.log()[:, None, None].to(q_THLE.dtype)
    mixed_THLE = scaled_dot_product_attention(q_THLE, k_THLE, v_THLE, attn_mask=bias, scale=attention.head_dim**-0.5)
    return attention.out_proj(mixed_THLE.transpose(1, 2).flatten(2)), k_THLE.mean(1)


class Merged(Vision):
    """What is left of each image."""

    def __init__(self, family: Family, images: Images, kept: list[tuple[Tensor, Tensor]]) -> None:
        """`kept` has numbers [k] and values [k, V] of each image, in the order in which the last block left them."""
        self.counts, self.grids = family.counts(images), family.grids(images)
        self.kept = kept

    def tokens(self, layer: int, members: Sequence[int]) -> Tensor:  # noqa: D102 - as in Vision
        raise _gone("hidden states")

    def values(self, members: Sequence[int]) -> Tensor:  # noqa: D102
        raise _gone("values")

    def received(self, block: int, members: Sequence[int]) -> Tensor:  # noqa: D102
        raise _gone("attention")

    def from_cls(self, block: int, members: Sequence[int]) -> Tensor:  # noqa: D102
        raise _gone("attention")

    def keys(self, block: int, members: Sequence[int]) -> Tensor:  # noqa: D102
        raise _gone("keys")

    def cls_values(self, members: Sequence[int]) -> Tensor:  # noqa: D102
        raise _gone("CLS rows")


def _gone(what: str) -> Incompatible:
    return Incompatible(f"there are no {what} of single tokens after ToMe: it merges them inside the tower")


class ToMe(Method):
    """Merging in every block of the tower."""

    def __init__(self, blocks: int, order: str) -> None:
        self._blocks, self._order = blocks, order

    def encode(self, family: Family, images: Images, keeps: Sequence[int]) -> Merged:  # noqa: D102 - as in Method
        tiled = cast(ProjectedLate, family)  # as _build has seen
        numbers = tiled.numbers(images)
        patches, pixels_T3HW = numbers[0].shape[1], torch.cat(tiled.tiles(images))
        shares = [share_evenly(keep, [patches] * len(rows)) for keep, rows in zip(keeps, numbers, strict=True)]
        flat = [share for row in shares for share in row]
        left: list[tuple[Tensor, Tensor]] = [(torch.empty(0), torch.empty(0))] * len(flat)
        for share in sorted(set(flat) - {0}):
            those = [tile for tile, each in enumerate(flat) if each == share]
            merges = schedule(patches, share, self._blocks)
            tokens_TnC, _, seeds_Tn = run(tiled.eye, take(pixels_T3HW, those), merges)
            for tile, *rest in zip(those, seeds_Tn, tokens_TnC, strict=True):
                left[tile] = (rest[0], rest[1])
        kept, rows_left = [], iter(left)
        for row, numbers_tp in zip(shares, numbers, strict=True):
            found = [(numbers_p, *next(rows_left)) for numbers_p, _ in zip(numbers_tp, row, strict=True)]
            found = [each for each, share in zip(found, row, strict=True) if share]
            those_n = [numbers_p.to(seeds_n.device)[seeds_n] for numbers_p, seeds_n, _ in found]
            kept.append((torch.cat(those_n), torch.cat([tokens_nC for _, _, tokens_nC in found])))
        return Merged(family, images, kept)

    def choose(self, encoded: Encoded) -> Kept:  # noqa: D102
        assert isinstance(encoded.vision, Merged)  # noqa: S101 - it comes from `encode`
        rows = [encoded.vision.kept[member] for member in encoded.members]
        values_GkV = torch.stack([values_kV for _, values_kV in rows])
        indices_Gk, order_Gk = torch.stack([numbers_k for numbers_k, _ in rows]).sort(1)
        return Kept(indices_Gk, values_GkV if self._order == "merged" else _rows(values_GkV, order_Gk))


def _rows(table_GNX: Tensor, numbers_Gn: Tensor) -> Tensor:
    return table_GNX.gather(1, numbers_Gn[..., None].expand(-1, -1, table_GNX.shape[2]))


def _build(family: Family, pruner: Any, options: Mapping[str, Any]) -> Method:
    no_pruner("tome", pruner)
    options = behave("tome", options, _REFERENCE)
    one_of("tome", options, "order", _REFERENCE["order"])
    if not isinstance(family, ProjectedLate) or not family.facts.cls:
        raise Incompatible(
            "tome merges tokens inside a CLIP tower, where all attend to all: the tower of this VLM is another, such "
            "as Qwen2.5-VL's, which attends in windows"
        )
    return ToMe(family.facts.feature_layer, options["order"])


ENTRY = Entry(
    name="tome",
    acts="before the LLM",
    needs_text=False,
    source="ToMe, arXiv 2210.09461",
    random=False,
    trained=False,
    options={"behaviour": "default", "order": None},
    build=_build,
    needs=frozenset({"clip tower"}),
)
