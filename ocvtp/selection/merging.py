"""Tokens merged into others that stay: each into the one that it is most like.

Letters: B images, M tokens that stay, O others, V width of what is merged.
"""

import torch
from torch import Tensor


def into_nearest(values_BMV: Tensor, others_BOV: Tensor, likeness_BOM: Tensor, how: str = "mean") -> Tensor:
    """What becomes of the tokens that stay, [B, M, V] in their type; of equals the first is nearest.

    Args:
        values_BMV: of the tokens that stay.
        others_BOV: of the others.
        likeness_BOM: of each other token to each that stays.
        how: `mean` of a token and what is merged into it; or `sum` of the token and the mean of what is merged.
    """
    if not others_BOV.shape[1] or not values_BMV.shape[1]:
        return values_BMV
    goes_BMO = torch.nn.functional.one_hot(likeness_BOM.argmax(2), values_BMV.shape[1]).transpose(1, 2).float()
    # A product adds in the same order each time, which scattered additions on a GPU do not.
    sums_BMV, counts_BM1 = goes_BMO @ others_BOV.float(), goes_BMO.sum(2, keepdim=True)
    if how == "sum":
        merged_BMV = values_BMV.float() + sums_BMV / counts_BM1.clamp(min=1)
    else:
        merged_BMV = (values_BMV.float() + sums_BMV) / (1 + counts_BM1)
    return merged_BMV.to(values_BMV.dtype)
