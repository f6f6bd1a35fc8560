"""Choices without training: greedy picks over the tokens of one layer of the tower (`ocvtp.selection`).

- `qr`, pivoted QR: the token farthest from what those before it span;
- `css`, greedy column subset: the token that lowers the squared residual of all tokens most; with `spread` times its
  distance from the nearest pick, to that power, in `spread_layer`;
- `fps`, farthest points: the token least like its most similar pick;
- `medoids`, greedy k-medoids: the token that brings all nearest to their nearest pick.

Tokens are handed on from the layer that the LLM is fed from, whatever layer chooses; with `inside_tower=True` blocks
after that layer see the kept ones alone (`ocvtp.methods.inside_tower`). Of LLaVA-NeXT each tile has its share of the
budget (`tiles`, as in `visionzip`).

Letters: G images of a group, N tokens of an image, k tokens kept.
"""

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any, Final

from torch import Tensor

from ocvtp.methods.base import Encoded, Entry, Method, no_pruner
from ocvtp.methods.inside_tower import OPTION, within
from ocvtp.methods.picking import Picking, number
from ocvtp.methods.tiles import FLOOR
from ocvtp.selection import CHOICES, css
from ocvtp.vlms.family import Family
from ocvtp.vlms.images import Facts


class Selection(Picking):
    """One of `ocvtp.selection.CHOICES` on one layer."""

    by_states = True

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


class Spread(Selection):
    """`css` of picks that keep their distance in another layer."""

    def __init__(self, facts: Facts, layer: int, tiles: str, spread: float, spread_layer: int) -> None:
        """`spread` above 0; layers are indices into `hidden_states`."""
        super().__init__("css", facts, layer, tiles)
        self._spread, self._spread_layer = spread, spread_layer

    def layers(self) -> Collection[int]:  # noqa: D102 - as in Method
        return {self._layer, self._spread_layer}

    def features(self, encoded: Encoded) -> Mapping[str, Tensor]:  # noqa: D102 - as in Picking
        return {**super().features(encoded), "apart": encoded.tokens(self._spread_layer)}

    def pick(self, keep: int, **seen: Tensor) -> Tensor:  # noqa: D102
        return css(seen["tokens"], keep, spread=self._spread, apart=seen["apart"])


def _build(name: str, family: Family, pruner: Any, options: Mapping[str, Any]) -> Method:
    no_pruner(name, pruner)
    layer, tiles = family.index(options["layer"]), options["tiles"]
    spread = number(name, options, "spread", 0, _MOST_SPREAD) if "spread" in options else 0
    if spread:
        made: Selection = Spread(family.facts, layer, tiles, spread, family.index(options["spread_layer"]))
    else:
        made = Selection(name, family.facts, layer, tiles)
    return within(name, made, family, options)


_MOST_SPREAD: Final = 100
"""Far below it distance decides alone."""


def _entry(name: str, source: str, layer: int = 9, **more: Any) -> Entry:
    """`layer` as measured (docs/findings.md): `css` and `qr` are best where the LLM is fed from."""
    return Entry(
        name=name,
        acts="before the LLM",
        needs_text=False,
        source=source,
        random=False,
        trained=False,
        options={"layer": layer, "tiles": "even", OPTION: False, **more},
        build=partial(_build, name),
        loses=FLOOR,
    )


ENTRIES = (
    _entry("qr", "pivoted QR, Businger and Golub 1965", layer=-2),
    _entry("css", "greedy column subset selection, Farahat et al. 2011", layer=-2, spread=0, spread_layer=9),
    _entry("fps", "farthest point first, Gonzalez 1985"),
    _entry("medoids", "greedy facility location, Nemhauser et al. 1978"),
)
