"""DivPrune: the tokens that are farthest from each other, by a greedy way to the max-min distance.

On all tokens as the LLM would read them, with one minus the cosine for distance: first the token farthest from its
nearest neighbour, then k - 1 times the one farthest from its nearest pick (section 3 of the paper; its code has a
licence of its own and was not read). `ocvtp.selection.fps` is the same on the tower's tokens, from another first pick.
Of LLaVA-NeXT each tile has its share of the budget (`tiles`, as in `visionzip`).

Letters: G images of a group.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ocvtp.methods.base import Encoded, Entry, Method, no_pruner
from ocvtp.methods.picking import Picking
from ocvtp.methods.tiles import FLOOR
from ocvtp.selection.fps import fps
from ocvtp.vlms.family import Family


class DivPrune(Picking):
    """Farthest points, from the loneliest one on."""

    def features(self, encoded: Encoded) -> Mapping[str, Tensor]:  # noqa: D102 - as in Picking
        return {"tokens": encoded.projected()}

    def pick(self, keep: int, **seen: Tensor) -> Tensor:  # noqa: D102
        return fps(seen["tokens"], keep, first="lonely")


def _build(family: Family, pruner: Any, options: Mapping[str, Any]) -> Method:
    no_pruner("divprune", pruner)
    return DivPrune("divprune", family.facts, options["tiles"])


ENTRY = Entry(
    name="divprune",
    acts="before the LLM",
    needs_text=False,
    source="DivPrune, arXiv 2503.02175 (from the paper)",
    random=False,
    trained=False,
    options={"tiles": "even"},
    build=_build,
    loses=FLOOR,
)
