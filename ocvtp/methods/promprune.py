"""PromPrune: images that show much that differs keep diverse tokens, others what CLS attends to.

H is the entropy of the spectrum of an image's tokens as the LLM would read them, at unit length and centred, divided by
the logarithm of how many eigenvalues there are. Of the budget k, round(rho k) tokens are those with the highest
attention of CLS in the block whose output the LLM is fed from (mean over heads), with
rho = 1 - sigmoid((H - mu) / tau), mu = 0.42 and tau = 0.02 at all budgets. The rest are greedy picks of a determinantal
point process with the cosines of the tokens that are left for its kernel, begun with the token whose most similar of
those chosen by attention is least similar. Nothing is merged.

Where the release differs (`behaviour="reference"`; each is one option): `order="picked"` hands tokens on as they were
picked, by default as they stand in the image; `tiles="floor"` gives each tile of LLaVA-NeXT k // tiles tokens of its
own, by default (`even`) the first tiles get what is left over.

Letters: G images of a group, n tokens of a tile, k tokens kept of it.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ocvtp.methods.base import Encoded, Entry, Method, behave, no_pruner
from ocvtp.methods.picking import RECEIVED, Picking, number
from ocvtp.methods.tiles import RELEASED_FLOOR
from ocvtp.selection.cosines import unit
from ocvtp.selection.dpp import dpp
from ocvtp.selection.greedy import TIE
from ocvtp.selection.ranking import ranked
from ocvtp.vlms.family import Family
from ocvtp.vlms.images import Facts

_REFERENCE: Mapping[str, tuple[Any, Any]] = {"order": ("raster", "picked"), "tiles": ("even", "floor")}
_TINY = 1e-12


class PromPrune(Picking):
    """Attention and diversity, in a mixture that follows the image."""

    def __init__(self, facts: Facts, options: Mapping[str, Any]) -> None:
        super().__init__("promprune", facts, options["tiles"], options["order"])
        self._mu = number("promprune", options, "mu", 0, 1)
        self._tau = number("promprune", options, "tau", 1e-6, 100)

    def features(self, encoded: Encoded) -> Mapping[str, Tensor]:  # noqa: D102 - as in Picking
        return {"tokens": encoded.projected(), "attention": encoded.attention(self.block, cls=self.facts.cls)}

    def pick(self, keep: int, **seen: Tensor) -> Tensor:  # noqa: D102
        unit_GnD, order_Gn = unit(seen["tokens"]), ranked(seen["attention"])
        count = order_Gn.shape[1]
        share_G = 1 - torch.sigmoid(((entropy(unit_GnD) - self._mu) / self._tau).clamp(-20, 20))
        first_G1 = (share_G * keep).round().long()[:, None]
        place_n = torch.arange(count, device=order_Gn.device)
        chosen_Gn = torch.zeros_like(order_Gn, dtype=torch.bool).scatter(1, order_Gn, place_n < first_G1)
        likest_Gn = self._likest(unit_GnD, order_Gn[:, :keep], place_n[:keep] < first_G1, chosen_Gn)
        # As in greedy picks: of those that are equal but for rounding the lower number.
        least_Gn = likest_Gn <= likest_Gn.amin(1, keepdim=True) + TIE
        begin_G = torch.where(first_G1[:, 0] > 0, least_Gn.to(torch.uint8).argmax(1), 0)
        diverse_Gk = dpp(unit_GnD, keep, exists_BN=~chosen_Gn, first_B=begin_G)
        # As many as each image may have by attention, then its first picks.
        place_k = place_n[:keep]
        return torch.where(
            place_k < first_G1, order_Gn[:, :keep], diverse_Gk.gather(1, (place_k - first_G1).clamp(min=0))
        )

    def _likest(self, unit_GnD: Tensor, first_Gk: Tensor, there_Gk: Tensor, chosen_Gn: Tensor) -> Tensor:
        """Cosine of each token to the most similar of those chosen by attention; infinite for these."""
        to_GkD = unit_GnD.gather(1, first_Gk[..., None].expand(-1, -1, unit_GnD.shape[2]))
        likeness_Gnk = (unit_GnD @ to_GkD.transpose(1, 2)).masked_fill(~there_Gk[:, None], -torch.inf)
        return likeness_Gnk.amax(2).masked_fill(chosen_Gn, torch.inf)


def entropy(unit_GnD: Tensor) -> Tensor:
    """Of the spectrum of tokens at unit length, centred, from 0 to 1, [G]. Costs n^2 D and an eigenvalue problem."""
    centred_GnD = unit_GnD - unit_GnD.mean(1, keepdim=True)
    count, width = centred_GnD.shape[1:]
    if count <= width:
        inner_Gee = centred_GnD @ centred_GnD.transpose(1, 2)
    else:
        inner_Gee = centred_GnD.transpose(1, 2) @ centred_GnD
    spectrum_Ge = torch.linalg.eigvalsh(inner_Gee).clamp(min=_TINY)
    share_Ge = spectrum_Ge / spectrum_Ge.sum(1, keepdim=True)
    entropy_G: Tensor = -(share_Ge * share_Ge.log()).sum(1) / math.log(max(2, spectrum_Ge.shape[1]))
    return entropy_G


def _build(family: Family, pruner: Any, options: Mapping[str, Any]) -> Method:
    no_pruner("promprune", pruner)
    return PromPrune(family.facts, behave("promprune", options, _REFERENCE))


ENTRY = Entry(
    name="promprune",
    acts="before the LLM",
    needs_text=False,
    source="PromPrune, arXiv 2603.14892",
    random=False,
    trained=False,
    options={"behaviour": "default", "mu": 0.42, "tau": 0.02, "order": None, "tiles": None},
    build=_build,
    without_cls=RECEIVED,
    loses=RELEASED_FLOOR,
)
