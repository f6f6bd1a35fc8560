"""Non-maximum suppression: of tokens that are much alike, the one with the highest score stays.

Letters: B images, N tokens.
"""

import torch
from torch import Tensor

from ocvtp.selection.ranking import ranked, rows


@torch.no_grad()
def survivors(scores_BN: Tensor, likeness_BNN: Tensor, above_B: Tensor, groups_BN: Tensor | None = None) -> Tensor:
    """Tokens that no survivor of a higher score suppresses, [B, N] bool. Of equal scores the lower number is higher.

    Args:
        scores_BN: by which tokens are ranked.
        likeness_BNN: of each token to each; symmetric.
        above_B: a token suppresses those that it is more like than this.
        groups_BN: tokens suppress those of their own group alone; None: all are of one.
    """
    order_BN = ranked(scores_BN)
    sorted_BNN = rows(likeness_BNN, order_BN).gather(2, order_BN[:, None, :].expand(-1, order_BN.shape[1], -1))
    suppress_BNN = sorted_BNN > above_B[:, None, None]
    if groups_BN is not None:
        of_BN = groups_BN.gather(1, order_BN)
        suppress_BNN &= of_BN[:, :, None] == of_BN[:, None, :]
    suppress_BNN = suppress_BNN.triu(1)
    left_BN = torch.ones_like(order_BN, dtype=torch.bool)
    for place in range(order_BN.shape[1] - 1):
        left_BN &= ~(suppress_BNN[:, place] & left_BN[:, place : place + 1])
    return torch.zeros_like(left_BN).scatter(1, order_BN, left_BN)
