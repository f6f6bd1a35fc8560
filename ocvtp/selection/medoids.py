"""Greedy k-medoids (facility location): each pick brings the tokens, by cosine, nearest to their nearest pick.

What is raised is the sum over tokens of 1 + the cosine to the nearest pick; it is monotone and submodular, so that k
picks have at least 1 - 1/e of what the best k have (Nemhauser, Wolsey and Fisher 1978).

Letters: B images, N tokens, C token width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ocvtp.selection.greedy import TIE, Step, choose, row


def medoids(
    tokens: Tensor, keep: int | Sequence[int], mask: Tensor | None = None, *, check_values: bool | None = None
) -> Tensor:
    """Indices [B, keep]: arguments and results are those of `ocvtp.selection.greedy.choose`.

    Costs N^2 C multiply-accumulates, and N^2 additions a pick.
    """
    return choose(tokens, keep, mask, check_values, _begin)


def _begin(tokens_BNC: Tensor, exists_BN: Tensor, steps: int) -> tuple[Tensor, Step]:
    unit_BNC = torch.nn.functional.normalize(tokens_BNC, dim=2)
    likeness_BNN = (1 + unit_BNC @ unit_BNC.transpose(1, 2)).clamp(min=0) * exists_BN[:, None, :]
    """Of each token (row) to each that is there."""
    best_BN = torch.zeros_like(unit_BNC[:, :, 0])
    least_B1 = 2 * TIE * exists_BN.sum(1, keepdim=True)

    def gains() -> Tensor:
        gain_BN = (likeness_BNN - best_BN[:, None, :]).clamp_(min=0).sum(2)
        return torch.where(gain_BN > least_B1, gain_BN, 0)

    def step(pick_B: Tensor, counts_B: Tensor) -> Tensor:
        torch.maximum(best_BN, row(likeness_BNN, pick_B), out=best_BN)
        return gains()

    return gains(), step
