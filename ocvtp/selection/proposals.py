"""Slots propose, a rule decides: a greedy choice in which each pick belongs to a slot that has attention for it.

Letters: B images, N tokens, C token width, K slots.
"""

from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import Tensor

from ocvtp.selection.css import begin as begin_css
from ocvtp.selection.greedy import TIE, Step
from ocvtp.selection.qr import begin as begin_qr

RULES: Final[Mapping[str, Callable[[Tensor, Tensor, int], tuple[Tensor, Step]]]] = {
    "residual": begin_qr,
    "gain": begin_css,
    "mass": begin_css,
}
"""What decides: the squared length of what the picks so far leave of a token, as in pivoted QR; or by how much it
lowers the squared residual of all tokens, as in greedy column subset selection."""


def slot_mass(attention: Tensor) -> Tensor:
    """How much of what the slots take in comes from each token, [B, N].

    That is how often the token is drawn where each slot draws one, by its attention as a distribution over tokens.

    Args:
        attention: [B, K, N]; what is not above 0 is none.
    """
    share_BKN = attention.clamp(min=0)
    return (share_BKN / share_BKN.sum(2, keepdim=True).clamp(min=1e-12)).sum(1)


def _wishes(attention_BKN: Tensor, rule: str, mass_power: float) -> Tensor:
    """How much each slot wants each token, at most 1, [B, K, N]. Under `mass` all slots want the same."""
    tiny = torch.finfo(torch.float32).tiny
    if rule == "mass":
        wish_BN = slot_mass(attention_BKN.float()).clamp(min=tiny) ** mass_power
        wish_BKN = wish_BN[:, None].expand_as(attention_BKN).clamp(min=tiny)
    else:
        wish_BKN = attention_BKN.float().clamp(min=tiny)
    return wish_BKN / wish_BKN.amax(2, keepdim=True)


@torch.no_grad()
def _begin(rule: str, tokens_BNC: Tensor, exists_BN: Tensor, slots: int) -> tuple[Tensor, Step]:
    """What the rule says of each token before a pick, [B, N], and how that changes with one."""
    return RULES[rule](tokens_BNC.detach().float().masked_fill(~exists_BN[:, :, None], 0), exists_BN, slots)


def _wishes_for(pick_B: Tensor, wish_BKN: Tensor, slot_free_BK: Tensor) -> Tensor:
    """How much each slot wants the token that was picked, [B, K]; -1 of slots that have one."""
    at_BK1 = pick_B[:, None, None].expand(-1, wish_BKN.shape[1], -1)
    return wish_BKN.detach().gather(2, at_BK1)[:, :, 0].masked_fill(~slot_free_BK, -1)


@torch.no_grad()
def propose(
    attention_BKN: Tensor,
    tokens_BNC: Tensor,
    exists_BN: Tensor,
    slot_exists_BK: Tensor,
    rule: str = "residual",
    mass_power: float = 0.0,
) -> Tensor:
    """The token of each slot, [B, K]; no two slots have the same, as long as there are tokens. N where there is none.

    K times, of all pairs of a slot and a token that are still free, the one with the largest product of (1) the slot's
    attention for the token, relative to its largest, and (2) what the rule says of the token. Where attention is even
    this is the choice that the rule is named after, and where it is sharp each slot has its own favourite. Of equals
    the token with the lower index, then the slot. With the rule `mass` (1) is the same for all slots: `slot_mass`
    to the power `mass_power`.
    """
    batch, slots, count = attention_BKN.shape
    device = attention_BKN.device
    place_N, number_K = torch.arange(count, device=device), torch.arange(slots, device=device)
    with torch.autocast(device.type, enabled=False):
        wish_BKN = _wishes(attention_BKN, rule, mass_power)
        left_BN, step = _begin(rule, tokens_BNC, exists_BN, slots)
        token_free_BN, slot_free_BK = exists_BN.clone(), slot_exists_BK.clone()
        picks_BK = torch.full((batch, slots), count, device=device)
        for _ in range(slots):
            most_BN = wish_BKN.masked_fill(~slot_free_BK[:, :, None], 0).amax(1)
            score_BN = (most_BN * left_BN).masked_fill(~token_free_BN, -1)
            best_B1 = score_BN.amax(1, keepdim=True)
            pick_B = torch.where(score_BN >= best_B1 * (1 - TIE), place_N, count).amin(1)
            safe_B1 = pick_B.clamp(max=count - 1)[:, None]
            mine_BK = _wishes_for(safe_B1[:, 0], wish_BKN, slot_free_BK)
            slot_B = torch.where(mine_BK >= mine_BK.amax(1, keepdim=True) * (1 - TIE), number_K, slots).amin(1)
            # An image without free tokens or slots: nothing changes.
            done_B1 = ((pick_B == count) | (slot_B == slots))[:, None]
            slot_B1 = slot_B.clamp(max=slots - 1)[:, None]
            picks_BK = picks_BK.scatter(1, slot_B1, torch.where(done_B1, picks_BK.gather(1, slot_B1), safe_B1))
            token_free_BN = token_free_BN.scatter(1, safe_B1, done_B1 & token_free_BN.gather(1, safe_B1))
            slot_free_BK = slot_free_BK.scatter(1, slot_B1, done_B1 & slot_free_BK.gather(1, slot_B1))
            left_BN = step(safe_B1[:, 0], (best_B1 > 0)[:, 0])
    return picks_BK


