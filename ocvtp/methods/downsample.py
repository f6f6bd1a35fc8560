"""A coarser grid of the same image: each token that goes on is the mean of a cell. The baseline that needs no method.

The image is cut into k cells that are about square: into bands of equal height, and each band into cells of equal
width. Where k is a product of the right shape (64 or 144 of 24 x 24) that is average pooling. Where it is not, bands
differ by one cell, so that k tokens go on whatever k is (192 of 24 x 24: 14 bands of 13 or 14). A token on the edge of
cells counts in each by the area it has there. LLaVA-NeXT's two grids have cells in proportion to their tokens.

What is kept is listed by the token at each cell's centre.

Letters: G images of a group, N tokens of an image, k cells, V width of the values that the projector reads.
"""

from collections.abc import Mapping
from typing import Any

from ocvtp.methods.base import Encoded, Entry, Kept, Method, no_pruner
from ocvtp.methods.tiles import cells
from ocvtp.vlms.family import Family


class Downsample(Method):
    """Means of the cells of a coarser grid."""

    def choose(self, encoded: Encoded) -> Kept:  # noqa: D102 - as in Method
        values_GNV = encoded.vision.values(encoded.members)
        weights_kN, centres_k = cells(encoded.layout, encoded.keep, values_GNV.device)
        pooled_GkV = (weights_kN @ values_GNV.float()).to(values_GNV.dtype)
        return Kept(centres_k.expand(len(pooled_GkV), -1), pooled_GkV)


def _build(family: Family, pruner: Any, options: Mapping[str, Any]) -> Method:
    no_pruner("downsample", pruner)
    return Downsample()


ENTRY = Entry(
    name="downsample",
    acts="before the LLM",
    needs_text=False,
    source="average pooling of the grid of tokens",
    random=False,
    trained=False,
    options={},
    build=_build,
)
