"""Eq. 9: decoders rebuild the tokens from the slots. Training needs one, pruning does not.

Letters: B images, N tokens, C token width, K slots, D slot width, H and W the sides
of the table of positions.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import pairwise
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ocvtp.errors import BadInput
from ocvtp.pruner.config import PrunerConfig
from ocvtp.pruner.layout import TokenLayout
from ocvtp.pruner.seeding import generator as seeded
from ocvtp.pruner.transformer import Transformer

MODES: Final = ("random", "fixed", "all")
"""How a decoder is to look at the tokens: as in training, the same way each time, or at all of them."""


class PositionEmbedding(nn.Module):
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

    def forward(self, layout: TokenLayout) -> Tensor:
        """PositionEmbedding [B, N, C], or [1, N, C] if all images lie on one grid; anything where there is no token.

        Raises:
            BadInput: a grid that a table without resampling does not have.
        """
        fits = layout.tokens == self.table.shape[1]
        if not self.resample and not fits:
            raise BadInput(
                f"{layout.tokens} tokens, but a table of {self.table.shape[1]} positions: use positions='grid'"
            )
        if fits and (set(layout.grids) == {self.grid} or not self.resample):
            return self.table
        rows = {grid: self._read(grid) for grid in dict.fromkeys(layout.grids)}
        padded = {grid: F.pad(row_NC, (0, 0, 0, layout.tokens - len(row_NC))) for grid, row_NC in rows.items()}
        return torch.stack([padded[grid] for grid in (layout.grids if len(rows) > 1 else rows)])

    def _read(self, grid: tuple[int, int]) -> Tensor:
        """The table at another grid, [h * w, C]."""
        if grid == self.grid:
            return self.table[0]
        table_1CHW = self.table.transpose(1, 2).reshape(1, -1, *self.grid)
        return F.interpolate(table_1CHW, grid, mode="bilinear", align_corners=False).flatten(2)[0].T


class Decoder(nn.Module, ABC):
    """Rebuilds tokens [B, N, C] from slots [B, K, D] and whatever its plan lets it see of the tokens."""

    @abstractmethod
    def plan(self, layout: TokenLayout, mode: str, generator: torch.Generator | None) -> Tensor | None:
        """What this call may see, drawn for one of `MODES`; `random` draws from the generator (on the CPU)."""

    @abstractmethod
    def forward(
        self,
        tokens_BNC: Tensor,
        slots_BKD: Tensor,
        plan: Tensor | None,
        layout: TokenLayout,
        slot_mask_BK: Tensor | None = None,
    ) -> Tensor:
        """The rebuilt tokens."""


class NormedLinear(nn.Module):
    """A linear map without bias, then a norm."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width_in, width_out, bias=False)
        self.norm = nn.LayerNorm(width_out)

    def forward(self, x: Tensor) -> Tensor:
        """Norm of the mapped input."""
        return self.norm(self.linear(x))  # type: ignore[no-any-return]


class RandomAR(Decoder):
    """The random auto-regressive transformer of DIAS: some tokens are seen, all are predicted at once.

    It is published as a shuffle, after which the first few tokens stay visible, and its reverse. Nothing in between
    depends on the order, so that seeing the same few without shuffling is the same.
    """

    def __init__(self, config: PrunerConfig) -> None:
        super().__init__()
        self.config = config
        self.project_tokens = NormedLinear(config.token_dim, config.token_dim)
        self.project_slots = NormedLinear(config.slot_dim, config.token_dim)
        self.positions = PositionEmbedding(config)
        self.mask_token = nn.Parameter(torch.randn(1, 1, config.token_dim) / config.token_dim**0.5)
        self.transformer = Transformer(config)

    def plan(self, layout: TokenLayout, mode: str, generator: torch.Generator | None) -> Tensor | None:
        """Visible tokens [B, N] (or [1, N]), True where visible; None if all are."""
        if mode == "all":
            return None
        counts_B1 = layout.counts_B1
        if self.config.visible_count is not None:
            shown_B1 = torch.full_like(counts_B1, self.config.visible_count)
        else:
            shown_B1 = (self.config.visible * counts_B1).round().long()
        if mode == "random":
            # Host draws, so that any device sees the same.
            coin_B1, share_B1 = torch.rand(2, layout.batch, 1, generator=generator).to(layout.device)
            some_B1 = (share_B1 * (counts_B1 - 1)).long()  # uniform over 0 .. n - 2
            shown_B1 = torch.where(coin_B1 < self.config.random_visible, some_B1, shown_B1)
            order_BN = torch.rand(layout.batch, layout.tokens, generator=generator).to(layout.device)
        else:
            order_BN = torch.rand(1, layout.tokens, generator=seeded("ocvtp visible")).to(layout.device)
        if layout.mask_BN is not None:
            order_BN = order_BN.masked_fill(~layout.mask_BN, 2.0)
        rank_BN = order_BN.argsort(dim=1, stable=True).argsort(1)
        return rank_BN < shown_B1.clamp(max=layout.tokens)

    def forward(
        self,
        tokens_BNC: Tensor,
        slots_BKD: Tensor,
        plan: Tensor | None,
        layout: TokenLayout,
        slot_mask_BK: Tensor | None = None,
    ) -> Tensor:
        """The rebuilt tokens, of those that were seen as well."""
        seen_BNC = self.project_tokens(tokens_BNC)
        if plan is not None:
            seen_BNC = torch.where(plan[:, :, None], seen_BNC, self.mask_token.to(seen_BNC.dtype))
        query_BNC = seen_BNC + self.positions(layout)
        memory_BKC = self.project_slots(slots_BKD)
        return self.transformer(query_BNC, memory_BKC, layout.mask_BN, slot_mask_BK)  # type: ignore[no-any-return]


