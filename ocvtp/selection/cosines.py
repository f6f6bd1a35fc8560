"""Cosines between the tokens of an image.

Letters: B images, N tokens of an image, M others, C token width.
"""

import torch
from torch import Tensor


def unit(tokens_BNC: Tensor) -> Tensor:
    """Tokens at unit length, in float32; zeros stay zeros."""
    return torch.nn.functional.normalize(tokens_BNC.float(), dim=2)


def cosines(tokens_BNC: Tensor, others_BMC: Tensor | None = None) -> Tensor:
    """Of each token with each, or with each of others: [B, N, N], or [B, N, M], float32. N M C multiply-accumulates."""
    unit_BNC = unit(tokens_BNC)
    return unit_BNC @ (unit_BNC if others_BMC is None else unit(others_BMC)).transpose(1, 2)


def mean_of_pairs(cosines_BNN: Tensor) -> Tensor:
    """The mean over pairs of different tokens, [B]; 0 of one token."""
    count = cosines_BNN.shape[1]
    pairs_BNN = cosines_BNN.triu(1)
    mean_B: Tensor = pairs_BNN.sum((1, 2)) / max(1, count * (count - 1) // 2)
    return mean_B
