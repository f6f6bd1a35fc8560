"""SCOPE: each pick is the token that CLS attends to and that covers most of what no pick covers yet.

With a the attention that CLS pays to a token in the block whose output the LLM is fed from (mean over heads), S the
cosines of its hidden states and m what the picks cover of each token, at first 0, k times: the token j with the highest
a_j^alpha * sum_n max(0, S_nj - m_n); then m = max(m, S_.j) (eq. 6 to 8 of the paper). alpha is 1 at all budgets.
Nothing is merged.

Where the release differs (`behaviour="reference"`): `tiles="floor"`: each tile of LLaVA-NeXT has k // tiles tokens of
its own, so that fewer than k may stay; by default (`even`) the first tiles get what is left over. With `together` all
tokens of the image compete.

Letters: G images of a group, n tokens of a tile.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ocvtp.methods.base import Encoded, Entry, Method, behave, no_pruner
from ocvtp.methods.picking import RECEIVED, Picking, number
from ocvtp.methods.tiles import RELEASED_FLOOR
from ocvtp.selection import facility
from ocvtp.selection.cosines import cosines
from ocvtp.selection.greedy import picks
from ocvtp.vlms.family import Family
from ocvtp.vlms.images import Facts

_REFERENCE: Mapping[str, tuple[Any, Any]] = {"tiles": ("even", "floor")}


class Scope(Picking):
    """Saliency times coverage."""

    def __init__(self, facts: Facts, options: Mapping[str, Any]) -> None:
        super().__init__("scope", facts, options["tiles"])
        self._alpha = number("scope", options, "alpha", 0, 16)

    def features(self, encoded: Encoded) -> Mapping[str, Tensor]:  # noqa: D102 - as in Picking
        return {
            "tokens": encoded.tokens(self.facts.feature_layer),
            "attention": encoded.attention(self.block, cls=self.facts.cls),
        }

    def pick(self, keep: int, **seen: Tensor) -> Tensor:  # noqa: D102
        likeness_Gnn = cosines(seen["tokens"]).clamp(min=0)
        exists_Gn = likeness_Gnn.new_ones(likeness_Gnn.shape[:2]).bool()
        weights_Gn = seen["attention"].float() ** self._alpha
        return picks(exists_Gn, keep, *facility.begin(likeness_Gnn, exists_Gn, weights_Gn))


def _build(family: Family, pruner: Any, options: Mapping[str, Any]) -> Method:
    no_pruner("scope", pruner)
    return Scope(family.facts, behave("scope", options, _REFERENCE))


ENTRY = Entry(
    name="scope",
    acts="before the LLM",
    needs_text=False,
    source="SCOPE, NeurIPS 2025, github.com/kinredon/SCOPE",
    random=False,
    trained=False,
    options={"behaviour": "default", "alpha": 1.0, "tiles": None},
    build=_build,
    without_cls=RECEIVED,
    loses=RELEASED_FLOOR,
)
