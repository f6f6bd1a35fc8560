"""Eq. 6: vision tokens are projected, then gathered into slots that compete for them.

Slots begin as queries: drawn from one learnt Gaussian, or from one for each slot.

Letters: B images, N tokens, C token width, K slots, D slot width.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ocvtp.errors import BadInput
from ocvtp.pruner.config import PrunerConfig
from ocvtp.selection import CHOICES

EPSILON = 1e-5
"""Added to a slot's summed attention, so that a slot without tokens is no division by zero."""
_PART_BYTES = 16 * 2**20
"""Of the projection's hidden layer that a CPU holds at a time: larger ones leave its cache, and cost fresh pages."""


class Projection(nn.Module):
    """Tokens [B, N, C] to what slot attention reads, [B, N, D]. No positions."""

    def __init__(self, config: PrunerConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.token_dim)
        self.up = nn.Linear(config.token_dim, config.hidden_dim)
        self.down = nn.Linear(config.hidden_dim, config.slot_dim)
        nn.init.zeros_(self.up.bias)
        nn.init.zeros_(self.down.bias)

    def forward(self, tokens_BNC: Tensor) -> Tensor:
        """Norm, linear, GELU, linear."""
        if torch.is_grad_enabled() or tokens_BNC.device.type != "cpu":
            return self._map(tokens_BNC)
        images = max(1, _PART_BYTES // (4 * tokens_BNC.shape[1] * self.up.out_features))
        return torch.cat([self._map(some_bNC) for some_bNC in tokens_BNC.split(images)])

    def _map(self, tokens_BNC: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(self.norm(tokens_BNC))))  # type: ignore[no-any-return]


class FeedForward(nn.Module):
    """What follows the GRU, added to its output."""

    def __init__(self, config: PrunerConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.slot_dim, config.ffn_dim)
        self.dropout = nn.Dropout(config.ffn_dropout)
        self.down = nn.Linear(config.ffn_dim, config.slot_dim)
        nn.init.zeros_(self.up.bias)
        nn.init.zeros_(self.down.bias)

    def forward(self, slots_BKD: Tensor) -> Tensor:
        """Linear, GELU, dropout, linear."""
        return self.down(self.dropout(F.gelu(self.up(slots_BKD))))  # type: ignore[no-any-return]


