"""Positions for the decoder: a learnt table for each place, read off at any grid.

Letters: B images, N tokens, C token width, H and W the sides of the table.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ocvtp.errors import BadInput
from ocvtp.pruner.config import PrunerConfig
from ocvtp.pruner.layout import Layout


class Positions(nn.Module):
    """A learnt table [1, H * W, C] over the grid of the config.

    With `positions="grid"` another grid reads it between its entries (bilinear, both taken to cover the same image);
    on its own grid the entries are used as they are. With `positions="table"` there is no other grid.
    """

    def __init__(self, config: PrunerConfig) -> None:
        super().__init__()
        self.grid = config.grid
        self.resample = config.positions == "grid"
        self.table = nn.Parameter(torch.empty(1, config.grid_tokens, config.token_dim))
        nn.init.trunc_normal_(self.table, std=1.0)

    def forward(self, layout: Layout) -> Tensor:
        """Positions [B, N, C], or [1, N, C] if all images lie on one grid; anything where there is no token.

        Raises:
            BadInput: a grid that a table without resampling does not have.
        """
        if set(layout.grids) == {self.grid} or not self.resample:
            if layout.tokens != self.table.shape[1]:
                raise BadInput(
                    f"{layout.tokens} tokens, but a table of {self.table.shape[1]} positions: use positions='grid'"
                )
            return self.table
        rows = {grid: self._read(grid) for grid in dict.fromkeys(layout.grids)}
        if len(rows) == 1:
            return next(iter(rows.values()))[None]
        padded = {grid: F.pad(row_NC, (0, 0, 0, layout.tokens - len(row_NC))) for grid, row_NC in rows.items()}
        return torch.stack([padded[grid] for grid in layout.grids])

    def _read(self, grid: tuple[int, int]) -> Tensor:
        """The table at another grid, [h * w, C]."""
        if grid == self.grid:
            return self.table[0]
        table_1CHW = self.table.transpose(1, 2).reshape(1, -1, *self.grid)
        return F.interpolate(table_1CHW, grid, mode="bilinear", align_corners=False).flatten(2)[0].T
