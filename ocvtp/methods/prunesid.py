"""PruneSID: tokens in groups by principal components, duplicates of a group suppressed, and quotas by what is left.

1. groups: a token belongs to the component in which it has the largest part (in absolute value), of the first
   q = k // 4 principal components of the sigmoid of the tokens of the layer that the LLM is fed from, channels being
   the samples;
2. suppression: in each group, in the order of the attention that CLS pays in the block before that layer (mean over
   heads), a token goes if a survivor has a cosine with it above k/32 times the mean over all pairs of the image;
3. quotas: one token for each group, and the rest of the budget in proportion to survivors, at most 5 ceil(k/64) of a
   group, and not more than its survivors; where that is too little for the budget, bounds rise one by one. What
   rounding leaves over goes to the groups with most survivors. Survivors come first, then others, by attention.

Nothing is merged. The components are found as the release does, by two rounds of subspace iteration from random
vectors; here from the same ones each time, so that nothing depends on chance.

Where the release differs (`behaviour="reference"`; each is one option):

- `cls=True`: the CLS row is one of the k tokens and goes to the LLM, whose projector never saw such a row; listed by
  the lowest number of a token that is dropped.
- `order="picked"`: CLS, then group by group, in each from the highest attention on; by default as tokens stand in the
  image.
- `tiles="floor"`: each tile of LLaVA-NeXT has k // tiles tokens of its own; by default (`even`) the first tiles get
  what is left over.

Letters: G images of a group, n tokens of a tile, C tower width, q groups, k tokens kept.
"""

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ocvtp.errors import Incompatible
from ocvtp.methods.base import Encoded, Entry, Kept, Method, behave, no_pruner, one_of
from ocvtp.methods.picking import RECEIVED, Picking
from ocvtp.methods.tiles import RELEASED_FLOOR, parts
from ocvtp.selection.cosines import cosines, mean_of_pairs
from ocvtp.selection.nms import survivors
from ocvtp.selection.quotas import best_of_parts, filled
from ocvtp.selection.ranking import others, ranked, rows
from ocvtp.vlms.family import Family
from ocvtp.vlms.images import Facts

_REFERENCE: Mapping[str, tuple[Any, Any]] = {
    "cls": (False, True),
    "order": ("raster", "picked"),
    "tiles": ("even", "floor"),
}
_ROUNDS = 2


