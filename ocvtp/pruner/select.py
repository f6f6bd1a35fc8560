"""Eq. 7-8: which tokens stay. Exactly as many as asked for, without a loop over tokens or waiting for the device.

Letters: B images, N tokens, K slots, k tokens a slot (top-k), S tokens to keep.
"""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from ocvtp.selection.proposals import propose, slot_mass
from ocvtp.selection.ranking import ranked

_ROUNDS: Final = 8
"""Proposals after which slots that still have no token of their own are filled for."""


@dataclass(frozen=True)
class Selection:
    """What was chosen.

    Attributes:
        indices_BS: kept tokens in ascending order; -1 at the end where an image keeps fewer (it has no more, or `fill`
            is `none`).
        counts_B: how many each image keeps.
        distinct_B: how many distinct tokens the slots picked, before any were dropped or filled in.
        picked_BN: True where a slot picked the token.
        attention_BKN: of the last iteration of slot attention; None where all tokens stay without it.
        picks_BKk: the tokens of each slot, N where it has none; None likewise.
    """

    indices_BS: Tensor
    counts_B: Tensor
    distinct_B: Tensor
    picked_BN: Tensor
    attention_BKN: Tensor | None = None
    picks_BKk: Tensor | None = None


def choose(
    attention_BKN: Tensor,
    keep_B1: Tensor,
    width: int,
    *,
    top_k: int = 1,
    assignment: str = "shared",
    fill: str = "slot_mass",
    fill_scores_BN: Tensor | None = None,
    surplus: str = "attention",
    mask_BN: Tensor | None = None,
    slot_mask_BK: Tensor | None = None,
    tokens_BNC: Tensor | None = None,
    given_BKk: Tensor | None = None,
    mass_power: float = 0.0,
) -> Selection:
    """The tokens that slots attend to most, brought to the number asked for.

    Args:
        attention_BKN: of the last iteration of slot attention, zero where there is no token or slot.
        keep_B1: tokens to keep of each image, at most as many as it has; [B, 1] or [1, 1].
        width: S, the largest of them.
        top_k: tokens that each slot picks.
        assignment: `shared`, `distinct`, `residual`, `gain` or `mass`.
        fill: `slot_mass`, `attention`, `next_best`, `random` or `none`.
        fill_scores_BN: scores for `attention` and `random`; the highest come first.
        surplus: `attention` or `hash`.
        mask_BN: True where there is a token.
        slot_mask_BK: True where there is a slot.
        tokens_BNC: what slots were gathered from; `residual`, `gain` and `mass` need it.
        given_BKk: picks of the slots, in place of those that `assignment` finds.
        mass_power: of `mass`.
    """
    batch, _, tokens = attention_BKN.shape
    scores_BKN = attention_BKN if mask_BN is None else attention_BKN.masked_fill(~mask_BN[:, None], -1.0)
    if slot_mask_BK is not None:
        scores_BKN = scores_BKN.masked_fill(~slot_mask_BK[:, :, None], -1.0)
    picks_BKk = given_BKk
    if picks_BKk is None:
        picks_BKk = picks(scores_BKN, assignment, top_k, mask_BN, slot_mask_BK, tokens_BNC, mass_power)
    if slot_mask_BK is not None:
        picks_BKk = picks_BKk.masked_fill(~slot_mask_BK[:, :, None], tokens)
    picks_BX = picks_BKk.flatten(1)
    # From 1 to 3, where a token that no slot picked has 0.
    weight_BX = scores_BKN.gather(2, picks_BKk.clamp(max=tokens - 1)).flatten(1) + 2
    # One column more, for what slots that do not exist pick.
    rank_BN = attention_BKN.new_zeros(batch, tokens + 1).scatter_reduce(1, picks_BX, weight_BX, "amax")[:, :tokens]
    if mask_BN is not None:  # slots that found no token left
        rank_BN = rank_BN.masked_fill(~mask_BN, 0.0)
    picked_BN = rank_BN > 0
    distinct_B = picked_BN.sum(1)
    if surplus == "hash":
        rank_BN = _hash_surplus(rank_BN, picks_BX, keep_B1)

    fill_BN = _fill(fill, scores_BKN, picks_BKk[:, :, 0], fill_scores_BN, slot_mask_BK)
    if mask_BN is not None:
        fill_BN = fill_BN.masked_fill(~mask_BN, -torch.inf)
    # First by fill, then by pick: picked tokens in front, the most attended first; ties by the lower index.
    order_BN = ranked(fill_BN, rank_BN)
    counts_B1 = keep_B1.expand(batch, 1)
    if fill == "none":  # but where nothing need go, all stay
        exist_B1 = tokens if mask_BN is None else mask_BN.sum(1, keepdim=True)
        counts_B1 = torch.where(counts_B1 < exist_B1, counts_B1.minimum(distinct_B[:, None]), counts_B1)
    chosen_BS = order_BN[:, :width]
    over_BS = torch.arange(chosen_BS.shape[1], device=chosen_BS.device) >= counts_B1
    indices_BS = chosen_BS.masked_fill(over_BS, tokens).sort(1).values
    kept_BS = indices_BS.masked_fill(over_BS, -1)
    return Selection(kept_BS, counts_B1[:, 0], distinct_B, picked_BN, attention_BKN, picks_BKk)


