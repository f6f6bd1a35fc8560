"""Numbers of tokens by their scores, and in order: exact, with the lower number first of equals.

Letters: B images, N tokens of an image, k tokens kept, X any number of them.
"""

import torch
from torch import Tensor


def highest(scores_BN: Tensor, number: int) -> Tensor:
    """Numbers of the highest scores of each image, [B, number], ascending. Of equals the lower number."""
    numbers_Bk: Tensor = ranked(scores_BN)[:, :number].sort(1).values
    return numbers_Bk


def ranked(scores_BN: Tensor, before_BN: Tensor | None = None) -> Tensor:
    """Numbers from the highest score to the lowest, [B, N]. Of equals the lower number.

    With `before_BN` those come first for which that is higher, and scores rank what is equal there.
    """
    order_BN = scores_BN.argsort(dim=1, descending=True, stable=True)
    return order_BN if before_BN is None else order_BN.gather(1, ranked(before_BN.gather(1, order_BN)))


def ascending(numbers_BX: Tensor) -> Tensor:
    """Numbers of tokens sorted, with every -1, which stands for none, at the end."""
    last = numbers_BX.max() + 1 if numbers_BX.numel() else 1
    sorted_BX = torch.where(numbers_BX < 0, last, numbers_BX).sort(1).values
    return torch.where(sorted_BX == last, -1, sorted_BX)


def marked(numbers_Bk: Tensor, count: int) -> Tensor:
    """True at the tokens with these numbers, [B, N]; -1 is none."""
    wide_BX = torch.zeros(len(numbers_Bk), count + 1, dtype=torch.bool, device=numbers_Bk.device)
    return wide_BX.scatter(1, numbers_Bk.masked_fill(numbers_Bk < 0, count), value=True)[:, :count]


def others(numbers_Bk: Tensor, count: int) -> Tensor:
    """The numbers of all other tokens, [B, N - k], ascending; of distinct numbers, none of them -1."""
    kept_BN = marked(numbers_Bk, count)
    return kept_BN.to(torch.uint8).argsort(dim=1, stable=True)[:, : count - numbers_Bk.shape[1]]


def rows(table_BNX: Tensor, numbers_Bk: Tensor) -> Tensor:
    """Of something with an entry a token, [B, N, X], those of some tokens, [B, k, X]."""
    return table_BNX.gather(1, numbers_Bk[..., None].expand(-1, -1, table_BNX.shape[2]))
