"""Farthest points: each pick is the token least like (by cosine) the pick that it is most like.

At most twice the distance, in chords of the unit sphere, of the best k from the token farthest from all of them
(Gonzalez 1985).

Letters: B images, N tokens, C token width.
"""

from collections.abc import Sequence
from functools import partial
from typing import Final, Literal

import torch
from torch import Tensor

from ocvtp.errors import BadInput
from ocvtp.selection.cosines import cosines, unit
from ocvtp.selection.greedy import TIE, Step, choose, row


def fps(
    tokens: Tensor, keep: int | Sequence[int], mask: Tensor | None = None, *, check_values: bool | None = None,
    first: Literal["far", "lonely"] = "far",
) -> Tensor:  # fmt: skip
    """Indices [B, keep]: arguments and results are those of `ocvtp.selection.greedy.choose`.

    The first pick is the token least like the mean of all, each at unit length (`far`); or the one farthest from its
    nearest neighbour (`lonely`), which costs N^2 C multiply-accumulates. Then N C a pick.

    Raises:
        BadInput: as `choose`; another first pick.
    """
    if first not in _BEGINS:
        raise BadInput(f"first is {first!r}: {' or '.join(_BEGINS)} is needed")
    return choose(tokens, keep, mask, check_values, _BEGINS[first])


def _begin(first: str, tokens_BNC: Tensor, exists_BN: Tensor, steps: int) -> tuple[Tensor, Step]:
    unit_BNC = unit(tokens_BNC)
    nearest_BN = torch.full_like(tokens_BNC[:, :, 0], 2)

    def distances(to_BC: Tensor) -> Tensor:
        distance_BN = 1 - (unit_BNC @ to_BC[:, :, None])[:, :, 0]
        return torch.where(distance_BN > TIE, distance_BN, 0)

    def step(pick_B: Tensor, counts_B: Tensor) -> Tensor:
        torch.minimum(nearest_BN, distances(row(unit_BNC, pick_B)), out=nearest_BN)
        return nearest_BN

    if first == "far":
        return distances(torch.nn.functional.normalize(unit_BNC.sum(1), dim=1)), step
    itself_NN = torch.eye(exists_BN.shape[1], dtype=torch.bool, device=exists_BN.device)
    alone_BNN = (1 - cosines(tokens_BNC)).masked_fill(itself_NN | ~exists_BN[:, None, :], 2)
    lonely_BN = alone_BNN.amin(2)
    return torch.where(lonely_BN > TIE, lonely_BN, 0), step


_BEGINS: Final = {first: partial(_begin, first) for first in ("far", "lonely")}
"""Each made once, so that a recorded choice (`ocvtp.replay`) is found again."""