def picks(
    scores_BKN: Tensor,
    assignment: str,
    top_k: int = 1,
    mask_BN: Tensor | None = None,
    slot_mask_BK: Tensor | None = None,
    tokens_BNC: Tensor | None = None,
    mass_power: float = 0.0,
) -> Tensor:
    """The tokens of each slot, [B, K, k], from its attention, which is negative where there is no token or slot."""
    if assignment == "distinct":
        return _distinct(scores_BKN, top_k)
    if assignment == "shared":
        return _best(scores_BKN, top_k)
    assert tokens_BNC is not None  # noqa: S101 - as said above
    exists_BN = torch.ones_like(tokens_BNC[:, :, 0], dtype=torch.bool) if mask_BN is None else mask_BN
    slots_BK = torch.ones_like(scores_BKN[:, :, 0], dtype=torch.bool) if slot_mask_BK is None else slot_mask_BK
    wish_BXN = scores_BKN.repeat_interleave(top_k, 1)
    slots_BX = slots_BK.repeat_interleave(top_k, 1)
    picks_BX = propose(wish_BXN, tokens_BNC, exists_BN, slots_BX, assignment, mass_power)
    return picks_BX.view(len(picks_BX), -1, top_k)


def everything(batch: int, tokens: int, mask_BN: Tensor | None, device: torch.device) -> Selection:
    """The selection of images that have no more tokens than are to be kept."""
    exists_BN = torch.ones(batch, tokens, dtype=torch.bool, device=device) if mask_BN is None else mask_BN
    counts_B = exists_BN.sum(1)
    place_BN = torch.arange(tokens, device=device).expand(batch, -1)
    indices_BN = place_BN.masked_fill(~exists_BN, tokens).sort(1).values
    indices_BN = indices_BN.masked_fill(place_BN >= counts_B[:, None], -1)
    return Selection(indices_BN, counts_B, counts_B, exists_BN)


def _best(scores_BKN: Tensor, top_k: int) -> Tensor:
    """Eq. 7: each slot's most attended tokens, [B, K, k]; ties by the lower index."""
    if top_k == 1:
        return scores_BKN.argmax(2, keepdim=True)
    return scores_BKN.argsort(dim=2, descending=True, stable=True)[:, :, :top_k]


