"""VisPruner: half of the budget to the tokens that CLS attends to, half to others that are not much alike.

Important are the k // 2 tokens with the highest attention of CLS in the block whose output the LLM is fed from (mean
over heads). The others, from the highest attention to the lowest, lose duplicates in rounds until as many are left as
the rest of the budget: the first, third, ... are compared with the second, fourth, ... by the cosine of their hidden
states, and the 8 of the former whose nearest of the latter is nearest go (fewer in the last round). What is left of
the former, from the most alike to the least, then stands before the latter. Nothing is merged.

`important` is the share of the budget (0.5 in the release), `removed` how many go in a round (8). Of LLaVA-NeXT each
tile has its share of the budget (`tiles`, as in `visionzip`).

Letters: G images of a group, n tokens of a tile, R tokens left, A and E every other one of them.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ocvtp.methods.base import Encoded, Entry, Method, behave, no_pruner, whole
from ocvtp.methods.picking import RECEIVED, Picking, number
from ocvtp.methods.tiles import RELEASED_FLOOR
from ocvtp.selection.cosines import cosines
from ocvtp.selection.ranking import ranked
from ocvtp.vlms.family import Family
from ocvtp.vlms.images import Facts

_REFERENCE: Mapping[str, tuple[Any, Any]] = {"tiles": ("even", "floor")}


class VisPruner(Picking):
    """Important and diverse tokens."""

    def __init__(self, facts: Facts, options: Mapping[str, Any]) -> None:
        super().__init__("vispruner", facts, options["tiles"])
        whole("vispruner", options, "removed", 1)
        self._important, self._removed = number("vispruner", options, "important", 0, 1), int(options["removed"])

    def features(self, encoded: Encoded) -> Mapping[str, Tensor]:  # noqa: D102 - as in Picking
        return {
            "tokens": encoded.tokens(self.facts.feature_layer),
            "attention": encoded.attention(self.block, cls=self.facts.cls),
        }

    def pick(self, keep: int, **seen: Tensor) -> Tensor:  # noqa: D102
        important = int(self._important * keep)
        order_Gn, left = ranked(seen["attention"]), keep - important
        if not left:
            return order_Gn[:, :keep]
        likeness_Gnn, residual_GR = cosines(seen["tokens"]), order_Gn[:, important:]
        while residual_GR.shape[1] > left:
            former_GA, latter_GE = residual_GR[:, ::2], residual_GR[:, 1::2]
            pairs_GAE = former_GA[..., None] * likeness_Gnn.shape[2] + latter_GE[:, None]
            near_GA = likeness_Gnn.flatten(1).gather(1, pairs_GAE.flatten(1)).view_as(pairs_GAE).amax(2)
            gone = min(self._removed, residual_GR.shape[1] - left)
            residual_GR = torch.cat([former_GA.gather(1, ranked(near_GA)[:, gone:]), latter_GE], 1)
        return torch.cat([order_Gn[:, :important], residual_GR], 1)


def _build(family: Family, pruner: Any, options: Mapping[str, Any]) -> Method:
    no_pruner("vispruner", pruner)
    return VisPruner(family.facts, behave("vispruner", options, _REFERENCE))


ENTRY = Entry(
    name="vispruner",
    acts="before the LLM",
    needs_text=False,
    source="VisPruner, ICCV 2025, arXiv 2412.01818",
    random=False,
    trained=False,
    options={"behaviour": "default", "important": 0.5, "removed": 8, "tiles": None},
    build=_build,
    without_cls=RECEIVED,
    loses=RELEASED_FLOOR,
)
