"""What methods share that choose in each tile of an image by itself: the loop over tiles, and what they look at.

Letters: G images of a group, N tokens of an image, n tokens of a tile, k tokens kept of it.
"""

from abc import abstractmethod
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from ocvtp.errors import BadInput
from ocvtp.methods.base import Encoded, Kept, Method, one_of
from ocvtp.methods.tiles import TILES, parts
from ocvtp.selection.quotas import listed
from ocvtp.selection.ranking import ascending, rows
from ocvtp.vlms.images import Facts

RECEIVED = "attention that tokens receive from all others, mean over heads, in place of that which CLS pays"
"""The substitute for CLS where the vision tower has none; VisionZip's paper and Qwen releases do so."""


ORDERS = ("raster", "picked")
"""In which the LLM reads what stays: as tokens stand in the image, or as they were picked."""


class Picking(Method):
    """Chooses in each tile what the tile's share of the budget lets it keep."""

    fewer: bool = True  # tiles="floor" loses what is left over

    def __init__(self, name: str, facts: Facts, tiles: str = "even", order: str = "raster") -> None:
        """`tiles` is one of `TILES`, `order` one of `ORDERS`."""
        one_of(name, {"tiles": tiles}, "tiles", TILES)
        one_of(name, {"order": order}, "order", ORDERS)
        self.facts, self._tiles, self._order = facts, tiles, order
        self.block = facts.feature_layer - 1
        """Whose output the LLM is fed from."""

    def layers(self) -> Collection[int]:  # noqa: D102 - as in Method
        return {self.block, self.facts.feature_layer}

    @abstractmethod
    def features(self, encoded: Encoded) -> Mapping[str, Tensor]:
        """What it picks by, under the names of arguments of `pick`, each [G, N, ...]."""

    @abstractmethod
    def pick(self, keep: int, **seen: Tensor) -> Tensor:
        """Numbers of the tokens that stay of a tile, [G, k], as they are picked; -1 is none. k is less than n.

        Args:
            keep: k.
            seen: as `features` names it, of the tokens of the tile, [G, n, ...].
        """

    def choose(self, encoded: Encoded) -> Kept:  # noqa: D102
        seen = self.features(encoded)
        device = next(iter(seen.values())).device
        found = [torch.empty(len(encoded.members), 0, dtype=torch.int64, device=device)]
        for members_n, _, keep in parts(encoded.layout, encoded.keep, self._tiles, device):
            if keep >= len(members_n):
                found.append(members_n.expand(len(encoded.members), -1))
            elif keep:
                of_tile = {name: each[:, members_n] for name, each in seen.items()}
                picked_Gk = self.pick(keep, **of_tile)
                found.append(torch.where(picked_Gk < 0, picked_Gk, members_n[picked_Gk]))
        picked_Gk = torch.cat(found, 1)
        if self._order == "raster":
            return Kept(ascending(picked_Gk))
        picked_Gk = listed(picked_Gk, picked_Gk >= 0, picked_Gk.shape[1])
        return Kept(ascending(picked_Gk), rows(encoded.vision.values(encoded.members), picked_Gk.clamp(min=0)))


def number(name: str, options: Mapping[str, Any], option: str, low: float, high: float) -> float:
    """An option that is a number within bounds; `BadInput` otherwise."""
    value = options[option]
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise BadInput(f"{name} has no {option}={value!r}: a number from {low:g} to {high:g} is needed")
    return float(value)
