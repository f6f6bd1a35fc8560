"""Greedy MAP of a determinantal point process: each pick raises the determinant of the picks' kernel most.

With a kernel q_i q_j cos(i, j), quality times diversity, what a pick adds is the squared length that the span of the
picks leaves of the token at length q (the next pivot of a Cholesky factorisation; Chen, Zhang and Zhou 2018). So it is
pivoted QR of these tokens, uncentred: `ocvtp.selection.qr`, which never makes the kernel.

Letters: B images, N tokens, C token width, S steps.
"""

import torch
from torch import Tensor

from ocvtp.selection.cosines import unit
from ocvtp.selection.greedy import picks
from ocvtp.selection.qr import Residual

_ROUNDING = 1e-5
"""Share of its squared length below which what is left of a token is rounding."""


@torch.no_grad()
def dpp(
    tokens_BNC: Tensor,
    steps: int,
    quality_BN: Tensor | None = None,
    exists_BN: Tensor | None = None,
    first_B: Tensor | None = None,
) -> Tensor:
    """Picks in their order, [B, S]; N where an image has no token left. Where none adds anything: the lowest number.

    Costs 6 N C multiply-accumulates a pick at most.

    Args:
        tokens_BNC: of which the cosines are taken; computed in float32.
        steps: S.
        quality_BN: q of each token, not negative; None: 1.
        exists_BN: True where there is a token to pick; None: everywhere.
        first_B: the first pick of each image, whatever it adds; None: the best.
    """
    with torch.autocast(tokens_BNC.device.type, enabled=False):
        made_BNC = unit(tokens_BNC)
        if quality_BN is not None:
            made_BNC = made_BNC * quality_BN.float()[..., None]
        if exists_BN is None:
            exists_BN = made_BNC.new_ones(made_BNC.shape[:2], dtype=torch.bool)
        made_BNC = made_BNC.masked_fill(~exists_BN[..., None], 0)
        residual = Residual(made_BNC, _ROUNDING * made_BNC.square().sum(2), steps)
        scores_BN = residual.scores()
        if first_B is not None:
            # Above every length, so that the pick counts and its direction leaves the others.
            scores_BN = scores_BN.scatter(1, first_B[:, None], 2 * scores_BN.amax(1, keepdim=True) + 1)
        return picks(exists_BN, steps, scores_BN, residual.step)
