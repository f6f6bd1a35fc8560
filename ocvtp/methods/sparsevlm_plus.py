"""SparseVLM+, version 2 of SparseVLM: attention is freed of its pull to near columns, and few heads are asked.

Raters and stages are those of `sparsevlm`. At a stage attention of each head is divided by how alike the positions of
row and column are (rotary queries and keys of ones, 1 for the same position), so that columns that stand near are not
preferred; the 14 of 32 heads (the same share of others) in which most of that goes from raters to image tokens are
kept; their mean over raters ranks tokens. Nothing is merged, and every token keeps its position.

How many stay follows the authors' lists, as shares of 576 tokens: 300/200/118, 238/108/60, 246/54/28 and 66/34/20 for
budgets of 192, 128, 96 and 64; between, below and above them as in `sparsevlm`. They count what leaves a layer: on 32
layers the lists truly average more (`budget="reference"` takes them as they are, `average` meets the budget).

Rotary positions of narrow heads are less alike far away, even opposite: what attention is divided by is at least 0.05
(`behaviour="reference"`: as it is, but not 0). In models with heads as wide as the authors' it is always more.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ocvtp.methods.base import Entry, no_pruner
from ocvtp.methods.inside import HeadRows, Scored, depth_of, per_layer
from ocvtp.methods.sparsevlm import Lists, SparseVLM
from ocvtp.selection.ranking import ranked
from ocvtp.vlms.family import Family

_WHOLE, _HEADS, _OF = 576, 14, 32
_LEAST, _TINY = 0.05, 1e-6


class SparseVLMPlus(SparseVLM):
    """Stages without merging, by chosen heads."""

    name: str = "sparsevlm-plus"
    positions: Literal["compact", "original"] = "original"
    lists: ClassVar[Lists] = (
        (0, (0, 0, 0)),
        (64, (66, 34, 20)),
        (96, (246, 54, 28)),
        (128, (238, 108, 60)),
        (192, (300, 200, 118)),
        (_WHOLE, (_WHOLE, _WHOLE, _WHOLE)),
    )

    def __init__(self, depth: int, options: Mapping[str, Any]) -> None:
        """`options`: as in `ENTRY`."""
        super().__init__(depth, {**options, "recycle": False})

    def score(self, scored: Scored) -> Tensor:  # noqa: D102 - as in Inside
        return scored.attention(partial(weighed, least=None if self.reference else _LEAST))


def weighed(rows: HeadRows, *, least: float | None) -> Tensor:
    """Attention of the chosen heads, divided by how near columns are, mean over rows, [I, T]."""
    near_IRT = rows.near_IRT()
    if least is None:
        near_IRT = torch.where(near_IRT.abs() < _TINY, _TINY, near_IRT)
    else:
        near_IRT = near_IRT.clamp(min=least)
    weights_IHRT = rows.weights_IHRT / near_IRT[:, None] * rows.real_IR[:, None, :, None]
    by_head_IHT = weights_IHRT.sum(2)
    looks_IH = (by_head_IHT * rows.vision_IT[:, None]).sum(2)
    heads = max(1, round(_HEADS * looks_IH.shape[1] / _OF))
    chosen_Ih = ranked(looks_IH)[:, :heads]
    mean_IT = by_head_IHT.gather(1, chosen_Ih[..., None].expand(-1, -1, by_head_IHT.shape[2])).mean(1)
    return mean_IT / rows.real_IR.sum(1, keepdim=True)


def _build(family: Family, pruner: Any, options: Mapping[str, Any]) -> SparseVLMPlus:
    no_pruner("sparsevlm-plus", pruner)
    return SparseVLMPlus(depth_of("sparsevlm-plus", family), options)


ENTRY = Entry(
    name="sparsevlm-plus",
    acts="inside the LLM",
    needs_text=True,
    source="SparseVLM+, version 2 of github.com/Gumpest/SparseVLMs (December 2025)",
    options={"budget": "average", "behaviour": "default", "layers": None},
    build=_build,
    positions="original",
    per_layer=per_layer(SparseVLMPlus),
    text_asks=True,
)
