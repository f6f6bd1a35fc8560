"""Choices without training: greedy picks over the tokens of one layer of the tower (`ocvtp.selection`).

- `qr`, pivoted QR: the token farthest from what those before it span;
- `css`, greedy column subset: the token that lowers the squared residual of all tokens most;
- `fps`, farthest points: the token least like its most similar pick;
- `medoids`, greedy k-medoids: the token that brings all nearest to their nearest pick.

Tokens are handed on from the layer that the LLM is fed from, whatever layer chooses; with `inside_tower=True` blocks
after that layer see the kept ones alone (`ocvtp.methods.inside_tower`). Of LLaVA-NeXT each tile has its share of the
budget (`tiles`, as in `visionzip`).

Letters: G images of a group, N tokens of an image, k tokens kept.
"""

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from ocvtp.methods.base import Encoded, Entry, Method, no_pruner
from ocvtp.methods.inside_tower import OPTION, within
from ocvtp.methods.picking import Picking
from ocvtp.methods.tiles import FLOOR
from ocvtp.selection import CHOICES
from ocvtp.vlms.family import Family
from ocvtp.vlms.images import Facts


class Selection(Picking):
    """One of `ocvtp.selection.CHOICES` on one layer."""

    def __init__(self, name: str, facts: Facts, layer: int, tiles: str) -> None:
        """`layer` is an index into `hidden_states`."""
        super().__init__(name, facts, tiles)
        self._choice, self._layer = CHOICES[name], layer

    def layers(self) -> Collection[int]:  # noqa: D102 - as in Method
        return {self._layer}

    def features(self, encoded: Encoded) -> Mapping[str, Tensor]:  # noqa: D102 - as in Picking
        return {"tokens": encoded.tokens(self._layer)}

    def pick(self, keep: int, **seen: Tensor) -> Tensor:  # noqa: D102
        return self._choice(seen["tokens"], keep)


def _build(name: str, family: Family, pruner: Any, options: Mapping[str, Any]) -> Method:
    no_pruner(name, pruner)
    made = Selection(name, family.facts, family.index(options["layer"]), options["tiles"])
    return within(name, made, family, options)


def _entry(name: str, source: str, layer: int = 9) -> Entry:
    """`layer` as measured (docs/findings.md): `css` and `qr` are best where the LLM is fed from."""
    return Entry(
        name=name,
        acts="before the LLM",
        needs_text=False,
        source=source,
        random=False,
        trained=False,
        options={"layer": layer, "tiles": "even", OPTION: False},
        build=partial(_build, name),
        loses=FLOOR,
    )


ENTRIES = (
    _entry("qr", "pivoted QR, Businger and Golub 1965", layer=-2),
    _entry("css", "greedy column subset selection, Farahat et al. 2011", layer=-2),
    _entry("fps", "farthest point first, Gonzalez 1985"),
    _entry("medoids", "greedy facility location, Nemhauser et al. 1978"),
)
