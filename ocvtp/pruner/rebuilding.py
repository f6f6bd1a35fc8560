"""How well the kept tokens stand for all: what the paper's guarantee is about (eq. 4-5), measured without a decoder.

A decoder measures itself: it has never seen slots of kept tokens alone. Least squares have nothing to learn.

Letters: B images, N tokens, C token width, S kept tokens.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ocvtp.errors import BadInput
from ocvtp.pruner.model import OCPruner
from ocvtp.pruner.seeding import generator
from ocvtp.pruner.select import Selection
from ocvtp.selection import prototype_error, span_error


@dataclass(frozen=True)
class Rebuilding:
    """Means over images. `random_` is the same for as many random tokens.

    Attributes:
        span_error: share of the variance of the tokens that ridge regression on the kept ones leaves unexplained
            (`ocvtp.selection.span_error`), of the layer that the pruner reads.
        prototype_error: mean cosine distance of a token to the nearest kept one, of that layer.
        handed_on_span_error: as `span_error`, of the layer that goes to the LLM; None if it was not given.
        distinct_picks: tokens that slots picked before any were filled in.
        tokens: kept tokens.
    """

    span_error: float
    random_span_error: float
    prototype_error: float
    random_prototype_error: float
    handed_on_span_error: float | None
    random_handed_on_span_error: float | None
    distinct_picks: float
    tokens: float

    @property
    def relative_to_random(self) -> float:
        """Below 1: better than random tokens."""
        return self.span_error / self.random_span_error

    def to_dict(self) -> dict[str, float | None]:
        """JSON of this, with the ratio."""
        return {**asdict(self), "relative_to_random": self.relative_to_random}


@torch.no_grad()
def rebuilding(
    pruner: OCPruner,
    tokens: Tensor,
    keep: int,
    *,
    handed_on: Tensor | None = None,
    mask: Tensor | None = None,
    seeds: Sequence[int] | None = None,
    seed: int = 0,
    images: Sequence[int] | None = None,
    **options: Any,
) -> Rebuilding:
    """Measure a selection on some images.

    Args:
        pruner: with or without a decoder, which has no part in this.
        tokens: [B, N, C].
        keep: tokens to keep, below N.
        handed_on: [B, N, V], the same tokens in the layer that goes to the LLM.
        mask: [B, N]; this and the next as in `OCPruner.forward`.
        seeds: one an image.
        seed: of the random tokens.
        images: one number an image, of which its random tokens are a function; its place among them unless given.
        options: of `OCPruner.select_details`.

    Raises:
        BadInput: as `select_details` and `span_error`; or nothing is dropped.
    """
    if keep >= tokens.shape[1]:
        raise BadInput(f"keep is {keep} of {tokens.shape[1]} tokens: nothing is dropped")
    chosen = pruner.select_details(tokens, keep, mask=mask, seeds=seeds, handed_on=handed_on, **options)
    numbers = range(len(tokens)) if images is None else images
    random_BS = _random(chosen, tokens.shape[1], mask, [generator("ocvtp random tokens", seed, one) for one in numbers])

    def means(error: Any, of: Tensor) -> tuple[float, float]:
        kept, random = (float(error(of, indices, mask).mean()) for indices in (chosen.indices_BS, random_BS))
        return kept, random

    span, random_span = means(span_error, tokens)
    prototype, random_prototype = means(prototype_error, tokens)
    passed, random_passed = (None, None) if handed_on is None else means(span_error, handed_on)
    return Rebuilding(
        span_error=span,
        random_span_error=random_span,
        prototype_error=prototype,
        random_prototype_error=random_prototype,
        handed_on_span_error=passed,
        random_handed_on_span_error=random_passed,
        distinct_picks=float(chosen.distinct_B.float().mean()),
        tokens=float(chosen.counts_B.float().mean()),
    )


def _random(chosen: Selection, count: int, mask: Tensor | None, draws: Sequence[torch.Generator]) -> Tensor:
    """As many random tokens of each image, whatever stands beside it in the batch; -1 where there are no more."""
    there_BN = torch.ones(len(draws), count, dtype=torch.bool) if mask is None else mask.cpu().bool()
    random_BS = torch.full(chosen.indices_BS.shape, -1)
    for row, there_N, number, draw in zip(random_BS, there_BN, chosen.counts_B.tolist(), draws, strict=True):
        places = there_N.nonzero()[:, 0]
        row[:number] = places[torch.randperm(len(places), generator=draw)[:number]]
    return random_BS.to(chosen.indices_BS.device)