class PruneSID(Picking):
    """Groups, suppression, quotas."""

    def __init__(self, facts: Facts, options: Mapping[str, Any]) -> None:
        super().__init__("prunesid", facts, options["tiles"], options["order"])
        one_of("prunesid", options, "cls", (False, True))
        self._cls = options["cls"]

    def features(self, encoded: Encoded) -> Mapping[str, Tensor]:  # noqa: D102 - as in Picking
        return {
            "tokens": encoded.tokens(self.facts.feature_layer),
            "attention": encoded.attention(self.block, cls=self.facts.cls),
        }

    def pick(self, keep: int, **seen: Tensor) -> Tensor:  # noqa: D102
        tokens_GnC, attention_Gn = seen["tokens"].float(), seen["attention"].float()
        groups_Gn = components(tokens_GnC, max(1, keep // 4)).abs().argmax(2)
        likeness_Gnn = cosines(tokens_GnC)
        above_G = keep / 32 * mean_of_pairs(likeness_Gnn)
        left_Gn = survivors(attention_Gn, likeness_Gnn, above_G, groups_Gn)
        quotas_Gq = quotas(groups_Gn, left_Gn, max(1, keep // 4), keep, keep - int(self._cls))
        # Attention is at most 1: survivors come before all others.
        return best_of_parts(attention_Gn + 2 * left_Gn, groups_Gn, quotas_Gq, keep - int(self._cls))

    def choose(self, encoded: Encoded) -> Kept:  # noqa: D102
        kept = super().choose(encoded)
        if not self._cls:
            return kept
        device = kept.indices_Gk.device
        values_GNV, cls_GTV = encoded.vision.values(encoded.members), encoded.vision.cls_values(encoded.members)
        shares = [
            (len(members_n), share) for members_n, _, share in parts(encoded.layout, encoded.keep, self._tiles, device)
        ]
        ours = [tile for tile, (size, share) in enumerate(shares) if 0 < share < size]
        tiles_c = torch.tensor(ours, dtype=torch.int64, device=device)
        free_Gc = others(kept.indices_Gk, encoded.count)[:, : len(tiles_c)]
        given_GkV = rows(values_GNV, kept.indices_Gk) if kept.values_GkV is None else kept.values_GkV
        indices_Gk, order_Gk = torch.cat([free_Gc, kept.indices_Gk], 1).sort(1)
        values_GkV = torch.cat([cls_GTV[:, tiles_c], given_GkV], 1)
        return Kept(indices_Gk, rows(values_GkV, order_Gk) if self._order == "raster" else values_GkV)


@lru_cache(maxsize=16)
def _start(count: int, number: int, device: torch.device) -> Tensor:
    return torch.randn(count, number, generator=torch.Generator().manual_seed(0)).to(device)


def components(tokens_GnC: Tensor, number: int) -> Tensor:
    """The first principal components of the sigmoid of tokens, with channels for samples, [G, n, q], up to signs."""
    with torch.autocast(tokens_GnC.device.type, enabled=False):
        made_GCn = torch.sigmoid(tokens_GnC.float()).transpose(1, 2)
        made_GCn = made_GCn - made_GCn.mean(1, keepdim=True)
        number = min(number, *made_GCn.shape[1:])
        basis_GCq = torch.linalg.qr(made_GCn @ _start(made_GCn.shape[2], number, made_GCn.device)).Q
        for _ in range(_ROUNDS):
            basis_Gnq = torch.linalg.qr(made_GCn.transpose(1, 2) @ basis_GCq).Q
            basis_GCq = torch.linalg.qr(made_GCn @ basis_Gnq).Q
        right_Gqn: Tensor = torch.linalg.svd(basis_GCq.transpose(1, 2) @ made_GCn, full_matrices=False).Vh
        return right_Gqn.transpose(1, 2)


def quotas(groups_Gn: Tensor, left_Gn: Tensor, number: int, budget: int, total: int) -> Tensor:
    """How many tokens each group keeps, [G, q], `total` in all.

    Args:
        groups_Gn: the group of each token.
        left_Gn: True where it survived.
        number: q.
        budget: k, by which bounds are set.
        total: fewer by what else is handed on.
    """
    zeros_Gq = torch.zeros(len(groups_Gn), number, dtype=torch.int64, device=groups_Gn.device)
    sizes_Gq = zeros_Gq.scatter_add(1, groups_Gn, torch.ones_like(groups_Gn))
    left_Gq = zeros_Gq.scatter_add(1, groups_Gn, left_Gn.long())
    least_Gq = sizes_Gq.clamp(max=1)
    most_Gq = torch.minimum(left_Gq, sizes_Gq.clamp(max=5 * math.ceil(budget / 64)))
    # The bounds of all groups rise until the budget fits: of all rises the first at which it does.
    rises_R = torch.arange(groups_Gn.shape[1] + 1, device=groups_Gn.device)
    risen_GRq = torch.minimum(most_Gq[:, None] + rises_R[:, None], sizes_Gq[:, None])
    rise_G = (risen_GRq.sum(2) >= budget).to(torch.uint8).argmax(1)
    most_Gq = risen_GRq[torch.arange(len(rise_G), device=rise_G.device), rise_G]
    rest_G = (total - least_Gq.sum(1)).clamp(min=0)
    edges_Gq = (left_Gq.double() / left_Gq.sum(1, keepdim=True)).cumsum(1) * rest_G[:, None]
    edges_Gq = edges_Gq.round().long()
    wanted_Gq = least_Gq + edges_Gq.diff(dim=1, prepend=edges_Gq.new_zeros(len(edges_Gq), 1))
    return filled(wanted_Gq, most_Gq, ranked(left_Gq), torch.full_like(rest_G, total))


def _build(family: Family, pruner: Any, options: Mapping[str, Any]) -> Method:
    no_pruner("prunesid", pruner)
    asked_for_cls = options["cls"]
    options = behave("prunesid", options, _REFERENCE)
    if asked_for_cls and not family.facts.cls:
        raise Incompatible("prunesid cannot hand CLS on: this VLM's vision tower has none. Leave cls out")
    if isinstance(options["cls"], bool):
        options["cls"] = options["cls"] and family.facts.cls
    return PruneSID(family.facts, options)


ENTRY = Entry(
    name="prunesid",
    acts="before the LLM",
    needs_text=False,
    source="PruneSID, ICLR 2026, github.com/ZhengyaoFang/PruneSID",
    random=False,
    trained=False,
    options={"behaviour": "default", "cls": None, "order": None, "tiles": None},
    build=_build,
    without_cls=RECEIVED,
    loses=RELEASED_FLOOR,
)
