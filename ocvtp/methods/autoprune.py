"""AutoPrune: a curve of budgets over the layers, as steep as the text and the image say, and merging at each layer.

1. After layer 0 the n = min(2.5 k, N) tokens with the highest a + 0.3 I_0 t stay: a is the attention that CLS pays to
   a token in the tower's block before the layer that the LLM is fed from (mean over heads), t the attention that it
   receives from the text after the image (mean over heads and words), I_0 the mutual information of words and tokens
   in layer 0 (below), divided by the number of words.
2. After each later layer l, ceil((n - 1) min(1, s p_l)) tokens stay, those with the highest t of that layer; of the
   others the best three tenths are clustered to a tenth as many, whose means are put after the kept tokens, as in
   `sparsevlm`. p_l = 0.75 / (1 + exp(c (l - 14.9 - c))) with l of 32 layers (at the same share of others), and
   c = max(0.4 - 0.2 I_1, 0), I_1 being the mutual information in layer 1. The scale s makes the cost that of the
   budget, whatever c is.
3. The mutual information of a layer is the sum over heads of that of words (all equally likely) and tokens, in bits,
   with the attention of words to tokens for the probability of a token given a word. As in the release that attention
   is not brought to a sum of 1.

Attention is needed at every layer, but its rows of words alone: they are computed from queries and keys, and SDPA stays
on. I_1 decides how many tokens stay, so that each call waits once for the device.

Budgets: `reference` counts what leaves each layer, as the authors do: n = min(int(2.5 k), N), and s the one whose
average is nearest (their bisection; as layer 0 reads everything, the true averages at 64, 128 and 192 on 32 layers are
81.8, 145.6 and 209.5). `average` counts what layers read: with m the mean that the budget leaves to layers after the
first, n = min(int(2.5 m), N), and the largest s whose average stays within it.

`behaviour="reference"`: clustering tells equal densities apart by noise.

Letters: I images, N tokens of an image, R words, H heads, T columns.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from ocvtp.errors import BadInput
from ocvtp.methods.base import BEHAVIOURS, Encoded, Entry, Kept, no_pruner, one_of
from ocvtp.methods.inside import HeadRows, Inside, PruneStage, Scored, Step, depth_of, per_layer
from ocvtp.methods.picking import RECEIVED
from ocvtp.selection import density_peaks
from ocvtp.vlms.family import Family
from ocvtp.vlms.images import Facts

_FIRST, _TEXT, _DEPTH = 2.5, 0.3, 32
_TOP, _MIDDLE, _STEEP, _GAMMA = 0.75, 14.9, 0.4, 0.2
_TINY = 1e-6
_NOMINAL = 0.2
"""c of the plan that is made before anything is read."""
_GRAIN = 1000
"""c is rounded to so many parts, so that plans are made once."""


class AutoPrune(Inside):
    """A stage after each layer but the last."""

    name: str = "autoprune"
    positions: Literal["compact", "original"] = "compact"
    reads_text: bool = True
    adapts_at: int | None = 1

    def __init__(self, depth: int, options: Mapping[str, Any], facts: Facts | None = None) -> None:
        """`options`: as in `ENTRY`; without `facts` it can be planned, not run."""
        one_of(self.name, options, "behaviour", BEHAVIOURS)
        super().__init__(depth, options["budget"], [PruneStage(layer, layer + 1) for layer in range(depth - 1)])
        self._facts, self._reference = facts, options["behaviour"] == "reference"

    # --- The tower ---------------------------------------------------------------------------------------------------

    def layers(self) -> Collection[int]:  # noqa: D102 - as in Method
        return {self._of_tower.feature_layer - 1}

    @property
    def _of_tower(self) -> Facts:
        assert self._facts is not None  # noqa: S101 - else it is only planned
        return self._facts

    def choose(self, encoded: Encoded) -> Kept:
        """All tokens, with the attention of CLS."""
        attention_GN = encoded.attention(self._of_tower.feature_layer - 1, cls=self._of_tower.cls)
        numbers_N = torch.arange(encoded.count, device=attention_GN.device)
        return Kept(numbers_N.expand(len(attention_GN), -1), None, attention_GN)

    # --- How many ----------------------------------------------------------------------------------------------------

    def steps(self, tokens: int, keep: int) -> list[Step]:  # noqa: D102 - as in Inside
        return self._steps(tokens, keep, _NOMINAL)

    def adapted(self, tokens: int, keep: int, information: float) -> list[Step]:  # noqa: D102
        return self._steps(tokens, keep, max(_STEEP - _GAMMA * information, 0.0))

    def _steps(self, tokens: int, keep: int, steepness: float) -> list[Step]:
        if keep >= tokens:
            return [Step(tokens) for _ in self.stages]
        if self.budget == "average":
            least = tokens + _total(plan(1, self.depth, 0.0, 0.0)[:-1])
            if least > keep * self.depth:
                way = "budget='reference' counts what leaves each layer instead"
                raise self.refuse(tokens, keep, least, ways=[way])
        steepness = round(steepness * _GRAIN) / _GRAIN
        return list(_found(tokens, keep, self.depth, steepness, average=self.budget == "average"))

    # --- Which -------------------------------------------------------------------------------------------------------

    def raters(self, vision_ND: Tensor, text_TD: Tensor) -> Tensor:
        """Every token of the text after the image."""
        return torch.ones(len(text_TD), dtype=torch.bool, device=text_TD.device)

    def score(self, scored: Scored) -> Tensor:  # noqa: D102
        return scored.attention() if scored.stage else scored.attention(_first) + scored.tower_IN

    def information(self, scored: Scored) -> Tensor:  # noqa: D102
        # Every column has the same number; that of the first token is asked for.
        return scored.attention(lambda rows: mutual_information(rows)[:, None].expand_as(rows.vision_IT))[:, 0]

    def merge(self, dropped_GdD: Tensor, scores_Gd: Tensor, merged: int) -> tuple[Tensor, Tensor]:  # noqa: D102
        return density_peaks.merged(dropped_GdD, scores_Gd, merged, noise=self._reference)


def mutual_information(rows: HeadRows) -> Tensor:
    """Of words and image tokens, in bits, summed over heads, [I]."""
    words_I111 = rows.real_IR.sum(1)[:, None, None, None]
    both_IHRT = rows.weights_IHRT * rows.real_IR[:, None, :, None] * rows.vision_IT[:, None, None] / words_I111
    token_IH1T = both_IHRT.sum(2, keepdim=True)
    ratio_IHRT = both_IHRT / (token_IH1T / words_I111 + _TINY)
    return (both_IHRT * ratio_IHRT.clamp(min=_TINY).log2()).sum((1, 2, 3))


def _first(rows: HeadRows) -> Tensor:
    """What layer 0 adds to the attention of CLS, [I, T]."""
    words_I1 = rows.real_IR.sum(1, keepdim=True)
    text_IT = (rows.weights_IHRT.mean(1) * rows.real_IR[..., None]).sum(1) / words_I1
    return _TEXT * mutual_information(rows)[:, None] / words_I1 * text_IT


def plan(first: int, depth: int, steepness: float, scale: float) -> list[Step]:
    """What stays after each layer, where `first` tokens stay after layer 0."""
    steps, there = [Step(first)], first
    for layer in range(1, depth):
        place = layer * _DEPTH / depth
        share = _TOP / (1 + math.exp(steepness * (place - _MIDDLE - steepness)))
        kept = min(max(1, math.ceil((first - 1) * min(1.0, scale * share))), there)
        steps.append(Step(kept, density_peaks.clusters(there - kept)))
        there = steps[-1].tokens
    return steps


@lru_cache(maxsize=1024)
def _found(tokens: int, keep: int, depth: int, steepness: float, *, average: bool) -> tuple[Step, ...]:
    """The plan that meets the budget."""
    mean = (keep * depth - tokens) / (depth - 1) if average else keep
    first = max(1, min(int(_FIRST * mean), tokens))
    low, high, best, nearest = 0.0, 20.0, plan(first, depth, steepness, 0.0), math.inf
    for _ in range(100):
        middle = (low + high) / 2
        steps = plan(first, depth, steepness, middle)
        # What layers read; or what leaves them, the last one too.
        over = (tokens + _total(steps[:-1]) if average else _total(steps)) - keep * depth
        if abs(over) < nearest and (over <= 0 or not average):
            nearest, best = abs(over), steps
        low, high = (low, middle) if over > 0 else (middle, high)
    while average and tokens + _total(best[:-1]) > keep * depth and first > 1:
        first -= 1
        best = plan(first, depth, steepness, 0.0)
    return tuple(best[:-1])


def _total(steps: Sequence[Step]) -> int:
    return sum(step.tokens for step in steps)


def _build(family: Family, pruner: Any, options: Mapping[str, Any]) -> AutoPrune:
    no_pruner("autoprune", pruner)
    depth = depth_of("autoprune", family)
    if depth < 3:
        raise BadInput(f"autoprune drops tokens after two layers at least, but the language model has {depth}")
    return AutoPrune(depth, options, family.facts)


ENTRY = Entry(
    name="autoprune",
    acts="inside the LLM",
    needs_text=True,
    source="AutoPrune, NeurIPS 2025, github.com/AutoLab-SAI-SJTU/AutoPrune",
    options={"budget": "average", "behaviour": "default"},
    build=_build,
    per_layer=per_layer(AutoPrune),
    text_asks=True,
    without_cls=RECEIVED,
)
