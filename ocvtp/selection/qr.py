"""Pivoted QR: each pick is the token farthest from what those before it span.

The greedy way to a set of large volume (Businger and Golub 1965): with k picks within a factor of k! of the largest
volume (Civril and Magdon-Ismail 2009, theorem 3.1), and with sigma_k+1 the (k+1)-th singular value of the centred
tokens, what is left of any token is at most 2^k sqrt(N - k) sigma_k+1 (Gu and Eisenstat 1996), hardly ever so much.

Letters: B images, N tokens, C token width, S tokens to keep.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ocvtp.selection.greedy import Step, centred, choose, row


def qr(
    tokens: Tensor, keep: int | Sequence[int], mask: Tensor | None = None, *, check_values: bool | None = None
) -> Tensor:
    """Indices [B, keep]: arguments and results are those of `ocvtp.selection.greedy.choose`.

    Costs 6 N C multiply-accumulates a pick at most.
    """
    return choose(tokens, keep, mask, check_values, begin)


def begin(tokens_BNC: Tensor, exists_BN: Tensor, steps: int) -> tuple[Tensor, Step]:
    """Squared length of what is left of each token, [B, N], and what it is after a pick; for `steps` picks."""
    centred_BNC, floor_BN = centred(tokens_BNC, exists_BN)
    residual = Residual(centred_BNC, floor_BN, steps)
    return residual.scores(), residual.step


class Residual:
    """What the span of the picks leaves of each token."""

    def __init__(self, centred_BNC: Tensor, floor_BN: Tensor, steps: int) -> None:
        self._tokens_BNC, self._floor_BN = centred_BNC, floor_BN
        self._left_BN = centred_BNC.square().sum(2)
        self._basis_BSC = centred_BNC.new_zeros(len(centred_BNC), steps, centred_BNC.shape[2])
        self._done = 0

    def scores(self) -> Tensor:
        """Squared length of what is left of each token, [B, N]; 0 where it is rounding."""
        return torch.where(self._left_BN > self._floor_BN, self._left_BN, 0)

    def step(self, pick_B: Tensor, counts_B: Tensor) -> Tensor:
        """Add picks to the span; where not `counts_B` it stays."""
        direction_BC1 = row(self._tokens_BNC, pick_B)[:, :, None]
        basis_BsC = self._basis_BSC[:, : self._done]
        for _ in range(2):  # the second time takes away what rounding left at the first
            direction_BC1 = direction_BC1 - basis_BsC.transpose(1, 2) @ (basis_BsC @ direction_BC1)
        length_B11 = direction_BC1.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        direction_BC1 = torch.where(counts_B[:, None, None], direction_BC1 / length_B11, 0)
        self._basis_BSC[:, self._done] = direction_BC1[:, :, 0]
        self._done += 1
        self._left_BN = self._left_BN - (self._tokens_BNC @ direction_BC1)[:, :, 0].square()
        return self.scores()
