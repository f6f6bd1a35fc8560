"""VScan: local and global scans of the tower's attention before the LLM, and half of the tokens from its middle on.

Before the LLM (`vscan-before`) half of what stays are, of each window of 6 x 6 tokens, evenly, those that CLS attends
to most in block 5 of the 24 of the tower (at the same share of other depths); the other half are, of all others, those
that CLS attends to most in the block whose output the LLM is fed from (mean over heads). What is dropped is averaged
into the kept token whose hidden state is most like its own by cosine (`recycle=False`: nothing is). With an odd number
the global half is larger.

`vscan` is the pair with FastV: 1.5 times the budget enters the LLM, and in its middle (layer 16 of 32) tokens are
dropped by the attention of the last token of the prompt, so that the layers read the budget on average: 96 and 32
tokens at 64.

The windows of an image whose side they do not divide are smaller at the right and lower edge. Of LLaVA-NeXT each tile
has its share of the budget: in the release (`behaviour="reference"`) `tiles="floor"`, k // tiles each; by default
(`even`) the first tiles get what is left over.

Letters: G images of a group, N tokens of an image, n tokens of a tile, k kept, V width of what the projector reads.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from ocvtp.methods import fastv
from ocvtp.methods.base import Encoded, Entry, Kept, Method, behave, no_pruner, one_of, whole
from ocvtp.methods.combined import combined
from ocvtp.methods.picking import RECEIVED
from ocvtp.methods.tiles import RELEASED_FLOOR, budgets, share_evenly, windows
from ocvtp.selection.cosines import cosines
from ocvtp.selection.merging import into_nearest
from ocvtp.selection.quotas import best_of_parts
from ocvtp.selection.ranking import highest, marked, others, rows
from ocvtp.vlms.family import Family
from ocvtp.vlms.images import Facts, Grid

_REFERENCE: Mapping[str, tuple[Any, Any]] = {"tiles": ("even", "floor")}
_BLOCK, _DEPTH = 5, 24


class VScan(Method):
    """Both scans, and merging."""

    fewer: bool = True  # tiles="floor" loses what is left over

    def __init__(self, facts: Facts, options: Mapping[str, Any]) -> None:
        one_of("vscan", options, "tiles", ("even", "floor"))
        one_of("vscan", options, "recycle", (True, False))
        whole("vscan", options, "window", 1)
        self.facts, self._options, self._deep = facts, options, facts.feature_layer - 1
        self._shallow = min(round(_BLOCK * facts.depth / _DEPTH), self._deep)

    def layers(self) -> Collection[int]:  # noqa: D102 - as in Method
        return {self._shallow, self._deep, self.facts.feature_layer}

    def choose(self, encoded: Encoded) -> Kept:  # noqa: D102
        shallow_GN, deep_GN = (encoded.attention(block, cls=self.facts.cls) for block in (self._shallow, self._deep))
        tokens_GNC, values_GNV = encoded.tokens(self.facts.feature_layer), encoded.vision.values(encoded.members)
        found, merged = [values_GNV.new_empty(len(values_GNV), 0, dtype=torch.int64)], [values_GNV[:, :0]]
        for members_n, grid, keep in budgets(encoded.layout, encoded.keep, self._options["tiles"], values_GNV.device):
            kept_Gk = self._scan(shallow_GN[:, members_n].float(), deep_GN[:, members_n].float(), grid, keep)
            values_GnV, tokens_GnC = values_GNV[:, members_n], tokens_GNC[:, members_n]
            values_GkV = rows(values_GnV, kept_Gk)
            if self._options["recycle"] and keep:
                rest_Go = others(kept_Gk, len(members_n))
                likeness_Gok = cosines(rows(tokens_GnC, rest_Go), rows(tokens_GnC, kept_Gk))
                values_GkV = into_nearest(values_GkV, rows(values_GnV, rest_Go), likeness_Gok)
            found.append(members_n[kept_Gk])
            merged.append(values_GkV)
        indices_Gk, order_Gk = torch.cat(found, 1).sort(1)
        return Kept(indices_Gk, rows(torch.cat(merged, 1), order_Gk))

    def _scan(self, shallow_Gn: Tensor, deep_Gn: Tensor, grid: Grid, keep: int) -> Tensor:
        """Numbers of the tokens that stay of a tile, [G, k], ascending."""
        of_n, sizes = windows(grid, self._options["window"], shallow_Gn.device)
        quotas_W = torch.tensor(share_evenly(keep // 2, sizes), device=shallow_Gn.device)
        parts_Gn = of_n.expand(len(shallow_Gn), -1)
        local_Gl = best_of_parts(shallow_Gn, parts_Gn, quotas_W.expand(len(shallow_Gn), -1), keep // 2)
        # Above all others, so that they are among the highest.
        local_Gn = marked(local_Gl, shallow_Gn.shape[1])
        return highest(deep_Gn.masked_fill(local_Gn, torch.inf), keep)


def _build(family: Family, pruner: Any, options: Mapping[str, Any]) -> Method:
    no_pruner("vscan-before", pruner)
    return VScan(family.facts, behave("vscan-before", options, _REFERENCE))


BEFORE = Entry(
    name="vscan-before",
    source="VScan, arXiv 2505.22654, what it does before the LLM",
    options={"behaviour": "default", "window": 6, "recycle": True, "tiles": None},
    build=_build,
    without_cls=RECEIVED,
    loses=RELEASED_FLOOR,
)


ENTRIES = (BEFORE, combined(BEFORE, fastv.ENTRY, "vscan", source="VScan, arXiv 2505.22654", inside_k="middle"))