def _distinct(scores_BKN: Tensor, top_k: int) -> Tensor:
    """Each slot its best tokens among those that no slot with more attention to them takes, [B, K, k].

    Deferred acceptance: all slots without a token propose at once to the best that has not refused them, and a token
    holds on to the proposal with the most attention. A fixed number of rounds, each over all images and slots; a slot
    that wants several tokens proposes as several. Where rounds run out, two slots share a token.
    """
    wish_BXN = scores_BKN.repeat_interleave(top_k, 1)
    slots = torch.arange(wish_BXN.shape[1], device=wish_BXN.device).expand(wish_BXN.shape[:2])
    nobody_BN = torch.full_like(wish_BXN[:, 0], slots.shape[1], dtype=torch.long)
    for _ in range(_ROUNDS + top_k - 1):
        best_BX, pick_BX = wish_BXN.max(2)
        held_BN = torch.full_like(wish_BXN[:, 0], -torch.inf).scatter_reduce(1, pick_BX, best_BX, "amax")
        first_BX = slots.masked_fill(best_BX < held_BN.gather(1, pick_BX), slots.shape[1])
        owner_BN = nobody_BN.scatter_reduce(1, pick_BX, first_BX, "amin")
        refused_BX1 = (owner_BN.gather(1, pick_BX) != slots)[:, :, None]
        taken_BX1 = wish_BXN.gather(2, pick_BX[:, :, None])
        wish_BXN = wish_BXN.scatter(2, pick_BX[:, :, None], torch.where(refused_BX1, -2.0, taken_BX1))
    return wish_BXN.argmax(2).view(len(wish_BXN), -1, top_k)


def _fill(
    fill: str, scores_BKN: Tensor, picks_BK: Tensor, fill_scores_BN: Tensor | None, slot_mask_BK: Tensor | None
) -> Tensor:
    """Scores [B, N]: which tokens make up the number."""
    if fill_scores_BN is not None:
        return fill_scores_BN
    if fill == "next_best":
        return _next_best(scores_BKN, picks_BK, slot_mask_BK)
    return slot_mass(scores_BKN)


def _next_best(scores_BKN: Tensor, picks_BK: Tensor, slot_mask_BK: Tensor | None) -> Tensor:
    """The tokens next on the lists of slots that lost their pick to another, by place on the list, then attention.

    Slots that kept their pick come after those.
    """
    batch, slots, tokens = scores_BKN.shape
    missing_BK1 = (picks_BK >= tokens)[:, :, None]
    safe_BK = picks_BK.clamp(max=tokens - 1)
    place_BKN = scores_BKN.argsort(dim=2, descending=True, stable=True).argsort(2)
    mine_BK = scores_BKN.gather(2, safe_BK[:, :, None])[:, :, 0].masked_fill(missing_BK1[:, :, 0], -torch.inf)
    most_BN = torch.full_like(scores_BKN[:, 0], -torch.inf).scatter_reduce(1, safe_BK, mine_BK, "amax")
    number_BK = torch.arange(slots, device=safe_BK.device).expand(batch, -1)
    first_BK = number_BK.masked_fill(mine_BK < most_BN.gather(1, safe_BK), slots)
    owner_BN = torch.full_like(most_BN, slots, dtype=torch.long).scatter_reduce(1, safe_BK, first_BK, "amin")
    kept_BK1 = (owner_BN.gather(1, safe_BK) == number_BK)[:, :, None]
    late_BKN = place_BKN + tokens * kept_BK1
    if slot_mask_BK is not None:
        late_BKN = late_BKN.masked_fill(~slot_mask_BK[:, :, None], 2 * tokens)
    return (0.5 * scores_BKN - late_BKN).amax(1)


def _hash_surplus(rank_BN: Tensor, picks_BX: Tensor, keep_B1: Tensor) -> Tensor:
    """Drop picks that are too many as the authors' code does: by the order of a Python set of them and CLS.

    It makes a set of the picks, counted from 1, slot by slot, adds 0 for CLS, and cuts the list of it off. Waits for
    the device.
    """
    tokens = rank_BN.shape[1]
    keeps = keep_B1.expand(len(rank_BN), 1)[:, 0].tolist()
    for image, (keep, picks) in enumerate(zip(keeps, picks_BX.tolist(), strict=True)):
        unique = {pick + 1 for pick in picks if pick < tokens}
        unique.add(0)
        cut = [place - 1 for place in list(unique)[keep + 1 :] if place]
        if cut:
            rank_BN[image, cut] = 0.0
    return rank_BN
