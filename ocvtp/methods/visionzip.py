"""VisionZip: the tokens that CLS attends to, and the rest merged into a few by the likeness of their keys.

All is read from the block whose output the LLM is fed from. Of the budget k, M tokens are contextual, the others
dominant:

1. dominant: those that CLS attends to most (mean over heads); without a CLS, those that receive most attention;
2. contextual: of the R tokens that are left, in their order, every (R // M)th is a target; each other one goes to the
   target whose key (mean over heads) is most like its own by cosine, and is merged into it.

M is 10/64 of k, rounded to the nearest and halves up: 30, 20 and 10 at 192, 128 and 64 tokens, 20, 10 and 5 of a
tile's 128, 64 and 32. The authors' code states 10 of 64; their 30 of 221 is `contextual=30`.

A contextual token is its target plus the mean of what was merged into it. On a trained tower (CLIP ViT-L) that is as
long as a token, 1.00 to 1.25 times, while `merge="mean"`, the mean of all of them, is half as long, 0.49 to 0.62: what
is merged points in many directions. It is listed by its target.

Where the release differs (`behaviour="reference"`; each is one option):

- `cls=True`: the CLS row goes to the LLM as well, in the place of one dominant token. LLaVA's projector and LLM never
  saw such a row. It is listed by the lowest number that nothing else is listed by.
- `order="appended"`: CLS, dominant tokens, contextual tokens; by default each stands where its number says. With
  LLaVA-NeXT: that for the whole image, then the tiles' dominant tokens in the order of the image, the CLS rows of
  the tiles, their contextual tokens.
- `tiles="floor"`: each tile of LLaVA-NeXT has k // tiles tokens of its own, so that fewer than k may stay; by default
  (`even`) the first tiles get what is left over. With `together` all tokens of the image compete, and contextual ones
  may be merged from several tiles. M, and `contextual`, are of a tile's budget but there.

Letters: G images of a group, N tokens of an image, k kept, d dominant, M contextual, O others, E width of a key,
V width of the values that the projector reads.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ocvtp.errors import Incompatible
from ocvtp.methods.base import Encoded, Entry, Kept, Method, behave, no_pruner, one_of, whole
from ocvtp.methods.picking import RECEIVED
from ocvtp.methods.tiles import RELEASED_FLOOR, TILES, parts
from ocvtp.selection.cosines import unit
from ocvtp.selection.merging import into_nearest
from ocvtp.selection.ranking import ranked, rows
from ocvtp.vlms.family import Family, Vision
from ocvtp.vlms.images import Facts

_REFERENCE: Mapping[str, tuple[Any, Any]] = {
    "cls": (False, True),
    "order": ("raster", "appended"),
    "tiles": ("even", "floor"),
}


@dataclass(frozen=True)
class _Zipped:
    """What stays of a tile, or of an image: numbers and values of each kind."""

    dominant_Gd: Tensor
    contextual_GM: Tensor
    merged_GMV: Tensor
    cls_Gc: Tensor
    """c is 1, or 0 where no CLS goes on."""


class VisionZip(Method):
    """Dominant and contextual tokens."""

    fewer: bool = True  # tiles="floor" loses what is left over

    def __init__(self, facts: Facts, options: Mapping[str, Any]) -> None:
        self._cls, self._block = facts.cls, facts.feature_layer - 1
        self._options = options

    def layers(self) -> Collection[int]:  # noqa: D102 - as in Method
        return {self._block}

    def choose(self, encoded: Encoded) -> Kept:  # noqa: D102
        vision, members = encoded.vision, encoded.members
        scores_GN = encoded.attention(self._block, cls=self._cls)
        keys_GNE = unit(vision.keys(self._block, members))
        values_GNV = vision.values(members)
        zipped = [
            self._zip(members_n, keep, scores_GN, keys_GNE, values_GNV)
            for members_n, _, keep in parts(encoded.layout, encoded.keep, self._options["tiles"], scores_GN.device)
        ]
        return self._joined(zipped, values_GNV, vision, members)

    def _zip(self, members_n: Tensor, keep: int, scores_GN: Tensor, keys_GNE: Tensor, values_GNV: Tensor) -> _Zipped:
        """Choose and merge among some tokens, the same of each image."""
        contextual = self._options["contextual"]
        contextual = int(keep * 10 / 64 + 0.5) if contextual is None else min(contextual, keep)
        cls = int(self._options["cls"] and keep > contextual)
        dominant = keep - contextual - cls
        order_Gn = ranked(scores_GN[:, members_n])
        dominant_Gd = members_n[order_Gn[:, :dominant].sort(1).values]
        left_GR = members_n[order_Gn[:, dominant:].sort(1).values]
        step = max(1, left_GR.shape[1] // max(1, contextual))
        target_R = torch.zeros(left_GR.shape[1], dtype=torch.bool)
        target_R[: contextual * step : step] = True
        where_R = target_R.nonzero()[:, 0].to(left_GR.device)
        others_R = (~target_R).nonzero()[:, 0].to(left_GR.device)
        targets_GM, others_GO = left_GR[:, where_R], left_GR[:, others_R]
        merged_GMV = self._merge(targets_GM, others_GO, keys_GNE, values_GNV)
        # Nothing is listed by the first of the others; there is one, for CLS has taken a token's place.
        return _Zipped(dominant_Gd, targets_GM, merged_GMV, others_GO[:, :cls])

    def _merge(self, targets_GM: Tensor, others_GO: Tensor, keys_GNE: Tensor, values_GNV: Tensor) -> Tensor:
        targets_GMV, others_GOV = rows(values_GNV, targets_GM), rows(values_GNV, others_GO)
        likeness_GOM = rows(keys_GNE, others_GO) @ rows(keys_GNE, targets_GM).transpose(1, 2)
        return into_nearest(targets_GMV, others_GOV, likeness_GOM, self._options["merge"])

    def _joined(self, zipped: list[_Zipped], values_GNV: Tensor, vision: Vision, members: Any) -> Kept:
        """What stays of all tiles, in the order in which the LLM reads it."""
        cls_GTV = vision.cls_values(members) if self._options["cls"] else None
        pieces = []
        for number, tile in enumerate(zipped):
            rows_GcV = values_GNV[:, :0] if cls_GTV is None else cls_GTV[:, number : number + tile.cls_Gc.shape[1]]
            pieces.append(
                {
                    "cls": (tile.cls_Gc, rows_GcV),
                    "dominant": (tile.dominant_Gd, rows(values_GNV, tile.dominant_Gd)),
                    "contextual": (tile.contextual_GM, tile.merged_GMV),
                }
            )
        whole, others = pieces[0], pieces[1:]
        in_order = [whole[kind] for kind in ("cls", "dominant", "contextual")]
        if others:
            in_order.append(_sorted([piece["dominant"] for piece in others]))
            in_order += [piece[kind] for kind in ("cls", "contextual") for piece in others]
        if self._options["order"] == "raster":
            return Kept(*_sorted(in_order))
        return Kept(
            torch.cat([numbers for numbers, _ in in_order], 1).sort(1).values, torch.cat([v for _, v in in_order], 1)
        )


def _sorted(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Numbers and their values together, by number."""
    numbers_Gk, order_Gk = torch.cat([numbers for numbers, _ in pairs], 1).sort(1)
    return numbers_Gk, rows(torch.cat([values for _, values in pairs], 1), order_Gk)


def _build(family: Family, pruner: Any, options: Mapping[str, Any]) -> Method:
    no_pruner("visionzip", pruner)
    asked_for_cls = options["cls"]
    options = behave("visionzip", options, _REFERENCE)
    for option, legal in {**_REFERENCE, "tiles": TILES, "merge": ("sum", "mean")}.items():
        one_of("visionzip", options, option, legal)
    whole("visionzip", options, "contextual")
    if asked_for_cls and not family.facts.cls:
        raise Incompatible("visionzip cannot hand CLS on: this VLM's vision tower has none. Leave cls out")
    return VisionZip(family.facts, {**options, "cls": options["cls"] and family.facts.cls})


ENTRY = Entry(
    name="visionzip",
    acts="before the LLM",
    needs_text=False,
    source="VisionZip, arXiv 2412.04467",
    random=False,
    trained=False,
    options={
        "behaviour": "default",
        "contextual": None,
        "cls": None,
        "merge": "sum",
        "order": None,
        "tiles": None,
    },
    build=_build,
    without_cls=RECEIVED,
    loses=RELEASED_FLOOR,
)
