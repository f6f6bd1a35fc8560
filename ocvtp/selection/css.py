"""Greedy column subset selection: each pick is the token that lowers the squared residual of all tokens most.

The criterion is eq. 4 of the paper, with linear reconstruction: the squared error of all (centred) tokens from the
kept ones. The way to it is the recursion of Farahat, Ghodsi and Kamel (2011). The bound: let f be the energy that a
set of tokens explains, and OPT the best set of k. After r >= 16 k / (epsilon sigma) picks f is at least (1 - epsilon)
f(OPT), where sigma is the smallest squared singular value of OPT's tokens at unit length (Altschuler, Bhaskara, Fu,
Mirrokni, Rostamizadeh and Zadimoghaddam 2016, theorem 1); after k picks it is at least (1 - exp(-gamma)) f(OPT), where
gamma is the submodularity ratio (Das and Kempe 2011).

Letters: B images, N tokens, C token width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ocvtp.selection.greedy import Step, centred, choose, row


def css(
    tokens: Tensor, keep: int | Sequence[int], mask: Tensor | None = None, *, check_values: bool | None = None
) -> Tensor:
    """Indices [B, keep]: arguments and results are those of `ocvtp.selection.greedy.choose`.

    Costs N^2 C multiply-accumulates, and 2 N^2 a pick.
    """
    return choose(tokens, keep, mask, check_values, begin)


def begin(tokens_BNC: Tensor, exists_BN: Tensor, steps: int) -> tuple[Tensor, Step]:
    """How much each token lowers the squared residual of all, [B, N], and what it is after a pick."""
    centred_BNC, floor_BN = centred(tokens_BNC, exists_BN)
    inner_BNN = centred_BNC @ centred_BNC.transpose(1, 2)
    """Inner products of what is left of the tokens."""

    def scores() -> Tensor:
        left_BN = inner_BNN.diagonal(dim1=1, dim2=2)
        explained_BN = torch.linalg.vector_norm(inner_BNN, dim=2).square()
        return torch.where(left_BN > floor_BN, explained_BN / left_BN, 0)

    def step(pick_B: Tensor, counts_B: Tensor) -> Tensor:
        with_pick_BN = row(inner_BNN, pick_B)
        left_B1 = with_pick_BN.gather(1, pick_B[:, None])
        column_BN = torch.where(counts_B[:, None], with_pick_BN / left_B1.sqrt(), 0)
        inner_BNN.baddbmm_(column_BN[:, :, None], column_BN[:, None, :], alpha=-1)
        return scores()

    return scores(), step
