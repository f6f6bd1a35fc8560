"""What has to be known of shortened prompts whose keys and values are in a cache, to go on from them.

It lies on the cache object itself, so that it goes where the cache goes: two calls in turns, a deep copy, a crop.

Letters: B prompts, S columns in the cache after the prompts, t columns since, q new columns among these.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ocvtp.errors import BadInput

_NAME = "_ocvtp_prefix"


@dataclass(frozen=True)
class Held:
    """What the layers from `first` on hold.

    Attributes:
        first: a layer of the language model.
        mask_BS: 1 for tokens, 0 for padding.
        next_B: position of the next token.
        full: there is no padding.
    """

    first: int
    mask_BS: Tensor
    next_B: Tensor
    full: bool


@dataclass(frozen=True)
class Prefix:
    """A cache right after its last prompt.

    Attributes:
        mask_BS: 1 for tokens, 0 for padding.
        next_B: position of the next token.
        full: there is no padding.
        columns: of the caller's prompts, which it stands for.
        later: layers that hold less than those before them, in their order.
    """

    mask_BS: Tensor
    next_B: Tensor
    full: bool
    columns: int
    later: tuple[Held, ...] = ()

    def remember(self, cache: Any) -> None:
        """Leave this on a cache."""
        setattr(cache, _NAME, self)

    @staticmethod
    def of(cache: Any) -> "Prefix | None":
        """What was left on a cache."""
        found = getattr(cache, _NAME, None)
        return found if isinstance(found, Prefix) else None

    @staticmethod
    def covered(cache: Any) -> int:
        """Columns of the caller that a cache stands for, pruned or not."""
        if cache is None:
            return 0
        held, prefix = int(cache.get_seq_length()), Prefix.of(cache)
        return held if prefix is None else prefix.columns + held - prefix.mask_BS.shape[1]

    def at(self, layer: int) -> Held:
        """What a layer holds."""
        held = Held(0, self.mask_BS, self.next_B, self.full)
        return [held, *(later for later in self.later if later.first <= layer)][-1]

    def since(self, cache: Any, mask_BL: Tensor | None, new: int, batch: int) -> tuple[Tensor, Tensor]:
        """The whole mask [B, S + t] up to the new columns, and the positions [B, t] from the prompt on.

        Both as the first layer has them.

        Args:
            cache: holds S + t - q columns: the prompts and what came since.
            mask_BL: the caller's mask of everything; only its end, from the prompt on, counts.
            new: q.
            batch: B of the call.
        """
        rows, prompt = self.mask_BS.shape
        if batch != rows:
            raise BadInput(f"the cache was filled by a batch of {rows} pruned prompts, but this batch has {batch}")
        later = cache.get_seq_length() - prompt + new
        if later < new:
            raise BadInput("the cache of pruned prompts was cropped into the prompts: fill it anew")
        if any(cache.get_seq_length(held.first) - held.mask_BS.shape[1] != later - new for held in self.later):
            raise BadInput(
                "the cache of pruned prompts was cropped to a length, but its layers hold different numbers of tokens: "
                "crop it by a number of tokens instead, crop(-2) for two"
            )
        if mask_BL is not None and mask_BL.ndim != 2:
            raise BadInput(f"a pruned model needs a mask of two dimensions, not of shape {list(mask_BL.shape)}")
        if mask_BL is None:
            tail_Bt = self.mask_BS.new_ones(batch, later)
        else:
            tail_Bt = mask_BL[:, mask_BL.shape[1] - later :].to(self.mask_BS)
        positions_Bt = self.next_B[:, None] + (tail_Bt.cumsum(1) - 1).clamp(min=0)
        return torch.cat([self.mask_BS, tail_Bt], 1), positions_Bt

    def whole(self, layer: int, mask_BS: Tensor) -> Tensor:
        """The mask of a layer, given that of the first layer."""
        return torch.cat([self.at(layer).mask_BS, mask_BS[:, self.mask_BS.shape[1] :]], 1)

    def shift(self, layer: int) -> Tensor:
        """How far positions in a layer are from those in the first, [B]."""
        return self.at(layer).next_B - self.next_B
