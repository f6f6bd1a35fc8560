"""Slots propose, a residual decides: pivoted QR in which each pick belongs to a slot that has attention for it.

Letters: B images, N tokens, C token width, K slots.
"""

import torch
from torch import Tensor

from ocvtp.selection.greedy import TIE, centred
from ocvtp.selection.qr import Residual


@torch.no_grad()
def propose(attention_BKN: Tensor, tokens_BNC: Tensor, exists_BN: Tensor, slot_exists_BK: Tensor) -> Tensor:
    """The token of each slot, [B, K]; no two slots have the same, as long as there are tokens. N where there is none.

    K times, of all pairs of a slot and a token that are still free, the one with the largest product of (1) the slot's
    attention for the token, relative to its largest, and (2) the squared length of what the picks so far leave of the
    token. Where attention is even this is pivoted QR, and where it is sharp each slot has its own favourite. Of equals
    the token with the lower index, then the slot.
    """
    batch, slots, count = attention_BKN.shape
    device = attention_BKN.device
    place_N, number_K = torch.arange(count, device=device), torch.arange(slots, device=device)
    with torch.autocast(device.type, enabled=False):
        wish_BKN = attention_BKN.float().clamp(min=torch.finfo(torch.float32).tiny)
        wish_BKN = wish_BKN / wish_BKN.amax(2, keepdim=True)
        centred_BNC, floor_BN = centred(tokens_BNC.float().masked_fill(~exists_BN[:, :, None], 0), exists_BN)
        residual = Residual(centred_BNC, floor_BN, slots)
        left_BN, token_free_BN, slot_free_BK = residual.scores(), exists_BN.clone(), slot_exists_BK.clone()
        picks_BK = torch.full((batch, slots), count, device=device)
        for _ in range(slots):
            most_BN = wish_BKN.masked_fill(~slot_free_BK[:, :, None], 0).amax(1)
            score_BN = (most_BN * left_BN).masked_fill(~token_free_BN, -1)
            best_B1 = score_BN.amax(1, keepdim=True)
            pick_B = torch.where(score_BN >= best_B1 * (1 - TIE), place_N, count).amin(1)
            safe_B1 = pick_B.clamp(max=count - 1)[:, None]
            mine_BK = wish_BKN.gather(2, safe_B1[:, :, None].expand(-1, slots, -1))[:, :, 0]
            mine_BK = mine_BK.masked_fill(~slot_free_BK, -1)
            slot_B = torch.where(mine_BK >= mine_BK.amax(1, keepdim=True) * (1 - TIE), number_K, slots).amin(1)
            # An image without free tokens or slots: nothing changes.
            done_B1 = ((pick_B == count) | (slot_B == slots))[:, None]
            slot_B1 = slot_B.clamp(max=slots - 1)[:, None]
            picks_BK = picks_BK.scatter(1, slot_B1, torch.where(done_B1, picks_BK.gather(1, slot_B1), safe_B1))
            token_free_BN = token_free_BN.scatter(1, safe_B1, done_B1 & token_free_BN.gather(1, safe_B1))
            slot_free_BK = slot_free_BK.scatter(1, slot_B1, done_B1 & slot_free_BK.gather(1, slot_B1))
            left_BN = residual.step(safe_B1[:, 0], (best_B1 > 0)[:, 0])
    return picks_BK
