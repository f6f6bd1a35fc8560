"""TRIM: the tokens that CLIP's text tower finds to go with the question, and the mean of all others.

With f a patch's token of the layer that the LLM is fed from, P_v and P_t CLIP's projections and k the budget:

1. I = P_v(post_layernorm(f)), t = P_t(text tower's end token) of the question, cut at the text tower's 77 tokens;
2. the k - 1 patches with the lowest product I t stay, of vectors as they are: the authors' paper speaks of a cosine,
   their code takes none (`similarity="cosine"`; about 4.5 of 64 tokens are others then). Lowest, as in their code and
   not as in their paper: single patches of CLIP are known to be least like the text that they show;
3. the mean of all others is one token more. It stands in the place of the last of them, and is listed by its number.

Where text tower and question come from: `ocvtp.methods.text_tower`.

Where the release differs (`behaviour="reference"`; each is one option):

- `rank="softmax"`: patches are ranked by the softmax of their negated similarity in float32, in which those that are
  far behind become equal; by default by the similarity itself;
- `mean="end"`: the mean stands behind all other tokens.

Letters: G images of a group, N tokens of an image, k kept, C tower width, P width of CLIP's common space, V width of
the values that the projector reads, Q distinct questions.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from ocvtp.methods.base import Encoded, Entry, Kept, Method, behave, no_pruner, one_of
from ocvtp.methods.text_tower import OPTIONS, TextTower, text_tower
from ocvtp.selection.ranking import highest
from ocvtp.vlms.family import Family

_REFERENCE = {"rank": ("similarity", "softmax"), "mean": ("place", "end")}


class Trim(Method):
    """Tokens by their likeness to the question."""

    def __init__(self, tower: TextTower, layer: int, options: Mapping[str, Any]) -> None:
        """`layer` is the index into `hidden_states` that the LLM is fed from."""
        self.tower, self._layer, self._options = tower, layer, options

    def layers(self) -> Collection[int]:  # noqa: D102 - as in Method
        return {self._layer}

    def choose(self, encoded: Encoded) -> Kept:  # noqa: D102
        tokens_GNC, values_GNV = encoded.tokens(self._layer), encoded.vision.values(encoded.members)
        text_GP = self.tower.embed(self.tower.questions(encoded.prompts), tokens_GNC.device)
        image_GNP = self.tower.tokens(tokens_GNC)
        if self._options["similarity"] == "cosine":
            image_GNP, text_GP = (torch.nn.functional.normalize(each, dim=-1) for each in (image_GNP, text_GP))
        scores_GN = -(image_GNP @ text_GP[..., None])[..., 0]
        if self._options["rank"] == "softmax":
            scores_GN = scores_GN.softmax(1)
        return self._with_mean(highest(scores_GN, encoded.keep - 1), values_GNV)

    def _with_mean(self, picked_Gp: Tensor, values_GNV: Tensor) -> Kept:
        """The tokens that were picked and the mean of the others."""
        count, width = values_GNV.shape[1:]
        dropped_GN = torch.ones(values_GNV.shape[:2], device=values_GNV.device).scatter_(1, picked_Gp, 0.0)
        mean_G1V = (dropped_GN[:, None] @ values_GNV.float()) / dropped_GN.sum(1)[:, None, None]
        numbers_N = torch.arange(count, device=values_GNV.device)
        last_G1 = torch.where(dropped_GN > 0, numbers_N, -1).amax(1, keepdim=True)
        picked_GpV = values_GNV.gather(1, picked_Gp[..., None].expand(-1, -1, width))
        values_GkV = torch.cat([picked_GpV, mean_G1V.to(values_GNV.dtype)], 1)
        indices_Gk, order_Gk = torch.cat([picked_Gp, last_G1], 1).sort(1)
        if self._options["mean"] == "place":
            values_GkV = values_GkV.gather(1, order_Gk[..., None].expand(-1, -1, width))
        return Kept(indices_Gk, values_GkV)


def _build(family: Family, pruner: Any, options: Mapping[str, Any]) -> Method:
    no_pruner("trim", pruner)
    options = behave("trim", options, _REFERENCE)
    for option, legal in {**_REFERENCE, "similarity": ("dot", "cosine")}.items():
        one_of("trim", options, option, legal)
    return Trim(text_tower("trim", family, options), family.facts.feature_layer, options)


ENTRY = Entry(
    name="trim",
    acts="before the LLM",
    needs_text=True,
    source="TRIM, arXiv 2409.10994",
    random=False,
    trained=False,
    options={
        "behaviour": "default",
        **OPTIONS,
        "similarity": "dot",
        "rank": None,
        "mean": None,
    },
    build=_build,
    needs=frozenset({"clip tower", "text tower"}),
)
