"""CDPruner: tokens that differ from each other, and that go with the question.

Greedy picks of a determinantal point process with the kernel r_i S_ij r_j: S the cosines of the tokens of the layer
that the LLM is fed from, r their relevance to the question. For that, CLIP's text tower reads the question, and r is
the *negative* cosine of both in CLIP's common space, moved and scaled to 0 to 1 over the image: single patches of CLIP
are known to be least like the text that they show. A question that the text tower cannot read at once is read in
pieces, whose cosines are averaged. Where text tower and question come from: `ocvtp.methods.text_tower`. Nothing is
merged.

`cdpruner-no-text` has r = 1: no question is read, and any tower will do.

Of LLaVA-NeXT each tile has its share of the budget, and relevance is scaled over all of them: in the release
(`behaviour="reference"`) `tiles="floor"`, k // tiles each; by default (`even`) the first tiles get what is left over.
The release also cuts long questions so that their pieces but the last have no end (mended: each piece has its own).

Letters: G images of a group, N tokens of an image, n of a tile, P width of CLIP's common space.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ocvtp.methods.base import Encoded, Entry, Method, behave, no_pruner
from ocvtp.methods.picking import Picking
from ocvtp.methods.text_tower import OPTIONS, TextTower, text_tower
from ocvtp.methods.tiles import RELEASED_FLOOR
from ocvtp.selection.cosines import unit
from ocvtp.selection.dpp import dpp
from ocvtp.vlms.family import Family
from ocvtp.vlms.images import Facts

_REFERENCE: Mapping[str, tuple[Any, Any]] = {"tiles": ("even", "floor")}
_TINY = 1e-6


class CDPruner(Picking):
    """Diversity conditioned on the question."""

    def __init__(self, name: str, facts: Facts, tiles: str, tower: TextTower | None) -> None:
        """Without a `tower` relevance is 1."""
        super().__init__(name, facts, tiles)
        self.tower = tower

    def features(self, encoded: Encoded) -> Mapping[str, Tensor]:  # noqa: D102 - as in Picking
        tokens_GNC = encoded.tokens(self.facts.feature_layer)
        if self.tower is None:
            return {"tokens": tokens_GNC}
        text_GP = self.tower.embed_whole(self.tower.questions(encoded.prompts), tokens_GNC.device)
        return {"tokens": tokens_GNC, "relevance": relevance(self.tower.tokens(tokens_GNC), text_GP)}

    def pick(self, keep: int, **seen: Tensor) -> Tensor:  # noqa: D102
        return dpp(seen["tokens"], keep, seen.get("relevance"))


def relevance(image_GNP: Tensor, text_GP: Tensor) -> Tensor:
    """How little tokens look like the text, from about 0 to 1 over each image, [G, N]."""
    scores_GN = -(unit(image_GNP) @ text_GP[..., None])[..., 0]
    low_G1, high_G1 = scores_GN.amin(1, keepdim=True), scores_GN.amax(1, keepdim=True)
    return (scores_GN - low_G1 + _TINY) / (high_G1 - low_G1).clamp(min=_TINY)


def _build(family: Family, pruner: Any, options: Mapping[str, Any]) -> Method:
    no_pruner("cdpruner", pruner)
    options = behave("cdpruner", options, _REFERENCE)
    return CDPruner("cdpruner", family.facts, options["tiles"], text_tower("cdpruner", family, options))


def _build_without(family: Family, pruner: Any, options: Mapping[str, Any]) -> Method:
    no_pruner("cdpruner-no-text", pruner)
    options = behave("cdpruner-no-text", options, _REFERENCE)
    return CDPruner("cdpruner-no-text", family.facts, options["tiles"], None)


ENTRY = Entry(
    name="cdpruner",
    acts="before the LLM",
    needs_text=True,
    source="CDPruner, NeurIPS 2025, arXiv 2506.10967",
    random=False,
    trained=False,
    options={"behaviour": "default", **OPTIONS, "tiles": None},
    build=_build,
    needs=frozenset({"clip tower", "text tower"}),
    loses=RELEASED_FLOOR,
)
WITHOUT_TEXT = Entry(
    name="cdpruner-no-text",
    acts="before the LLM",
    needs_text=False,
    source="CDPruner's determinantal point process without relevance to the question",
    random=False,
    trained=False,
    options={"behaviour": "default", "tiles": None},
    build=_build_without,
    loses=RELEASED_FLOOR,
)
ENTRIES = (ENTRY, WITHOUT_TEXT)