def sample(
    attention_BKN: Tensor,
    tokens_BNC: Tensor,
    exists_BN: Tensor,
    noise_BKN: Tensor,
    assignment: str = "residual",
    temperature: float = 1.0,
    mass_power: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Picks [B, K] drawn around those of `propose`, and the logarithm of their probability, [B], with gradients.

    A pick has the probability of the softmax over free tokens of log(score) / temperature. At a temperature near 0 they
    are those of `propose`.

    Args:
        attention_BKN: of slots that all exist.
        tokens_BNC: what they were gathered from; no gradient flows into them.
        exists_BN: True where there is a token.
        noise_BKN: standard Gumbel: what is drawn is a function of it.
        assignment: a rule; `distinct` without one: slots in their order, none with a token of an earlier one; or
            `shared`, where slots pick on their own.
        temperature: above 0.
        mass_power: of the rule `mass`.

    Returns:
        Picks, N where an image has no token left, and the logarithm of the probability of each image's.
    """
    batch, slots, count = attention_BKN.shape
    device, tiny = attention_BKN.device, torch.finfo(torch.float32).tiny
    with torch.autocast(device.type, enabled=False):
        wish_BKN = _wishes(attention_BKN, assignment, mass_power)
        free_BN, slot_free_BK = exists_BN.clone(), torch.ones(batch, slots, dtype=torch.bool, device=device)
        left_BN, step = None, None
        if assignment in RULES:
            left_BN, step = _begin(assignment, tokens_BNC, exists_BN, slots)
        picks_BK = torch.full((batch, slots), count, device=device)
        logarithm_B = wish_BKN.new_zeros(batch)
        for number in range(slots):
            most_BN = wish_BKN[:, number]
            if left_BN is not None:
                most_BN = wish_BKN.masked_fill(~slot_free_BK[:, :, None], tiny).amax(1) * left_BN.clamp(min=tiny)
            logits_BN = most_BN.clamp(min=tiny).log() / temperature
            there_B = free_BN.any(1)
            share_BN = logits_BN.masked_fill(~free_BN & there_B[:, None], -torch.inf).log_softmax(1)
            pick_B = (share_BN.detach() + noise_BKN[:, number]).argmax(1)
            logarithm_B = logarithm_B + torch.where(there_B, share_BN.gather(1, pick_B[:, None])[:, 0], 0)
            slot_B1 = torch.full((batch, 1), number, device=device)
            if step is not None:
                slot_B1 = _wishes_for(pick_B, wish_BKN, slot_free_BK).argmax(1, keepdim=True)
                assert left_BN is not None  # noqa: S101 - of the same rule
                counts_B = there_B & (left_BN.gather(1, pick_B[:, None])[:, 0] > 0)
                with torch.no_grad():
                    left_BN = step(pick_B, counts_B)
            picks_BK = picks_BK.scatter(1, slot_B1, torch.where(there_B, pick_B, count)[:, None])
            slot_free_BK = slot_free_BK.scatter(1, slot_B1, False)
            if assignment != "shared":
                free_BN = free_BN.scatter(1, pick_B[:, None], False)
    return picks_BK, logarithm_B
