"""SparseVLM: words of the prompt that look at the image rate its tokens; part of what is dropped is merged.

The first version of the authors' code. Once, on the embeddings that layer 0 reads: every image token spreads its
attention (dot products, softmax) over the text after the image, and text tokens that get more than the mean of it are
raters; all of them if none does (a text of one token), the last token of the prompt if no text follows. Then at layers
2, 6 and 15 (counted from 0; at the same share of other depths) image tokens are scored by that layer's attention, mean
over heads and raters, and its output is pruned: the best stay in their order; of the others the best three tenths are
clustered and each cluster's mean is put after the kept tokens and before the text. Merged tokens are image tokens from
then on, and may be dropped at the next stage. Positions are numbered anew at each stage.

How many stay follows the fixed lists of the authors' scripts, as shares of 576 tokens: 300/200/110, 303/110/36,
238/48/26 and 66/30/17 for budgets of 192, 128, 96 and 64; on the straight line between two lists for other budgets,
below the last towards nothing, above the first towards everything.

Budgets: `reference` takes the lists at the share `keep` as they are. The authors count tokens after each layer, which
makes the layers that prune look cheaper than they are: on 32 layers their lists truly average 206.5, 145.4, 114.1 and
82.3. `average` walks along the same line of lists down to where the true average, merged tokens among it, stays within
`keep`, and then adds tokens where the rest of the budget allows.

`behaviour="reference"`: at least one token is dropped at each stage (and merged again) even when all could stay, and
clustering tells equal densities apart by noise. `recycle=False` merges nothing.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ocvtp.methods.base import BEHAVIOURS, Entry, no_pruner, one_of
from ocvtp.methods.inside import Inside, PruneStage, Step, counts, depth_of, fill, largest, listed, per_layer, scaled
from ocvtp.vlms.family import Family

_LAYERS = (2, 6, 15)
_WHOLE = 576
_NOISE = 1e-6
"""At most, where equal densities are told apart as the authors do."""
_LISTS: Sequence[tuple[int, tuple[int, int, int]]] = (
    (0, (0, 0, 0)),
    (64, (66, 30, 17)),
    (96, (238, 48, 26)),
    (128, (303, 110, 36)),
    (192, (300, 200, 110)),
    (_WHOLE, (_WHOLE, _WHOLE, _WHOLE)),
)


class SparseVLM(Inside):
    """Stages with fixed numbers of kept tokens, and merged ones beside them."""

    name: ClassVar[str] = "sparsevlm"
    positions: ClassVar[Literal["compact", "original"]] = "compact"
    reads_text: ClassVar[bool] = True

    def __init__(self, depth: int, options: Mapping[str, Any]) -> None:
        """`options`: as in `ENTRY`."""
        given = options["layers"]
        # A layer's output is what the next one reads.
        pruned = (
            scaled([layer + 1 for layer in _LAYERS], depth)
            if given is None
            else [layer + 1 for layer in listed(self.name, "layers", given, 0, depth - 2)]
        )
        one_of(self.name, options, "behaviour", BEHAVIOURS)
        one_of(self.name, options, "recycle", (True, False))
        super().__init__(depth, options["budget"], [PruneStage(layer - 1, layer) for layer in pruned])
        self._reference, self._recycle = options["behaviour"] == "reference", options["recycle"]

    # --- How many ----------------------------------------------------------------------------------------------------

    def steps(self, tokens: int, keep: int) -> list[Step]:  # noqa: D102 - as in Inside
        if self.budget == "reference":
            return self._steps(tokens, self._line(tokens, keep / tokens))
        limit, least = keep * self.depth, self._total(tokens, [1] * len(self.stages))
        if least > limit:
            way = "budget='reference' takes the authors' lists, whatever their average"
            raise self.refuse(tokens, keep, least, ways=[way])
        share = largest(lambda s: self._total(tokens, self._line(tokens, s)) <= limit)
        if share < 1:
            kept = fill(self._line(tokens, share), lambda numbers: self._checked(tokens, numbers), limit)
            return self._steps(tokens, kept)
        return self._steps(tokens, [tokens] * len(self.stages))

    def _line(self, tokens: int, share: float) -> list[int]:
        """Kept at each stage at a share of the budget: between two of the authors' lists."""
        at = share * _WHOLE
        (low, less), (high, more) = next(pair for pair in pairwise(_LISTS) if at <= pair[1][0] or pair[1][0] == _WHOLE)
        part = (at - low) / (high - low)
        line = [(a + part * (b - a)) / _WHOLE for a, b in zip(less, more, strict=True)]
        # More stages than the authors' go on with their last share.
        line += line[-1:] * (len(self.stages) - len(line))
        return [max(1, round(each * tokens)) for each in line[: len(self.stages)]]

    def _steps(self, tokens: int, kept: Sequence[int]) -> list[Step]:
        steps, there = list[Step](), tokens
        for number in kept:
            number = min(number, there - 1 if self._reference else there)
            steps.append(Step(number, clusters(there - number) if self._recycle else 0))
            there = steps[-1].tokens
        return steps

    def _total(self, tokens: int, kept: Sequence[int]) -> int:
        return sum(counts(self.depth, tokens, self.stages, self._steps(tokens, kept)))

    def _checked(self, tokens: int, kept: Sequence[int]) -> int | None:
        possible = all(step.kept == number for step, number in zip(self._steps(tokens, kept), kept, strict=True))
        return self._total(tokens, kept) if possible else None

    # --- Which -------------------------------------------------------------------------------------------------------

    def raters(self, vision_ND: Tensor, text_TD: Tensor) -> Tensor:  # noqa: D102
        attention_NT = (vision_ND.float() @ text_TD.float().T).softmax(1)
        received_T = attention_NT.mean(0)
        rates_T = received_T > received_T.mean()
        return rates_T | ~rates_T.any()

    def merge(self, dropped_GdD: Tensor, scores_Gd: Tensor, merged: int) -> tuple[Tensor, Tensor]:  # noqa: D102
        number = recycled(dropped_GdD.shape[1])
        best_Gr = scores_Gd.argsort(dim=1, descending=True, stable=True)[:, :number]
        tokens_GrD = dropped_GdD.gather(1, best_Gr[..., None].expand(-1, -1, dropped_GdD.shape[2]))
        with torch.no_grad():
            centres_Gc, belongs_Gr = cluster(tokens_GrD, merged, noise=self._reference)
        return means(tokens_GrD, belongs_Gr, merged), best_Gr.gather(1, centres_Gc)


