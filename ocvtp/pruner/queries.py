"""Initial slots: drawn from one learnt Gaussian, or from one for each slot, or begun with tokens of the image.

Letters: B images, N tokens, C token width, K slots, D slot width.
"""

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor, nn

from ocvtp.errors import BadInput
from ocvtp.pruner.config import PrunerConfig
from ocvtp.selection import CHOICES


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
