"""How many tokens each part of an image may keep, where that depends on what the parts show.

Letters: B images, P parts of an image.
"""

import torch
from torch import Tensor

from ocvtp.selection.ranking import ranked


def apportion(weights_BP: Tensor, sizes_P: Tensor, total: int) -> Tensor:
    """Split a budget in proportion to weights, [B, P]; in all `total`, or all there are.

    Each part has the whole tokens of its share, as far as it holds so many. What is left over goes one by one to the
    parts that hold more, the heaviest first (of equals the first), in as many rounds as it takes.

    Args:
        weights_BP: not negative; where all are 0 parts are equal.
        sizes_P: what each part can hold.
        total: of each image.
    """
    weights_BP = weights_BP.double()
    sum_B1 = weights_BP.sum(1, keepdim=True)
    shares_BP = torch.where(sum_B1 > 0, weights_BP / sum_B1.clamp(min=1e-300), 1 / weights_BP.shape[1])
    # A hair above, for a share that is whole must not lose one to rounding.
    base_BP = torch.minimum((shares_BP * total + 1e-6).floor().long(), sizes_P)
    left_B1 = total - base_BP.sum(1, keepdim=True)
    order_BP = shares_BP.argsort(dim=1, descending=True, stable=True)
    place_P = torch.arange(order_BP.shape[1], device=order_BP.device).expand_as(order_BP)
    rank_BP = torch.zeros_like(order_BP).scatter(1, order_BP, place_P)
    rounds_U = torch.arange(total, device=order_BP.device)
    # Every token that a part could hold more has a turn; the first turns get what is left over.
    turn_BPU = rounds_U * order_BP.shape[1] + rank_BP[..., None]
    open_BPU = rounds_U < (sizes_P - base_BP)[..., None]
    turns_BX = torch.where(open_BPU, turn_BPU, torch.iinfo(torch.int64).max).flatten(1).sort(1).values
    last_B1 = turns_BX.gather(1, (left_B1 - 1).clamp(min=0, max=turns_BX.shape[1] - 1)) if total else left_B1
    given_BPU = open_BPU & (turn_BPU <= last_B1[..., None]) & (left_B1 > 0)[..., None]
    return base_BP + given_BPU.sum(2)


def filled(least_BP: Tensor, most_BP: Tensor, order_BP: Tensor, total_B: Tensor) -> Tensor:
    """Numbers between bounds, raised part after part to the upper one until they add up, [B, P].

    Args:
        least_BP: lower bounds; one that is above the upper one counts as that.
        most_BP: upper bounds.
        order_BP: parts in the order in which they are raised.
        total_B: what they add up to, as far as the bounds allow.
    """
    least_BP = torch.minimum(least_BP, most_BP)
    gaps_BP = (most_BP - least_BP).gather(1, order_BP)
    before_BP = gaps_BP.cumsum(1) - gaps_BP
    left_B1 = (total_B - least_BP.sum(1))[:, None]
    raised_BP = torch.minimum((left_B1 - before_BP).clamp(min=0), gaps_BP)
    return least_BP + torch.zeros_like(raised_BP).scatter(1, order_BP, raised_BP)


def best_of_parts(scores_BN: Tensor, parts_BN: Tensor, quotas_BP: Tensor, number: int) -> Tensor:
    """Tokens with the highest scores of each part, part by part, from the highest on, [B, number]; of equals the lower.

    Args:
        scores_BN: of tokens.
        parts_BN: the part of each token.
        quotas_BP: how many of each part; not more than it has, and not more than `number` in all.
        number: -1 stands at the end where there are fewer.
    """
    order_BN = ranked(scores_BN)
    order_BN = order_BN.gather(1, parts_BN.gather(1, order_BN).argsort(dim=1, stable=True))
    of_BN = parts_BN.gather(1, order_BN)
    sizes_BP = torch.zeros_like(quotas_BP).scatter_add(1, parts_BN, torch.ones_like(parts_BN))
    starts_BP = sizes_BP.cumsum(1) - sizes_BP
    place_N = torch.arange(order_BN.shape[1], device=order_BN.device)
    best_BN = place_N - starts_BP.gather(1, of_BN) < quotas_BP.gather(1, of_BN)
    return listed(order_BN, best_BN, number)


def listed(numbers_BX: Tensor, which_BX: Tensor, number: int) -> Tensor:
    """Those of some numbers that are marked, in their order, [B, number]; -1 at the end where there are fewer."""
    order_BX = (~which_BX).to(torch.uint8).argsort(dim=1, stable=True)[:, :number]
    return numbers_BX.gather(1, order_BX).masked_fill(~which_BX.gather(1, order_BX), -1)