def _build(family: Family, pruner: Any, options: Mapping[str, Any]) -> SparseVLM:
    no_pruner("sparsevlm", pruner)
    return SparseVLM(depth_of(family), options)


ENTRY = Entry(
    name="sparsevlm",
    acts="inside the LLM",
    needs_text=True,
    source="SparseVLM, arXiv 2410.04417 (first version)",
    random=False,
    trained=False,
    options={"budget": "average", "behaviour": "default", "layers": None, "recycle": True},
    build=_build,
    per_layer=per_layer(SparseVLM),
    text_asks=True,
)


def recycled(dropped: int) -> int:
    """How many of the dropped tokens are used again: three tenths, and one."""
    return min(dropped, int(0.3 * dropped) + 1)


def clusters(dropped: int) -> int:
    """How many tokens they become: a tenth, and one; none if nothing is dropped."""
    return int(recycled(dropped) / 10) + 1 if dropped else 0


def cluster(tokens_GrD: Tensor, number: int, *, noise: bool = False) -> tuple[Tensor, Tensor]:
    """Centres [G, c], numbers of tokens with the strongest first, and the cluster [G, r] that each token falls to.

    A token's density is exp of minus the mean squared distance (divided by the root of D) to its c nearest, itself
    among them; its reach is the distance to the nearest denser token. Centres have the largest product of both. Of
    equals the first token is denser, and the first is taken.

    Args:
        tokens_GrD: r of each image, at least c.
        number: c.
        noise: tell equal densities apart as the authors do, by noise of up to 1e-6; from a generator of its own.
    """
    tokens_GrD = tokens_GrD.float()
    count, width = tokens_GrD.shape[1:]
    distance_Grr = torch.cdist(tokens_GrD, tokens_GrD, compute_mode="donot_use_mm_for_euclid_dist") / width**0.5
    nearest_Grc = distance_Grr.topk(number, dim=2, largest=False).values
    density_Gr = (-nearest_Grc.square().mean(2)).exp()
    if noise:
        # In float32 the noise would be a few steps of rounding, and could leave densities equal.
        density_Gr = density_Gr.double()
        density_Gr = density_Gr + _NOISE * torch.rand(count, generator=torch.Generator().manual_seed(0)).to(density_Gr)
    order_r = torch.arange(count, device=tokens_GrD.device)
    first_rr = (order_r[None, :] < order_r[:, None]) & (not noise)
    equal_Grr = density_Gr[:, None, :] == density_Gr[:, :, None]
    denser_Grr = (density_Gr[:, None, :] > density_Gr[:, :, None]) | (equal_Grr & first_rr)
    farthest_G11 = distance_Grr.amax((1, 2), keepdim=True)
    reach_Gr = torch.where(denser_Grr, distance_Grr, farthest_G11).amin(2)
    centres_Gc = (reach_Gr * density_Gr).argsort(dim=1, descending=True, stable=True)[:, :number]
    to_centre_Grc = distance_Grr.gather(2, centres_Gc[:, None, :].expand(-1, count, -1))
    belongs_Gr = to_centre_Grc.argmin(2)
    ranks_c = torch.arange(number, device=tokens_GrD.device)
    return centres_Gc, belongs_Gr.scatter(1, centres_Gc, ranks_c.expand(len(tokens_GrD), -1))


def means(tokens_GrD: Tensor, belongs_Gr: Tensor, number: int) -> Tensor:
    """The mean of each cluster, [G, c, D], in the type of the tokens."""
    in_Gcr = torch.nn.functional.one_hot(belongs_Gr, number).transpose(1, 2).float()
    sums_GcD = in_Gcr @ tokens_GrD.float()
    return (sums_GcD / in_Gcr.sum(2, keepdim=True)).to(tokens_GrD.dtype)
