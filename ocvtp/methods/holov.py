"""HoloV: an image in strips, each of which keeps tokens in proportion to what CLS sees in it.

The tokens of an image, in their order, are cut into 16 strips of equal length, the first longer by one where they do
not divide. With a the attention that CLS pays in the block whose output the LLM is fed from (mean over heads) and v the
variance of a token's cosines with the others of its strip, as the LLM would read them, a token's score is
10^3 a + 0.09 v mean(10^3 a) / mean(v), with means over the strip. A strip keeps in proportion to its mean score: the
whole tokens of its share, and the strips with the most get one of what is left over; in each the highest a stay.

As v is divided by its own mean, the second term adds nine hundredths to the score of every strip alike, whatever its
tokens look like. It is the release's rule, and kept.

Where the release differs (`behaviour="reference"`; each is one option):

- `overflow="lost"`: what a strip cannot hold is lost (the release hands rows of zeros on in their place, which are not
  handed on here), so that fewer than k stay; by default (`shared`) it goes to other strips, the heaviest first.
- `single="raw"`: a strip of one token scores a, without the 10^3 of the others.
- `order="picked"`: strip by strip, in each from the highest attention on; by default as tokens stand in the image.
- `tiles="floor"`: each tile of LLaVA-NeXT has k // tiles tokens of its own; by default (`even`) the first tiles get
  what is left over.

Letters: G images of a group, n tokens of a tile, P strips.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ocvtp.methods.base import Encoded, Entry, Method, behave, no_pruner, one_of, whole
from ocvtp.methods.picking import RECEIVED, Picking, number
from ocvtp.methods.tiles import RELEASED_FLOOR, strips
from ocvtp.selection.cosines import cosines
from ocvtp.selection.quotas import apportion, best_of_parts
from ocvtp.vlms.family import Family
from ocvtp.vlms.images import Facts

_REFERENCE: Mapping[str, tuple[Any, Any]] = {
    "overflow": ("shared", "lost"),
    "single": ("scaled", "raw"),
    "order": ("raster", "picked"),
    "tiles": ("even", "floor"),
}
_SCALE, _TINY = 1e3, 1e-6


class HoloV(Picking):
    """Strips with budgets of their own."""

    def __init__(self, facts: Facts, options: Mapping[str, Any]) -> None:
        super().__init__("holov", facts, options["tiles"], options["order"])
        for option in ("overflow", "single"):
            one_of("holov", options, option, _REFERENCE[option])
        whole("holov", options, "strips", 1)
        self._alpha, self._options = number("holov", options, "alpha", 0, 16), options

    def features(self, encoded: Encoded) -> Mapping[str, Tensor]:  # noqa: D102 - as in Picking
        return {"tokens": encoded.projected(), "attention": encoded.attention(self.block, cls=self.facts.cls)}

    def pick(self, keep: int, **seen: Tensor) -> Tensor:  # noqa: D102
        attention_Gn = seen["attention"].float()
        strips_n, sizes_P = strips(attention_Gn.shape[1], self._options["strips"], attention_Gn.device)
        scores_GP = self._scores(cosines(seen["tokens"]), attention_Gn, strips_n, sizes_P)
        if self._options["overflow"] == "lost":
            wanted_GP = apportion(scores_GP, torch.full_like(sizes_P, keep), keep)
            quotas_GP = torch.minimum(wanted_GP, sizes_P)
        else:
            quotas_GP = apportion(scores_GP, sizes_P, keep)
        return best_of_parts(attention_Gn, strips_n.expand(len(attention_Gn), -1), quotas_GP, keep)

    def _scores(self, likeness_Gnn: Tensor, attention_Gn: Tensor, strips_n: Tensor, sizes_P: Tensor) -> Tensor:
        """Mean score of the tokens of each strip, [G, P]."""
        same_nn = (strips_n[:, None] == strips_n).float()
        itself_nn = torch.eye(len(strips_n), device=same_nn.device)
        others_n = (sizes_P[strips_n] - 1).clamp(min=1)
        likeness_Gnn = likeness_Gnn * (same_nn - itself_nn)
        mean_Gn1 = (likeness_Gnn.sum(2) / others_n)[..., None]
        # A token's cosine with itself counts as 0 here, as in the release.
        variance_Gn = ((likeness_Gnn - mean_Gn1).square() * same_nn).sum(2) / others_n
        variance_Gn = (variance_Gn * (sizes_P[strips_n] > 1)).double()
        member_Pn = (strips_n == torch.arange(len(sizes_P), device=strips_n.device)[:, None]).double()
        attention_GP = _SCALE * attention_Gn.double() @ member_Pn.T / sizes_P
        variance_GP = variance_Gn @ member_Pn.T / sizes_P
        scores_GP = attention_GP + self._alpha * variance_GP * (attention_GP.abs() / (variance_GP.abs() + _TINY))
        return (
            torch.where(sizes_P > 1, scores_GP, scores_GP / _SCALE) if self._options["single"] == "raw" else scores_GP
        )


def _build(family: Family, pruner: Any, options: Mapping[str, Any]) -> Method:
    no_pruner("holov", pruner)
    return HoloV(family.facts, behave("holov", options, _REFERENCE))


ENTRY = Entry(
    name="holov",
    acts="before the LLM",
    needs_text=False,
    source="HoloV, NeurIPS 2025, github.com/obananas/HoloV",
    random=False,
    trained=False,
    options={
        "behaviour": "default",
        "strips": 16,
        "alpha": 0.09,
        "overflow": None,
        "single": None,
        "order": None,
        "tiles": None,
    },
    build=_build,
    without_cls=RECEIVED,
    loses={**RELEASED_FLOOR, "overflow": ("lost",)},
)
