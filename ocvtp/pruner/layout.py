"""Where the tokens of a batch are: which of them exist, and on which grid each image lies.

Letters: B images, N tokens (of the largest image of the batch).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from ocvtp.errors import BadInput
from ocvtp.pruner.config import PrunerConfig

Grid = tuple[int, int]


@dataclass(frozen=True)
class TokenLayout:
    """The places of a batch of tokens.

    Attributes:
        batch: number of images.
        tokens: N.
        mask_BN: True where there is a token; None if everywhere.
        grids: height and width of each image, or one for all.
        device: where the tokens are.
    """

    batch: int
    tokens: int
    mask_BN: Tensor | None
    grids: tuple[Grid, ...]
    device: torch.device

    @property
    def counts_B1(self) -> Tensor:
        """Tokens of each image, [B, 1] or, if all have the same, [1, 1]."""
        if self.mask_BN is None:
            return torch.full((1, 1), self.tokens, device=self.device)
        return self.mask_BN.sum(1, keepdim=True)


def layout(
    tokens_BNC: Tensor, mask_BN: Tensor | None, grid: Grid | Sequence[Grid] | None, config: PrunerConfig
) -> TokenLayout:
    """The layout of a batch.

    Args:
        tokens_BNC: the tokens.
        mask_BN: True where there is a token; the tokens of an image come first, its padding last.
        grid: height and width in tokens of all images, or of each; None stands for the config's own grid if it has as
            many tokens, else for a square one.
        config: of the pruner.

    Raises:
        BadInput: the grids do not fit the tokens.
    """
    batch, tokens = tokens_BNC.shape[:2]
    grids = (_usual_grid(tokens, config),) if grid is None else _grids(grid)
    if len(set(grids)) == 1:
        grids = grids[:1]
    elif len(grids) != batch:
        raise BadInput(f"{len(grids)} grids for {batch} images: one for all or one for each is needed")
    counts = [height * width for height, width in grids]
    if max(counts) > tokens or (mask_BN is None and min(counts) != tokens):
        raise BadInput(f"grids {_show(grids)} do not make the batch's {tokens} tokens (smaller images need a mask)")
    if mask_BN is not None and mask_BN.device.type == "cpu":  # elsewhere it would mean to wait for the device
        there = mask_BN.sum(1).tolist()
        if any(there[image] != counts[image % len(counts)] for image in range(batch)):
            raise BadInput(f"grids {_show(grids)} do not make the {there} tokens that the mask has")
    return TokenLayout(batch, tokens, mask_BN, grids, tokens_BNC.device)


def _grids(grid: Any) -> tuple[Grid, ...]:
    """One grid or several, as tuples."""
    several = [grid] if isinstance(grid[0], int) else list(grid)
    if any(len(one) != 2 or not all(isinstance(side, int) and side > 0 for side in one) for one in several):
        raise BadInput(f"grid is {grid!r}: (height, width) in tokens, or one such for each image, is needed")
    return tuple((height, width) for height, width in several)


def _usual_grid(tokens: int, config: PrunerConfig) -> Grid:
    if tokens == config.grid_tokens:
        return config.grid
    side = isqrt(tokens)
    if side * side != tokens:
        raise BadInput(
            f"{tokens} tokens are neither the pruner's grid of {config.grid[0]} x {config.grid[1]} nor a square: "
            "give grid=(height, width)"
        )
    return (side, side)


def _show(grids: Sequence[Grid]) -> str:
    shown = ", ".join(f"{height} x {width}" for height, width in grids[:4])
    return shown if len(grids) <= 4 else f"{shown}, ..."
