"""How well kept tokens stand for all: what the paper's guarantee (eq. 4-5) says, measured without a decoder.

Differentiable in the tokens that stand for the kept ones.

Letters: B images, N tokens (of the largest image of the batch), C token width, S kept tokens.
"""

import math
from typing import Final

import torch
from torch import Tensor

from ocvtp.errors import BadInput
from ocvtp.selection.greedy import centre, check

RIDGE: Final = 1e-3
"""Added to the diagonal of the kept tokens' inner products at unit length (their cosines about the mean of the image):
tokens of any length, and one that is kept twice, are treated alike."""
_TINY: Final = 1e-12


def span_error(tokens: Tensor, indices: Tensor, mask: Tensor | None = None, *, ridge: float = RIDGE) -> Tensor:
    """Share of the variance of an image's tokens that ridge regression on the kept ones leaves unexplained, [B].

    From 0 (kept tokens span all) to 1 (they tell nothing). All about the mean of the image's tokens.

    Args:
        tokens: [B, N, C], of any layer and any floating type.
        indices: [B, S], kept tokens; -1 is none.
        mask: [B, N], True where there is a token; None if everywhere.
        ridge: as `RIDGE`; above 0.

    Raises:
        BadInput: shapes that do not fit, tokens that are not finite, indices beyond the tokens or none at all, a ridge
            that is not above 0.
    """
    if isinstance(ridge, bool) or not isinstance(ridge, int | float) or not 0 < ridge < math.inf:
        raise BadInput(f"ridge is {ridge!r}: a number above 0 is needed")
    exists_BN, indices_BS = _checked(tokens, indices, mask)
    centred_BNC = centre(tokens.float().masked_fill(~exists_BN[:, :, None], 0), exists_BN)
    return span_error_of(centred_BNC, _rows(centred_BNC, indices_BS), ridge)


def prototype_error(tokens: Tensor, indices: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over an image's tokens of the cosine distance to the nearest kept one, [B]; arguments as of `span_error`."""
    exists_BN, indices_BS = _checked(tokens, indices, mask)
    tokens_BNC = tokens.float().masked_fill(~exists_BN[:, :, None], 0)
    return prototype_error_of(tokens_BNC, _rows(tokens_BNC, indices_BS), exists_BN, indices_BS >= 0)


def span_error_of(centred_BNC: Tensor, kept_BSC: Tensor, ridge: float = RIDGE) -> Tensor:
    """`span_error` of centred tokens from any others in place of the kept ones; rows of zeros are none."""
    unit_BSC = torch.nn.functional.normalize(kept_BSC, dim=2)
    cosines_BSS = unit_BSC @ unit_BSC.transpose(1, 2)
    solved_BSN = torch.linalg.solve(
        cosines_BSS + ridge * torch.eye(cosines_BSS.shape[1], device=cosines_BSS.device),
        unit_BSC @ centred_BNC.transpose(1, 2),
    )
    left_B = (centred_BNC - solved_BSN.transpose(1, 2) @ unit_BSC).square().sum((1, 2))
    # Tokens that are all alike are explained by any.
    error_B: Tensor = left_B / centred_BNC.square().sum((1, 2)).clamp(min=_TINY)
    return error_B


def prototype_error_of(
    tokens_BNC: Tensor, kept_BSC: Tensor, exists_BN: Tensor, kept_BS: Tensor | None = None
) -> Tensor:
    """`prototype_error` of tokens from any others in place of the kept ones; `kept_BS` says which of those count."""
    unit_BNC, to_BSC = (torch.nn.functional.normalize(each, dim=2) for each in (tokens_BNC, kept_BSC))
    cosine_BNS = unit_BNC @ to_BSC.transpose(1, 2)
    if kept_BS is not None:
        cosine_BNS = cosine_BNS.masked_fill(~kept_BS[:, None, :], -1)
    return ((1 - cosine_BNS.amax(2)) * exists_BN).sum(1) / exists_BN.sum(1).clamp(min=1)


def _checked(tokens: Tensor, indices: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    exists_BN = check(tokens, mask, None)
    if indices.ndim != 2 or len(indices) != len(tokens) or not indices.shape[1] or indices.is_floating_point():
        raise BadInput(f"indices {list(indices.shape)} of tokens {list(tokens.shape)}: whole numbers [images, kept], "
                       "at least one column, are needed")  # fmt: skip
    if indices.device.type == "cpu" and indices.numel() and int(indices.max()) >= tokens.shape[1]:
        raise BadInput(f"index {int(indices.max())} of {tokens.shape[1]} tokens")
    return exists_BN, indices.to(tokens.device)


def _rows(tokens_BNC: Tensor, indices_BS: Tensor) -> Tensor:
    """Kept tokens, [B, S, C]; zeros for -1."""
    rows_BSC = tokens_BNC.gather(1, indices_BS.clamp(min=0)[:, :, None].expand(-1, -1, tokens_BNC.shape[2]))
    return rows_BSC * (indices_BS >= 0)[:, :, None]
