"""HiPrune: objects from a middle layer of the tower, with their surroundings, and the rest from a deep layer.

With g the attention that a token receives in a block (mean over heads and queries) and k the budget:

1. anchors: the a = round(alpha k / 5) tokens with the highest g in the block after `object_layer`;
2. buffers: their neighbours left, right, above and below;
3. registers: of all others those with the highest g in the block whose output the LLM is fed from, until there are k.

Anchors and buffers that do not fit, which alpha = 0.1 never has, stay out in the order of the register's g.

As the authors have it, `object_layer` is 9 of the 24 blocks of LLaVA's tower and 16 of the 32 of Qwen2.5-VL's; towers
of another depth are read at the same share of it. alpha is 0.1 at all budgets: a = 4, 3 and 1 at 192, 128 and 64.

Where the release differs (`behaviour="reference"`; each is one option):

- `edges="wrap"`: neighbours are the numbers -1, +1, - columns, + columns, held within the image, so that a token at an
  edge has one in the row above or below for a neighbour, or itself.
- `tiles="floor"`: each tile of LLaVA-NeXT has k // tiles tokens of its own, so that fewer than k may stay; by default
  (`even`) the first tiles get what is left over. With `together` all tokens of the image compete.
- `exclude="minus one"`: registers are kept off taken tokens by taking 1 from their g. In the release for Qwen2.5-VL g
  is a sum over queries, so that this may not suffice, and fewer than k stay.

Letters: G images of a group, N tokens of an image, k kept, a anchors.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from ocvtp.errors import BadInput
from ocvtp.methods.base import Encoded, Entry, Kept, Method, behave, no_pruner, one_of, whole
from ocvtp.methods.tiles import RELEASED_FLOOR, TILES, budgets, neighbours
from ocvtp.selection.ranking import ascending, highest, ranked
from ocvtp.vlms.family import Family
from ocvtp.vlms.images import Facts, Layout, Part

_REFERENCE: Mapping[str, tuple[Any, Any]] = {
    "edges": ("cut", "wrap"),
    "tiles": ("even", "floor"),
    "exclude": ("always", "minus one"),
}


class HiPrune(Method):
    """Anchors, buffers and registers."""

    fewer: bool = True  # tiles="floor" and exclude="minus one" lose some
    by_states = True

    def __init__(self, facts: Facts, shallow: int, options: Mapping[str, Any], merged: int = 1) -> None:
        """`shallow` is the number of the block that anchors come from, `merged` the queries that make one token."""
        self._shallow, self._deep, self._merged = shallow, facts.feature_layer - 1, merged
        self._cls, self._options = facts.cls, options

    def layers(self) -> Collection[int]:  # noqa: D102 - as in Method
        return {self._shallow, self._deep}

    def choose(self, encoded: Encoded) -> Kept:  # noqa: D102
        shallow_GN, deep_GN = encoded.received(self._shallow), encoded.received(self._deep)
        if self._options["tiles"] == "together":
            return Kept(self._pick(shallow_GN, deep_GN, encoded.layout, encoded.keep))
        found = []
        for members_n, grid, keep in budgets(encoded.layout, encoded.keep, self._options["tiles"], shallow_GN.device):
            picked_Gk = self._pick(shallow_GN[:, members_n], deep_GN[:, members_n], (Part(0, grid),), keep)
            found.append(torch.where(picked_Gk < 0, picked_Gk, members_n[picked_Gk]))
        return Kept(ascending(torch.cat(found, 1)))

    def _pick(self, shallow_GN: Tensor, deep_GN: Tensor, layout: Layout, keep: int) -> Tensor:
        """Numbers of the tokens that stay, ascending; -1 at the end for those that are missing."""
        wrap, alpha = self._options["edges"] == "wrap", self._options["alpha"]
        table_N4 = neighbours(layout, shallow_GN.device, wrap=wrap)
        anchors_Ga = highest(shallow_GN, round(alpha * keep / 5))
        # One column more takes what is marked beyond the edges, and is cut off.
        rank_GN = torch.zeros(len(shallow_GN), shallow_GN.shape[1] + 1, dtype=torch.int8, device=shallow_GN.device)
        rank_GN.scatter_(1, table_N4[anchors_Ga].flatten(1) % rank_GN.shape[1], 1)
        rank_GN = rank_GN.scatter_(1, anchors_Ga, 2)[:, :-1]
        if self._options["exclude"] == "minus one":
            return self._minus_one(rank_GN > 0, deep_GN, keep)
        return ascending(ranked(deep_GN, rank_GN)[:, :keep])

    def _minus_one(self, taken_GN: Tensor, deep_GN: Tensor, keep: int) -> Tensor:
        """Registers as the release has them: of all tokens, those that are taken with 1 less."""
        if not self._cls:
            deep_GN = deep_GN * (deep_GN.shape[1] * self._merged)
        order_GN = ranked(deep_GN - taken_GN.float())
        place_GN = torch.arange(order_GN.shape[1], device=order_GN.device).expand_as(order_GN)
        registers_GN = torch.zeros_like(order_GN).scatter_(1, order_GN, place_GN) < keep - taken_GN.sum(1, keepdim=True)
        numbers_GN = place_GN.masked_fill(~(taken_GN | registers_GN), -1)
        return ascending(numbers_GN)[:, :keep]


def _build(family: Family, pruner: Any, options: Mapping[str, Any]) -> Method:
    no_pruner("hiprune", pruner)
    options = behave("hiprune", options, _REFERENCE)
    for option, legal in {**_REFERENCE, "tiles": TILES}.items():
        one_of("hiprune", options, option, legal)
    whole("hiprune", options, "object_layer", 1)
    alpha = options["alpha"]
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 <= alpha <= 1:
        raise BadInput(f"hiprune has no alpha={alpha!r}: a number from 0 to 1 is needed, such as 0.1")
    facts, layer = family.facts, options["object_layer"]
    if layer is None:
        layer = max(1, int(facts.depth * (9 / 24 if facts.cls else 16 / 32) + 0.5))
    side = getattr(family.model.config.vision_config, "spatial_merge_size", 1)
    return HiPrune(facts, family.index(layer) - 1, options, side * side)


ENTRY = Entry(
    name="hiprune",
    acts="before the LLM",
    needs_text=False,
    source="HiPrune, github.com/Danielement321/HiPrune",
    random=False,
    trained=False,
    options={
        "behaviour": "default",
        "object_layer": None,
        "alpha": 0.1,
        "edges": None,
        "tiles": None,
        "exclude": None,
    },
    build=_build,
    loses={**RELEASED_FLOOR, "exclude": ("minus one",)},
)
