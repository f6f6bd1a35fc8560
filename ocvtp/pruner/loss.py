"""Eq. 10-12: how far the rebuilt tokens are from the real ones.

Letters: B images, N tokens, C token width, K slots.
"""

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from ocvtp.errors import BadInput

_TINY: Final = 1e-8
WITHOUT_DECODER: Final = ("span", "answers", "masks")
LOSSES: Final = ("aw_mse", "mse", *WITHOUT_DECODER)
"""Names of losses. Those without a decoder take no rebuilt tokens: `ocvtp.pruner.span`, and, of
`ocvtp.pruner.training`, `answers` and `coverage_loss`."""


def mse(prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Eq. 10: mean squared error over the tokens of each image, then over images.

    Args:
        prediction: rebuilt tokens [B, N, C].
        target: real tokens [B, N, C].
        mask: [B, N], True where there is a token; None if everywhere.

    Returns:
        A scalar.

    Raises:
        BadInput: shapes that do not fit.
    """
    error_BN = token_errors(prediction, target)
    weight_BN = torch.ones_like(error_BN) if mask is None else _mask(mask, error_BN)
    return _weighted(error_BN, weight_BN)


def aw_mse(
    prediction: Tensor,
    target: Tensor,
    attention: Tensor,
    power: float = 0.5,
    cap: float = 10.0,
    ignore_empty: bool = True,
    mask: Tensor | None = None,
    normalise: bool = True,
) -> Tensor:
    """Eq. 11-12: squared errors weighted against the area of the slots that they belong to, so that small ones count.

    A slot's area is the share of tokens that attend most to it; its weight is area^-power, divided by the mean over
    slots, and cut off at `cap`. A token's weight is the mean of the slots' by its (soft) attention.

    Args:
        prediction: rebuilt tokens [B, N, C].
        target: real tokens [B, N, C].
        attention: of slot attention [B, K, N], softmax over slots; no gradient flows into it.
        power: 0.5 in the authors' code, 1 in the paper.
        cap: the largest weight of a slot.
        ignore_empty: slots without a token have no weight and are left out of the mean. In the authors' code they have
            the largest weight, and the mean of the weights is made of little else, so that one empty slot is enough
            for all others to weigh next to nothing.
        mask: [B, N], True where there is a token; None if everywhere.
        normalise: divide by the mean over slots.

    Returns:
        A scalar.

    Raises:
        BadInput: shapes that do not fit.
    """
    error_BN = token_errors(prediction, target)
    batch, slots, tokens = attention.shape if attention.ndim == 3 else (0, 0, 0)
    if (batch, tokens) != tuple(error_BN.shape) or slots == 0:
        raise BadInput(
            f"attention {list(attention.shape)} of tokens {list(target.shape)}: "
            f"[{error_BN.shape[0]}, slots, {error_BN.shape[1]}] is needed"
        )
    valid_BN = torch.ones_like(error_BN) if mask is None else _mask(mask, error_BN)
    attention_BKN = attention.detach().to(error_BN.dtype)
    weight_BK = slot_weights(attention_BKN, valid_BN, power, cap, ignore_empty, normalise)
    weight_BN = torch.einsum("bkn,bk->bn", attention_BKN, weight_BK)
    return _weighted(error_BN, weight_BN * valid_BN)


def slot_weights(
    attention_BKN: Tensor, valid_BN: Tensor, power: float, cap: float, ignore_empty: bool, normalise: bool
) -> Tensor:
    """Eq. 12: the weight of each slot, [B, K]."""
    area_BK = torch.zeros_like(attention_BKN[:, :, 0])
    area_BK = area_BK.scatter_add(1, attention_BKN.argmax(1), valid_BN)  # sums of ones: exact in any order
    share_BK = area_BK / valid_BN.sum(1, keepdim=True).clamp(min=1)
    weight_BK = share_BK.clamp(min=_TINY) ** -power
    slots_B1: Tensor | int = attention_BKN.shape[1]
    if ignore_empty:
        filled_BK = area_BK > 0
        weight_BK = weight_BK * filled_BK
        slots_B1 = filled_BK.sum(1, keepdim=True)
    if normalise:
        weight_BK = weight_BK * slots_B1 / _divisor(weight_BK.sum(1, keepdim=True))
    return weight_BK.clamp(max=cap)


def token_errors(prediction: Tensor, target: Tensor) -> Tensor:
    """Squared error of each token, mean over its numbers, [B, N], in single precision at least."""
    if prediction.shape != target.shape or prediction.ndim != 3:
        raise BadInput(f"prediction {list(prediction.shape)} and target {list(target.shape)} must both be [B, N, C]")
    dtype = torch.promote_types(torch.promote_types(prediction.dtype, target.dtype), torch.float32)
    return (prediction.to(dtype) - target.to(dtype)).square().mean(2)


def _weighted(error_BN: Tensor, weight_BN: Tensor) -> Tensor:
    return ((error_BN * weight_BN).sum(1) / _divisor(weight_BN.sum(1))).mean()


def _divisor(sums: Tensor) -> Tensor:
    """1 of an image without tokens, whose errors sum up to 0."""
    return torch.where(sums > 0, sums, 1)


def _mask(mask_BN: Tensor, error_BN: Tensor) -> Tensor:
    if mask_BN.shape != error_BN.shape:
        raise BadInput(f"mask {list(mask_BN.shape)} of tokens [B, N] = {list(error_BN.shape)}")
    return mask_BN.to(error_BN.dtype)


def loss_function(
    name: str, *, power: float = 0.5, cap: float = 10.0, ignore_empty: bool = True, normalise: bool = True
) -> Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]:
    """One of `LOSSES` as a function of prediction, target, attention and mask."""
    if name == "mse":
        return lambda prediction, target, attention, mask: mse(prediction, target, mask)
    if name == "aw_mse":
        return lambda prediction, target, attention, mask: aw_mse(
            prediction, target, attention, power, cap, ignore_empty, mask, normalise
        )
    raise BadInput(f"loss {name!r}: mse or aw_mse is needed")