class SlotAttention(nn.Module):
    """The SA of eq. 6: slots compete for tokens over a few iterations.

    Matrix products run in the type of the surrounding autocast; softmax, sums and the state of the GRU stay in the
    type of the queries.
    """

    def __init__(self, config: PrunerConfig) -> None:
        super().__init__()
        width = config.slot_dim
        self.iterations = config.iterations
        self.bilevel = config.truncation == "bilevel"
        self.scale = width**-0.5
        self.norm_tokens = nn.LayerNorm(width)
        self.norm_slots = nn.LayerNorm(width)
        self.norm_ffn = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(width, width, bias=False)
        self.to_v = nn.Linear(width, width, bias=False)
        self.gru = nn.GRUCell(width, width)
        self.ffn = FeedForward(config)
        nn.init.zeros_(self.gru.bias_ih)
        nn.init.zeros_(self.gru.bias_hh)

    def forward(
        self,
        encoded_BND: Tensor,
        queries_BKD: Tensor,
        mask_BN: Tensor | None = None,
        slot_mask_BK: Tensor | None = None,
        *,
        exact: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Gather tokens into slots.

        Args:
            encoded_BND: projected tokens.
            queries_BKD: initial slots.
            mask_BN: True where there is a token; None if everywhere.
            slot_mask_BK: True where there is a slot; None if everywhere.
            exact: products of slots and tokens are in the type of the queries, too: a few percent of the work, which
                decide between tokens that a slot attends to nearly alike.

        Returns:
            Slots [B, K, D], and the attention [B, K, N] of the last iteration: softmax over slots, not normalised over
            tokens, zero where there is no token or no slot.
        """
        tokens_BND = self.norm_tokens(encoded_BND)
        k_BND, v_BND = self.to_k(tokens_BND), self.to_v(tokens_BND)
        if exact:
            k_BND, v_BND = k_BND.to(queries_BKD.dtype), v_BND.to(queries_BKD.dtype)
        slots_BKD = queries_BKD
        # With bi-level truncation no gradient comes back through any iteration but the last: they need no graph.
        with torch.no_grad() if self.bilevel else nullcontext():
            for _ in range(self.iterations - 1):
                slots_BKD, _ = self._iterate(slots_BKD, k_BND, v_BND, mask_BN, slot_mask_BK, exact=exact)
        if self.bilevel and self.iterations > 1:
            # Straight through: the value of the iterated slots, the gradient of the queries.
            slots_BKD = slots_BKD.detach() + (queries_BKD - queries_BKD.detach())
        return self._iterate(slots_BKD, k_BND, v_BND, mask_BN, slot_mask_BK, exact=exact)

    def _iterate(
        self,
        slots_BKD: Tensor,
        k_BND: Tensor,
        v_BND: Tensor,
        mask_BN: Tensor | None,
        slot_mask_BK: Tensor | None,
        *,
        exact: bool,
    ) -> tuple[Tensor, Tensor]:
        def product(left: Tensor, right: Tensor) -> Tensor:
            with torch.autocast(left.device.type, enabled=False) if exact else nullcontext():
                return (left.to(right.dtype) @ right if exact else left @ right).to(slots_BKD.dtype)

        q_BKD = self.to_q(self.norm_slots(slots_BKD)) * self.scale
        logits_BKN = product(q_BKD, k_BND.transpose(1, 2))
        if slot_mask_BK is not None:
            logits_BKN = logits_BKN.masked_fill(~slot_mask_BK[:, :, None], -torch.inf)
        attention_BKN = logits_BKN.softmax(dim=1)
        if mask_BN is not None:
            attention_BKN = attention_BKN * mask_BN[:, None, :]
        # A weighted mean: dividing K x D sums instead of K x N weights is the same and less work.
        mass_BK1 = attention_BKN.sum(2, keepdim=True) + EPSILON
        update_BKD = product(attention_BKN, v_BND) / mass_BK1
        slots_BKD = self._gru(update_BKD, slots_BKD)
        return slots_BKD + self.ffn(self.norm_ffn(slots_BKD)), attention_BKN

    def _gru(self, update_BKD: Tensor, slots_BKD: Tensor) -> Tensor:
        """`self.gru`, but autocast reaches its products only: as a whole it would keep its state in bfloat16."""
        gru, dtype = self.gru, slots_BKD.dtype
        reset_i, gate_i, new_i = F.linear(update_BKD, gru.weight_ih, gru.bias_ih).to(dtype).chunk(3, -1)
        reset_h, gate_h, new_h = F.linear(slots_BKD, gru.weight_hh, gru.bias_hh).to(dtype).chunk(3, -1)
        new_BKD = torch.tanh(new_i + torch.sigmoid(reset_i + reset_h) * new_h)
        return torch.lerp(new_BKD, slots_BKD, torch.sigmoid(gate_i + gate_h))


class SharedGaussian(nn.Module):
    """The Q of eq. 6: every slot from the same learnt Gaussian, so that any number can be drawn.

    The noise is what tells slots apart: with none, all slots would be and stay the same.
    """

    def __init__(self, config: PrunerConfig) -> None:
        super().__init__()
        self.mean = nn.Parameter(_uniform(1, config.slot_dim))
        self.log_std = nn.Parameter(_uniform(1, config.slot_dim))

    def check(self, num_slots: int) -> None:
        """Any number will do."""

    def forward(self, noise_BKD: Tensor) -> Tensor:
        """Slots [B, K, D] from standard normal noise."""
        return self.mean + noise_BKD * self.log_std.exp()


class SeparateGaussian(nn.Module):
    """One learnt Gaussian for each slot, as in BO-QSA: a fixed number of slots."""

    def __init__(self, config: PrunerConfig) -> None:
        super().__init__()
        self.slots = config.max_slots or 0
        self.mean = nn.Parameter(_uniform(self.slots, config.slot_dim))
        self.log_std = nn.Parameter(_uniform(self.slots, config.slot_dim))

    def check(self, num_slots: int) -> None:
        """`BadInput` for any number but the one."""
        if num_slots != self.slots:
            raise BadInput(f"{num_slots} slots, but this pruner has separate Gaussians for exactly {self.slots}")

    def forward(self, noise_BKD: Tensor) -> Tensor:
        """Slots [B, K, D] from standard normal noise."""
        return self.mean + noise_BKD * self.log_std.exp()


class FromTokens(nn.Module):
    """Projected tokens that a choice without training picks: no noise, and nothing to learn."""

    def __init__(self, config: PrunerConfig) -> None:
        super().__init__()
        self._choice = CHOICES[config.queries]

    def check(self, num_slots: int) -> None:
        """Any number will do."""

    def forward(self, tokens_BNC: Tensor, encoded_BND: Tensor, slots: list[int], mask_BN: Tensor | None) -> Tensor:
        """Slots [B, K, D], those of each image first; K is the largest number of `slots`."""
        picks_BK = self._choice(tokens_BNC, slots, mask_BN, check_values=False).clamp(min=0)
        return encoded_BND.gather(1, picks_BK[:, :, None].expand(-1, -1, encoded_BND.shape[2]))


Queries = SharedGaussian | SeparateGaussian | FromTokens
QUERY_MODULES: Final[dict[str, Callable[[PrunerConfig], Queries]]] = {
    "shared_gaussian": SharedGaussian,
    "separate_gaussian": SeparateGaussian,
    "qr": FromTokens,
    "fps": FromTokens,
}


def _uniform(slots: int, width: int) -> Tensor:
    """[1, K, D], of the spread that Xavier's rule gives the authors' [1, 1, D]."""
    bound = (6 / (2 * width)) ** 0.5
    return torch.empty(1, slots, width).uniform_(-bound, bound)
