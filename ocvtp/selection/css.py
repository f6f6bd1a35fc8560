"""Greedy column subset selection: each pick is the token that lowers the squared residual of all tokens most.

The criterion is eq. 4 of the paper, with linear reconstruction: the squared error of all (centred) tokens from the
kept ones. The way to it is the recursion of Farahat, Ghodsi and Kamel (2011). The bound: let f be the energy that a
set of tokens explains, and OPT the best set of k. After r >= 16 k / (epsilon sigma) picks f is at least (1 - epsilon)
f(OPT), where sigma is the smallest squared singular value of OPT's tokens at unit length (Altschuler, Bhaskara, Fu,
Mirrokni, Rostamizadeh and Zadimoghaddam 2016, theorem 1); after k picks it is at least (1 - exp(-gamma)) f(OPT), where
gamma is the submodularity ratio (Das and Kempe 2011). With `spread` there is no such bound.

Letters: B images, N tokens, C token width, A width of the tokens whose distance counts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from ocvtp.errors import BadInput
from ocvtp.selection.cosines import unit
from ocvtp.selection.greedy import TIE, Step, centred, check, choose, row

_ROUNDED: Final = 64 * torch.finfo(torch.float32).eps
"""What rounding leaves unknown of an inner product of a token, relative to its squared length at first."""


def css(
    tokens: Tensor, keep: int | Sequence[int], mask: Tensor | None = None, *, check_values: bool | None = None,
    spread: float = 0.0, apart: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Indices [B, keep]: arguments and results are those of `ocvtp.selection.greedy.choose`, and these.

    Costs N^2 C multiply-accumulates, and 2 N^2 a pick; with `spread` N A more a pick.

    Args:
        tokens: [B, N, C]; it and the next three as there.
        keep: tokens to keep.
        mask: [B, N].
        check_values: look for NaN and infinity.
        spread: from the second pick on what a token lowers the residual by is multiplied by its distance, 1 - cosine,
            from the nearest pick to this power: between a column subset (0) and farthest points.
        apart: [B, N, A], the tokens whose distance it is, say of another layer; None: `tokens`.

    Raises:
        BadInput: as `choose`; a spread that is no number of at least 0, `apart` of other tokens, or without spread.
    """
    if isinstance(spread, bool) or not isinstance(spread, int | float) or not 0 <= spread < math.inf:
        raise BadInput(f"spread is {spread!r}: a number of at least 0 is needed")
    if not spread:
        if apart is not None:
            raise BadInput("apart is given, but spread is 0: distances count for nothing")
        return choose(tokens, keep, mask, check_values, begin)
    apart = tokens if apart is None else apart
    for each in (tokens, apart):
        check(each, mask, check_values)
    if apart.shape[:2] != tokens.shape[:2]:
        raise BadInput(f"apart {list(apart.shape)} of tokens {list(tokens.shape)}: {list(tokens.shape[:2])} is needed")
    both = torch.cat((tokens.float(), apart.float()), 2)
    return choose(both, keep, mask, False, _Spread(tokens.shape[2], float(spread)))


@dataclass(frozen=True)
class _Spread:
    """`begin` of tokens behind which, from `width` on, those stand whose distance to the `power` counts."""

    width: int
    power: float

    def __call__(self, both_BNX: Tensor, exists_BN: Tensor, steps: int) -> tuple[Tensor, Step]:
        gain_BN, lower = begin(both_BNX[:, :, : self.width], exists_BN, steps)
        unit_BNA = unit(both_BNX[:, :, self.width :])
        nearest_BN = torch.full_like(gain_BN, 2)

        def step(pick_B: Tensor, counts_B: Tensor) -> Tensor:
            distance_BN = 1 - (unit_BNA @ row(unit_BNA, pick_B)[:, :, None])[:, :, 0]
            torch.minimum(nearest_BN, torch.where(distance_BN > TIE, distance_BN, 0), out=nearest_BN)
            return lower(pick_B, counts_B) * nearest_BN**self.power

        return gain_BN, step


def begin(tokens_BNC: Tensor, exists_BN: Tensor, steps: int) -> tuple[Tensor, Step]:
    """How much each token lowers the squared residual of all, [B, N], and what it is after a pick."""
    centred_BNC, floor_BN = centred(tokens_BNC, exists_BN)
    # Fourth powers of lengths have to be numbers: scaled by a power of two, which rounds nothing.
    _, exponent_B = torch.frexp(centred_BNC.abs().amax((1, 2)))
    scale_B = torch.exp2(-exponent_B.float())
    centred_BNC, floor_BN = centred_BNC * scale_B[:, None, None], floor_BN * scale_B[:, None].square()
    inner_BNN = centred_BNC @ centred_BNC.transpose(1, 2)
    """Inner products of what is left of the tokens."""

    rounded_BN = _ROUNDED * centred_BNC.square().sum(2)

    def scores() -> Tensor:
        left_BN = inner_BNN.diagonal(dim1=1, dim2=2)
        explained_BN = torch.linalg.vector_norm(inner_BNN, dim=2).square()
        gain_BN = explained_BN / left_BN
        # No gain is larger than all there is to explain. Where one direction is left, each token explains it: their
        # gains are equal, whatever rounding makes of a token of which little is left.
        all_B1 = left_BN.clamp(min=0).sum(1, keepdim=True)
        gain_BN = torch.where(gain_BN >= all_B1 * (1 - rounded_BN / left_BN), all_B1, gain_BN)
        return torch.where(left_BN > floor_BN, gain_BN, 0)

    def step(pick_B: Tensor, counts_B: Tensor) -> Tensor:
        with_pick_BN = row(inner_BNN, pick_B)
        left_B1 = with_pick_BN.gather(1, pick_B[:, None])
        column_BN = torch.where(counts_B[:, None], with_pick_BN / left_B1.sqrt(), 0)
        inner_BNN.baddbmm_(column_BN[:, :, None], column_BN[:, None, :], alpha=-1)
        return scores()

    return scores(), step
