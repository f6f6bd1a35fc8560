"""Greedy facility location: each pick raises most what the picks cover of all tokens.

A token is covered by the pick that it is most like; the sum over tokens is monotone and submodular, so that k picks
have at least 1 - 1/e of what the best k have (Nemhauser, Wolsey and Fisher 1978), as long as gains are not weighted.

Letters: B images, N tokens.
"""

import torch
from torch import Tensor

from ocvtp.selection.greedy import TIE, Step, row


@torch.no_grad()
def begin(likeness_BNN: Tensor, exists_BN: Tensor, weights_BN: Tensor | None = None) -> tuple[Tensor, Step]:
    """What each token adds, [B, N], and what it adds after a pick.

    Args:
        likeness_BNN: of each token (row) to each, not negative; symmetric.
        exists_BN: True where there is a token.
        weights_BN: what gains are multiplied by, not negative; None: nothing.
    """
    likeness_BNN = likeness_BNN * exists_BN[:, None, :]
    best_BN = torch.zeros_like(likeness_BNN[:, :, 0])
    least_B1 = TIE * likeness_BNN.amax((1, 2))[:, None] * exists_BN.sum(1, keepdim=True)

    more_BNN = torch.empty_like(likeness_BNN)
    """Used again at each step: to ask for so much memory takes longer than to fill it."""

    def gains() -> Tensor:
        gain_BN = torch.sub(likeness_BNN, best_BN[:, None, :], out=more_BNN).clamp_(min=0).sum(2)
        gain_BN = torch.where(gain_BN > least_B1, gain_BN, 0)
        return gain_BN if weights_BN is None else gain_BN * weights_BN

    def step(pick_B: Tensor, counts_B: Tensor) -> Tensor:
        torch.maximum(best_BN, row(likeness_BNN, pick_B), out=best_BN)
        return gains()

    return gains(), step