class MixtureMLP(Decoder):
    """DINOSAUR's decoder: each slot predicts every token by itself, and how much of it is its own."""

    def __init__(self, config: PrunerConfig) -> None:
        super().__init__()
        hidden = config.decoder_ffn_dim
        self.project_slots = NormedLinear(config.slot_dim, config.token_dim)
        self.positions = PositionEmbedding(config)
        sizes = [config.token_dim, hidden, hidden, hidden]
        layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
        self.mlp = nn.Sequential(*layers, nn.Linear(hidden, config.token_dim + 1))

    def plan(self, layout: TokenLayout, mode: str, generator: torch.Generator | None) -> Tensor | None:
        """It never sees a token."""
        return None

    def forward(
        self,
        tokens_BNC: Tensor,
        slots_BKD: Tensor,
        plan: Tensor | None,
        layout: TokenLayout,
        slot_mask_BK: Tensor | None = None,
    ) -> Tensor:
        """The mixture of the slots' predictions."""
        x_BKNC = self.project_slots(slots_BKD)[:, :, None] + self.positions(layout)[:, None]
        out_BKNX = self.mlp(x_BKNC)
        values_BKNC, share_BKN = out_BKNX[..., :-1], out_BKNX[..., -1].to(slots_BKD.dtype)
        if slot_mask_BK is not None:
            share_BKN = share_BKN.masked_fill(~slot_mask_BK[:, :, None], -torch.inf)
        return torch.einsum("bkn,bknc->bnc", share_BKN.softmax(1).to(values_BKNC.dtype), values_BKNC)


class OrderedAR(Decoder):
    """SPOT's decoder: a causal transformer that is told all tokens before the one to predict, in one of several orders.

    The orders run along rows or along columns, each forward or backward in both directions: eight. Each has its own
    token to begin with. Outside training the order is the usual one, along the rows.
    """

    orders: Final = 8

    def __init__(self, config: PrunerConfig) -> None:
        super().__init__()
        self.project_tokens = NormedLinear(config.token_dim, config.token_dim)
        self.project_slots = NormedLinear(config.slot_dim, config.token_dim)
        self.positions = PositionEmbedding(config)
        self.begin = nn.Parameter(torch.randn(self.orders, config.token_dim) / config.token_dim**0.5)
        self.transformer = Transformer(config)

    def plan(self, layout: TokenLayout, mode: str, generator: torch.Generator | None) -> Tensor | None:
        """The number of each image's order, [B]."""
        if mode != "random":
            return torch.zeros(layout.batch, dtype=torch.long, device=layout.device)
        return torch.randint(self.orders, (layout.batch,), generator=generator).to(layout.device)

    def forward(
        self,
        tokens_BNC: Tensor,
        slots_BKD: Tensor,
        plan: Tensor | None,
        layout: TokenLayout,
        slot_mask_BK: Tensor | None = None,
    ) -> Tensor:
        """The rebuilt tokens, each from the slots and the true tokens before it."""
        batch, count, width = tokens_BNC.shape
        order_B = torch.zeros(batch, dtype=torch.long, device=layout.device) if plan is None else plan
        table_GON = torch.stack([self._orders(grid, count) for grid in layout.grids]).to(layout.device)
        index_BN1 = table_GON.expand(batch, -1, -1)[torch.arange(batch, device=layout.device), order_B][:, :, None]
        index_BNC = index_BN1.expand(-1, -1, width)
        told_BNC = self.project_tokens(tokens_BNC).gather(1, index_BNC)[:, :-1]
        told_BNC = torch.cat([self.begin[order_B][:, None].to(told_BNC.dtype), told_BNC], dim=1)
        query_BNC = told_BNC + self.positions(layout).expand(batch, -1, -1).gather(1, index_BNC)
        # Padding comes last in every order: what is causal never looks at it.
        ordered_BNC = self.transformer(query_BNC, self.project_slots(slots_BKD), None, slot_mask_BK, causal=True)
        return torch.empty_like(ordered_BNC).scatter(1, index_BNC, ordered_BNC)

    def _orders(self, grid: tuple[int, int], count: int) -> Tensor:
        """Tokens in each of the orders, [orders, count], those that do not exist at the end."""
        place_HW = torch.arange(grid[0] * grid[1]).view(grid)
        by_rows = [place_HW.flip(axes) for axes in ([], [0], [1], [0, 1])]
        found_ON = torch.stack([way.flatten() for way in [*by_rows, *(way.T for way in by_rows)]])
        padding_N = torch.arange(grid[0] * grid[1], count).expand(self.orders, -1)
        return torch.cat([found_ON, padding_N], dim=1)


DECODER_MODULES: Final[dict[str, Callable[[PrunerConfig], Decoder]]] = {
    "random_ar": RandomAR,
    "mlp": MixtureMLP,
    "ar": OrderedAR,
}
