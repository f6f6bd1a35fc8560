"""How well the dropped tokens can be rebuilt from the kept ones: what the paper's guarantee is about.

Letters: B images, N tokens, C token width, K slots, S kept tokens.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ocvtp.errors import BadInput, NotAvailable
from ocvtp.pruner.decoder import Decoder
from ocvtp.pruner.layout import Grid, layout
from ocvtp.pruner.loss import token_errors
from ocvtp.pruner.model import OCPruner
from ocvtp.pruner.seeding import generator


@dataclass(frozen=True)
class Rebuilding:
    """Mean squared errors over images, and what they are relative to.

    Attributes:
        kept_error: of the dropped tokens, rebuilt from the kept tokens alone.
        random_error: the same for as many random tokens.
        full_error: of all tokens, rebuilt from all: what the decoder gets wrong anyway.
        mean_error: of the dropped tokens, if each were the mean of the kept ones.
        distinct_picks: tokens that slots picked before any were filled in, mean over images.
        tokens: kept tokens, mean over images.
    """

    kept_error: float
    random_error: float
    full_error: float
    mean_error: float
    distinct_picks: float
    tokens: float

    @property
    def relative_to_random(self) -> float:
        """Below 1: better than random tokens."""
        return self.kept_error / self.random_error

    @property
    def relative_to_full(self) -> float:
        """1 would be as good as all tokens."""
        return self.kept_error / self.full_error

    def to_dict(self) -> dict[str, float]:
        """JSON of this, with both ratios."""
        return {
            **asdict(self),
            "relative_to_random": self.relative_to_random,
            "relative_to_full": self.relative_to_full,
        }


@torch.no_grad()
def rebuilding(
    pruner: OCPruner,
    tokens: Tensor,
    keep: int,
    *,
    mask: Tensor | None = None,
    grid: Grid | Sequence[Grid] | None = None,
    seeds: Sequence[int] | None = None,
    seed: int = 0,
    **options: Any,
) -> Rebuilding:
    """Measure a selection on some images.

    The slots are gathered from the kept tokens alone, and the decoder sees those and no other.

    Args:
        pruner: with a decoder.
        tokens: [B, N, C].
        keep: tokens to keep, below N.
        mask: [B, N]; this and the next two as in `OCPruner.forward`.
        grid: of the images.
        seeds: one an image.
        seed: of the random tokens.
        options: of `OCPruner.select_details`.

    Raises:
        NotAvailable: the pruner has no decoder, or one (`ar`) that cannot do without the dropped tokens.
        BadInput: as `select_details`; or nothing is dropped.
    """
    decoder = pruner.decoder
    if decoder is None or pruner.config.decoder == "ar":
        raise NotAvailable(f"with decoder {pruner.config.decoder} dropped tokens cannot be rebuilt from kept ones")
    if keep >= tokens.shape[1]:
        raise BadInput(f"keep is {keep} of {tokens.shape[1]} tokens: nothing is dropped")
    chosen = pruner.select_details(tokens, keep, mask=mask, seeds=seeds, **options)
    exists_BN = torch.ones_like(tokens[:, :, 0], dtype=torch.bool) if mask is None else mask.bool()
    kept_BN = _members(chosen.indices_BS, exists_BN)
    draw_BN = torch.rand(kept_BN.shape, generator=generator("ocvtp random tokens", seed)).to(tokens.device)
    place_BN = draw_BN.masked_fill(~exists_BN, 2.0).argsort(1).argsort(1)
    random_BN = place_BN < chosen.counts_B[:, None]
    target_BNC = tokens.to(pruner.dtype)
    mean_B1C = (target_BNC * kept_BN[:, :, None]).sum(1, keepdim=True) / kept_BN.sum(1)[:, None, None]
    dropped_BN = exists_BN & ~kept_BN

    def errors(seen_BN: Tensor) -> Tensor:
        return token_errors(_rebuild(pruner, decoder, tokens, seen_BN, chosen.counts_B, mask, grid), target_BNC)

    return Rebuilding(
        kept_error=_mean(errors(kept_BN), dropped_BN),
        random_error=_mean(errors(random_BN), exists_BN & ~random_BN),
        full_error=_mean(errors(exists_BN), exists_BN),
        mean_error=_mean(token_errors(mean_B1C.expand_as(target_BNC), target_BNC), dropped_BN),
        distinct_picks=float(chosen.distinct_B.float().mean()),
        tokens=float(chosen.counts_B.float().mean()),
    )


def _rebuild(
    pruner: OCPruner,
    decoder: Decoder,
    tokens_BNC: Tensor,
    seen_BN: Tensor,
    slots_B: Tensor,
    mask_BN: Tensor | None,
    grid: Grid | Sequence[Grid] | None,
) -> Tensor:
    """All tokens, from those that are seen, gathered into some slots."""
    # The seen tokens to the front: slot attention has no positions, so their order is nothing to it.
    most = int(seen_BN.sum(1).max())
    order_BS = seen_BN.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
    some_BSC = tokens_BNC.gather(1, order_BS[:, :, None].expand(-1, -1, tokens_BNC.shape[2]))
    slots = pruner.config.max_slots or slots_B.tolist()
    found = pruner(some_BSC, slots, mask=seen_BN.gather(1, order_BS), decode="none")
    slot_mask_BK = None
    if pruner.config.max_slots is None:
        slot_mask_BK = torch.arange(found.slots.shape[1], device=slots_B.device) < slots_B[:, None]
    plan = seen_BN if pruner.config.decoder == "random_ar" else None
    where = layout(tokens_BNC, mask_BN, grid, pruner.config)
    rebuilt: Tensor = decoder(tokens_BNC.to(pruner.dtype), found.slots, plan, where, slot_mask_BK)
    return rebuilt


def _members(indices_BS: Tensor, exists_BN: Tensor) -> Tensor:
    """Indices as a mask [B, N]; -1 is none."""
    padded_BX = torch.zeros(len(exists_BN), exists_BN.shape[1] + 1, dtype=torch.bool, device=exists_BN.device)
    return padded_BX.scatter(1, indices_BS % padded_BX.shape[1], True)[:, :-1]  # -1 goes to the column that is cut off


def _mean(error_BN: Tensor, where_BN: Tensor) -> float:
    """Mean over the tokens of each image, then over the images that have any."""
    counts_B = where_BN.sum(1)
    mean_B = (error_BN * where_BN).sum(1) / counts_B.clamp(min=1)
    return float(mean_B[counts_B > 0].mean())
