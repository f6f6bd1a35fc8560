"""What the greedy choices share: checked tokens, picks that do not depend on rounding, and their result.

A choice is a sequence of picks, each the token with the highest score; so that of fewer tokens is the beginning of
that of more. No step waits for the device.

Letters: B images, N tokens (of the largest image of the batch), C token width, S tokens to keep.
"""

from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor

from ocvtp.errors import BadInput
from ocvtp.replay import Replays

TIE: Final = 1e-5
"""Scores that differ by less, relative to the best, are equal: the lower index is picked, whatever the batch and the
machine make of the last digit."""
_EXPLAINED: Final = 1e-5
"""Share of its squared length below which what is left of a token is rounding."""
_ROUNDING: Final = 1e-12
"""The same for what centring leaves, relative to the squared length before."""

Step = Callable[[Tensor, Tensor], Tensor]
"""From the tokens that were picked, [B], and whether their score was above 0, [B], to the next scores, [B, N]."""


@torch.no_grad()
def choose(
    tokens: Tensor,
    keep: int | Sequence[int],
    mask: Tensor | None,
    check_values: bool | None,
    begin: Callable[[Tensor, Tensor, int], tuple[Tensor, Step]],
) -> Tensor:
    """Run a greedy choice.

    Args:
        tokens: [B, N, C], of any floating type; computed in float32, under autocast too.
        keep: tokens to keep of each image, or one number for each.
        mask: [B, N], True where there is a token; None if everywhere.
        check_values: look for NaN and infinity, which waits for the device. None: on a CPU.
        begin: from tokens in float32 (zero where there is none), the mask and the number of steps to the first scores
            [B, N], none negative, and to the step that follows a pick. A score of 0 says that the token adds nothing.

    Returns:
        [B, S], int64: the picks of each image, distinct and ascending, as many as `keep` says. -1 at the end where an
        image of a batch keeps fewer than another, or has fewer tokens.

    Raises:
        BadInput: tokens of another shape or type, or not finite; a mask or keep that does not fit.
    """
    exists_BN = check(tokens, mask, check_values)
    keeps, count = _keeps(keep, len(tokens)), tokens.shape[1]
    if min(keeps) >= count:
        place_N = torch.arange(count, device=tokens.device)
        return _finish(torch.where(exists_BN, place_N, count), keeps, count)
    steps = min(max(keeps), count)

    def ordered(tokens_BNC: Tensor, exists_BN: Tensor) -> Tensor:
        with torch.autocast(tokens_BNC.device.type, enabled=False):
            present_BNC = tokens_BNC.float().masked_fill(~exists_BN[:, :, None], 0)
            return picks(exists_BN, steps, *begin(present_BNC, exists_BN, steps))

    return _finish(_REPLAYS((begin, steps), ordered, tokens, exists_BN), keeps, count)


_REPLAYS: Final = Replays()
"""A pick is a score of small kernels."""


@torch.no_grad()
def picks(exists_BN: Tensor, steps: int, score_BN: Tensor, step: Step) -> Tensor:
    """The tokens that a greedy choice picks, in its order, [B, steps]; N where an image has no token left.

    Args:
        exists_BN: True where there is a token to pick.
        steps: how many.
        score_BN: the first scores, none negative.
        step: what follows a pick.
    """
    count = exists_BN.shape[1]
    place_N = torch.arange(count, device=exists_BN.device)
    left_BN, found = exists_BN.clone(), []
    for number in range(steps):
        score_BN = score_BN.masked_fill(~left_BN, -1)
        best_B1 = score_BN.amax(1, keepdim=True)
        pick_B = torch.where(score_BN >= best_B1 * (1 - TIE), place_N, count).amin(1)
        # An image without tokens left has no best: its pick is beyond them all.
        found.append(pick_B)
        pick_B = pick_B.clamp(max=count - 1)
        left_BN = left_BN.scatter(1, pick_B[:, None], False)
        if number + 1 < steps:
            score_BN = step(pick_B, best_B1[:, 0] > 0)
    return torch.stack(found, 1) if found else place_N.new_empty(len(exists_BN), 0)


def centred(tokens_BNC: Tensor, exists_BN: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens less the mean of their image, and the squared length [B, N] up to which what is left of each is rounding.

    What affine combinations of the kept tokens cannot rebuild is what linear ones of these cannot.
    """
    centred_BNC = centre(tokens_BNC, exists_BN)
    floor_BN = _EXPLAINED * centred_BNC.square().sum(2) + _ROUNDING * tokens_BNC.square().sum(2)
    return centred_BNC, floor_BN


def centre(tokens_BNC: Tensor, exists_BN: Tensor) -> Tensor:
    """Tokens less the mean of their image; zero where there is none."""
    mean_B1C = tokens_BNC.sum(1, keepdim=True) / exists_BN.sum(1).clamp(min=1)[:, None, None]
    return (tokens_BNC - mean_B1C) * exists_BN[:, :, None]


def row(table_BNX: Tensor, pick_B: Tensor) -> Tensor:
    """Of each image the row of its pick, [B, X]."""
    return table_BNX.gather(1, pick_B[:, None, None].expand(-1, 1, table_BNX.shape[2]))[:, 0]


def check(tokens: Tensor, mask: Tensor | None, check_values: bool | None) -> Tensor:
    """The mask, on the device, of tokens that can be computed with; `BadInput` says what is wrong with others."""
    if not isinstance(tokens, Tensor) or tokens.ndim != 3 or 0 in tokens.shape:
        what = f"of shape {list(tokens.shape)}" if isinstance(tokens, Tensor) else type(tokens).__name__
        raise BadInput(f"tokens are {what}: a tensor [images, tokens, width], none of them 0, is needed")
    if not tokens.is_floating_point():
        raise BadInput(f"tokens are {tokens.dtype}: a floating type is needed")
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != tokens.shape[:2]):
        what = f"{list(mask.shape)}" if isinstance(mask, Tensor) else f"is a {type(mask).__name__}"
        raise BadInput(f"mask {what} of tokens {list(tokens.shape)}: a tensor {list(tokens.shape[:2])} is needed")
    shape = tokens.shape[:2]
    exists_BN = tokens.new_ones(shape, dtype=torch.bool) if mask is None else mask.to(tokens.device, torch.bool)
    if check_values or (check_values is None and tokens.device.type == "cpu"):
        bad_B = ~(tokens.isfinite().all(2) | ~exists_BN).all(1)
        if images := bad_B.nonzero()[:, 0].tolist():
            shown = ", ".join(map(str, images[:8])) + (", ..." if len(images) > 8 else "")
            raise BadInput(f"tokens of image {shown} of the batch hold NaN or infinity")
    return exists_BN


def _keeps(keep: int | Sequence[int], batch: int) -> list[int]:
    keeps = list(keep) if isinstance(keep, Sequence) else [keep] * batch
    if len(keeps) != batch:
        raise BadInput(f"keep has {len(keeps)} numbers for {batch} images")
    for number in keeps:
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise BadInput(f"keep is {number!r}: a whole number of at least 1 is needed")
    return keeps


def _finish(order_BX: Tensor, keeps: Sequence[int], none: int) -> Tensor:
    """The first picks of each image in ascending order; `none` is no pick, and becomes -1."""
    place_X = torch.arange(order_BX.shape[1], device=order_BX.device)
    over_BX = place_X >= torch.tensor(keeps)[:, None].to(order_BX.device, non_blocking=True)
    sorted_BX = order_BX.masked_fill(over_BX, none).sort(1).values
    return sorted_BX.masked_fill(sorted_BX == none, -1)
