"""SparseVLM: words of the prompt that look at the image rate its tokens; part of what is dropped is merged.

Version 1.5 of the authors' code (March 2025; the first one prunes at layers 2, 6, 15 and 19 by the rank of attention;
version 2 is `sparsevlm-plus`). Once, on the embeddings that layer 0 reads: every image token spreads its
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

from torch import Tensor

from ocvtp.methods.base import BEHAVIOURS, Entry, no_pruner, one_of
from ocvtp.methods.inside import Inside, PruneStage, Step, counts, depth_of, fill, largest, listed, per_layer, scaled
from ocvtp.selection import density_peaks
from ocvtp.vlms.family import Family

_LAYERS = (2, 6, 15)
_WHOLE = 576
Lists = Sequence[tuple[int, tuple[int, int, int]]]
_LISTS: Lists = (
    (0, (0, 0, 0)),
    (64, (66, 30, 17)),
    (96, (238, 48, 26)),
    (128, (303, 110, 36)),
    (192, (300, 200, 110)),
    (_WHOLE, (_WHOLE, _WHOLE, _WHOLE)),
)


class SparseVLM(Inside):
    """Stages with fixed numbers of kept tokens, and merged ones beside them."""

    name: str = "sparsevlm"
    positions: Literal["compact", "original"] = "compact"
    reads_text: bool = True
    lists: ClassVar[Lists] = _LISTS
    """Of the authors: kept at each stage, by budget, of 576 tokens."""

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
        self.reference, self._recycle = options["behaviour"] == "reference", options["recycle"]

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
        (low, less), (high, more) = next(
            pair for pair in pairwise(self.lists) if at <= pair[1][0] or pair[1][0] == _WHOLE
        )
        part = (at - low) / (high - low)
        line = [(a + part * (b - a)) / _WHOLE for a, b in zip(less, more, strict=True)]
        # More stages than the authors' go on with their last share.
        line += line[-1:] * (len(self.stages) - len(line))
        return [max(1, round(each * tokens)) for each in line[: len(self.stages)]]

    def _steps(self, tokens: int, kept: Sequence[int]) -> list[Step]:
        steps, there = list[Step](), tokens
        for number in kept:
            number = min(number, there - 1 if self.reference else there)
            steps.append(Step(number, density_peaks.clusters(there - number) if self._recycle else 0))
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
        return density_peaks.merged(dropped_GdD, scores_Gd, merged, noise=self.reference)


def _build(family: Family, pruner: Any, options: Mapping[str, Any]) -> SparseVLM:
    no_pruner("sparsevlm", pruner)
    return SparseVLM(depth_of("sparsevlm", family), options)


ENTRY = Entry(
    name="sparsevlm",
    acts="inside the LLM",
    needs_text=True,
    source="SparseVLM, arXiv 2410.04417 (version 1.5)",
    random=False,
    trained=False,
    options={"budget": "average", "behaviour": "default", "layers": None, "recycle": True},
    build=_build,
    per_layer=per_layer(SparseVLM),
    text_asks=True,
)
