"""DART: image tokens with long keys, and those least like them and like words with long keys, stay.

Layers 0 to K - 1 read everything. In layer K - 1 the keys of each token have a length, the sum of their absolute values
over all heads, at their positions. Pivots are the 4 image tokens and the 4 tokens of the text after the image whose
keys are longest. Then pivot after pivot, those of the image first, each from the longest keys on: of the image tokens
that are not chosen yet, those whose hidden states before layer K (after the model's last norm) have the lowest cosine
with the pivot's stay, an equal number for each pivot. Nothing is merged, and every token keeps its position.

K is 2 in a model of 32 layers, at the same share in others and never 0 (`ocvtp.methods.inside`). No attention is read.

Budgets: `average` solves (K N + (L - K) n) / L = keep for n, rounded down. `reference` counts as the authors'
evaluation does: n = keep tokens after layer K.

Where the release differs (`behaviour="reference"`): of the rest of the budget each of the 8 pivots has
int(n / 8) tokens, so that 4 + 8 int(n / 8) stay, more or fewer than n; by default n stay, pivots are among them, and
the first pivots have one more where it does not divide. The release also goes through pivots in the order of a Python
set, which is that of no rule. Where the text has fewer than 4 tokens, there are fewer pivots.

Letters: I images, N tokens of an image, R tokens that ask, D width of the LLM, P pivots.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from ocvtp.methods.base import BEHAVIOURS, Entry, no_pruner, one_of, whole
from ocvtp.methods.inside import Inside, Later, PruneStage, Scored, Step, depth_of, listed, per_layer, scaled
from ocvtp.methods.tiles import share_evenly
from ocvtp.selection.cosines import cosines
from ocvtp.selection.ranking import ranked, rows
from ocvtp.vlms.family import Family

_K = 2


class Dart(Inside):
    """One stage."""

    name: str = "dart"
    positions: Literal["compact", "original"] = "original"
    reads_text: bool = True
    reads_later: bool = True

    def __init__(self, depth: int, options: Mapping[str, Any]) -> None:
        """`options`: as in `ENTRY`."""
        for option in ("k", "image_pivots", "text_pivots"):
            whole(self.name, options, option, 1)
        one_of(self.name, options, "behaviour", BEHAVIOURS)
        k = options["k"]
        layers = scaled([_K], depth) if k is None else listed(self.name, "k", [k], 1, depth - 1)
        super().__init__(depth, options["budget"], [PruneStage(layer - 1, layer) for layer in layers])
        self._image, self._text = int(options["image_pivots"]), int(options["text_pivots"])
        self._reference = options["behaviour"] == "reference"

    def steps(self, tokens: int, keep: int) -> list[Step]:  # noqa: D102 - as in Inside
        if keep >= tokens:
            return [Step(tokens)]
        first, after = self.stages[0].pruned, self.depth - self.stages[0].pruned
        kept = keep if self.budget == "reference" else (keep * self.depth - first * tokens) // after
        if kept < 1:
            way = f"budget='reference' counts {keep} tokens after layer {first} instead"
            raise self.refuse(tokens, keep, first * tokens + after, ways=[way])
        if self._reference:
            kept = self._image + (self._image + self._text) * (kept // (self._image + self._text))
        return [Step(min(kept, tokens))]

    def raters(self, vision_ND: Tensor, text_TD: Tensor) -> Tensor:
        """Every token of the text after the image."""
        return torch.ones(len(text_TD), dtype=torch.bool, device=text_TD.device)

    def score(self, scored: Scored) -> Tensor:  # noqa: D102 - as in Inside
        return scored.keys()[0]

    def rank(self, scores_IN: Tensor, later: Later) -> Tensor:
        """1 for tokens that stay, 0 for others."""
        chosen_IN = torch.zeros_like(later.there_IN)
        groups: dict[tuple[int, int, int], list[int]] = {}
        for image, key in enumerate(zip(later.counts, later.kept, later.asking, strict=True)):
            groups.setdefault(key, []).append(image)
        for (count, kept, asking), members in groups.items():
            some = torch.tensor(members, device=scores_IN.device)
            asks_Ir = ranked(later.asks_IR[some].to(torch.uint8))[:, :asking]
            asks_IrD = later.asks_IRD[some[:, None], asks_Ir]
            lengths_Ir = later.asks_keys_IR[some[:, None], asks_Ir]
            chosen_In = self._chosen(
                later.states_IND[some, :count], scores_IN[some, :count], asks_IrD, lengths_Ir, kept
            )
            chosen_IN[some, :count] = chosen_In
        return chosen_IN.float()

    def _chosen(self, states_IND: Tensor, keys_IN: Tensor, asks_IRD: Tensor, asks_IR: Tensor, kept: int) -> Tensor:
        """True at those that stay, [I, N], of images with as many tokens."""
        own = min(self._image, kept)
        pivots_Ip = ranked(keys_IN)[:, :own]
        words_Ip = ranked(asks_IR)[:, : self._text]
        pivots_IPD = torch.cat([rows(states_IND, pivots_Ip), rows(asks_IRD, words_Ip)], 1)
        likeness_IPN = cosines(pivots_IPD, states_IND)
        chosen_IN = torch.zeros_like(keys_IN, dtype=torch.bool).scatter(1, pivots_Ip, value=True)
        for pivot, more in enumerate(share_evenly(kept - own, [kept] * pivots_IPD.shape[1])):
            # Of those that are chosen already none is least like.
            order_IN = ranked(-likeness_IPN[:, pivot].masked_fill(chosen_IN, torch.inf))
            chosen_IN = chosen_IN.scatter(1, order_IN[:, :more], value=True)
        return chosen_IN


def _build(family: Family, pruner: Any, options: Mapping[str, Any]) -> Dart:
    no_pruner("dart", pruner)
    return Dart(depth_of("dart", family), options)


ENTRY = Entry(
    name="dart",
    acts="inside the LLM",
    needs_text=True,
    source="DART, arXiv 2502.11494",
    options={"budget": "average", "behaviour": "default", "k": None, "image_pivots": 4, "text_pivots": 4},
    build=_build,
    positions="original",
    per_layer=per_layer(Dart),
    text_asks=True,
)
