"""Farthest points: each pick is the token least like (by cosine) the pick that it is most like.

At most twice the distance, in chords of the unit sphere, of the best k from the token farthest from all of them
(Gonzalez 1985).

Letters: B images, N tokens, C token width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ocvtp.selection.greedy import TIE, Step, choose, row


def fps(
    tokens: Tensor, keep: int | Sequence[int], mask: Tensor | None = None, *, check_values: bool | None = None
) -> Tensor:
    """Indices [B, keep]: arguments and results are those of `ocvtp.selection.greedy.choose`.

    The first pick is the token least like the mean of all, each at unit length. Costs N C multiply-accumulates a pick.
    """
    return choose(tokens, keep, mask, check_values, _begin)


def _begin(tokens_BNC: Tensor, exists_BN: Tensor, steps: int) -> tuple[Tensor, Step]:
    unit_BNC = torch.nn.functional.normalize(tokens_BNC, dim=2)
    nearest_BN = torch.full_like(tokens_BNC[:, :, 0], 2)

    def distances(to_BC: Tensor) -> Tensor:
        distance_BN = 1 - (unit_BNC @ to_BC[:, :, None])[:, :, 0]
        return torch.where(distance_BN > TIE, distance_BN, 0)

    def step(pick_B: Tensor, counts_B: Tensor) -> Tensor:
        torch.minimum(nearest_BN, distances(row(unit_BNC, pick_B)), out=nearest_BN)
        return nearest_BN

    return distances(torch.nn.functional.normalize(unit_BNC.sum(1), dim=1)), step
