"""What methods before the LLM are tested with: a tower made of numbers, and a way to see what the LLM is given.

Numbers are small and whole, so that there are many ties and sums are exact in any order.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import ocvtp
from ocvtp.methods import Encoded, Method
from ocvtp.vlms import family_of
from ocvtp.vlms.family import Vision
from ocvtp.vlms.images import Facts, Layout, Part

SQUARE: Layout = (Part(0, (4, 4)),)
WIDE: Layout = (Part(0, (3, 7)),)
TILES: Layout = (Part(0, (4, 4)), Part(16, (8, 8), tile=(4, 4)))
"""LLaVA-NeXT: the whole image, then two by two tiles."""
CUT: Layout = (Part(0, (4, 4)), Part(16, (5, 8), tile=(4, 4), offset=(2, 0)))
"""The same where padding was cut off above and below."""
LAYOUTS = {"square": SQUARE, "wide": WIDE, "tiles": TILES, "cut": CUT}


def owners(layout: Layout) -> list[list[int]]:
    """Numbers of the tokens of each tile, row by row, in plain loops."""
    found: dict[tuple[int, int, int], list[int]] = {}
    for number, part in enumerate(layout):
        rows, columns = part.grid
        height, width = part.tile or part.grid
        for row in range(rows):
            for column in range(columns):
                key = (number, (row + part.offset[0]) // height, (column + part.offset[1]) // width)
                found.setdefault(key, []).append(part.start + row * columns + column)
    return [found[key] for key in sorted(found)]


class Numbers(Vision):
    """A tower that answers with numbers drawn from a seed."""

    def __init__(self, layout: Layout, images: int = 3, seed: int = 0, width: int = 5) -> None:
        self._layout = layout
        self.count = sum(part.grid[0] * part.grid[1] for part in layout)
        self.counts, self.grids = [self.count] * images, [layout[0].grid] * images
        self._images, self._seed, self._width = images, seed, width

    def draw(self, what: str, *shape: int, low: int = 0, high: int = 5) -> Tensor:
        seed = sum(ord(letter) * 31**place for place, letter in enumerate(f"{what}{self._seed}")) % 2**31
        return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).float()

    def layout(self, member: int) -> Layout:
        return self._layout

    def tokens(self, layer: int, members: Sequence[int]) -> Tensor:
        return self.draw(f"tokens{layer}", self._images, self.count, self._width, low=-3)[list(members)]

    def values(self, members: Sequence[int]) -> Tensor:
        return self.draw("values", self._images, self.count, self._width, low=-9, high=9)[list(members)]

    def received(self, block: int, members: Sequence[int]) -> Tensor:
        return self.draw(f"received{block}", self._images, self.count, high=6)[list(members)] / 64

    def from_cls(self, block: int, members: Sequence[int]) -> Tensor:
        return self.draw(f"cls{block}", self._images, self.count, high=6)[list(members)] / 64

    def keys(self, block: int, members: Sequence[int]) -> Tensor:
        """Along one of the axes, forwards or backwards, so that cosines are -1, 0 or 1."""
        axes = self.draw(f"axes{block}", self._images, self.count, high=4).long()
        lengths = 2 ** self.draw(f"lengths{block}", self._images, self.count, high=3)
        lengths *= 1 - 2 * self.draw(f"signs{block}", self._images, self.count, high=2)
        return (torch.nn.functional.one_hot(axes, 4) * lengths[..., None])[list(members)]

    def cls_values(self, members: Sequence[int]) -> Tensor:
        return self.draw("cls_values", self._images, len(owners(self._layout)), self._width)[list(members)]


def encoded_of(vision: Numbers, keep: int) -> Encoded:
    members = range(len(vision.counts))
    return Encoded(vision, list(members), keep, [0 for _ in members], vision.grids, [[] for _ in members])


FACTS = Facts(tokens=16, grid=(4, 4), width=5, depth=6, feature_layer=5, cls=True)
WITHOUT_CLS = Facts(tokens=16, grid=(4, 4), width=5, depth=6, feature_layer=6, cls=False)


@dataclass(frozen=True)
class Seen:
    """What a pruned model kept of each image, and what it handed to the projector."""

    kept: list[list[int]]
    values: list[Tensor]


@torch.no_grad()
def prune(vlm: Any, inputs: Any, method: str, keep: Any, **options: Any) -> Seen:
    values: list[Tensor] = []
    with ocvtp.prune(vlm.model, method, keep, **options) as handle:
        project = handle._family.project
        handle._family.project = lambda given: values.extend(given) or project(given)
        vlm.model(**inputs)
    return Seen(handle.last_kept, values)


@dataclass(frozen=True)
class Tools:
    """The above for tests."""

    layouts: dict[str, Layout]
    numbers: type[Numbers]
    owners: Callable[[Layout], list[list[int]]]
    facts: Facts
    without_cls: Facts
    prune: Callable[..., Seen]
    family: Callable[[Any], Any]

    @staticmethod
    def choose(method: Method, vision: Numbers, keep: int) -> tuple[Tensor, Tensor]:
        """Numbers, and the values that the LLM reads."""
        encoded = encoded_of(vision, keep)
        kept = method.choose(encoded)
        if kept.values_GkV is not None:
            return kept.indices_Gk, kept.values_GkV
        values_GNV = vision.values(encoded.members)
        rows = [values_GNV[image, row[row >= 0]] for image, row in enumerate(kept.indices_Gk)]
        return kept.indices_Gk, torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


@pytest.fixture(scope="session")
def tools() -> Tools:
    return Tools(LAYOUTS, Numbers, owners, FACTS, WITHOUT_CLS, prune, lambda vlm: family_of(vlm.model))


@pytest.fixture
def pictures(vlm: Any, picture_of: Callable[..., Any]) -> Any:
    """Eight prompts, each with a picture, of several sizes."""
    sizes = [(56, 56), (80, 40), (30, 90), (56, 56), (200, 100), (64, 64), (56, 112), (90, 90)]
    return vlm.prompt([[picture_of(seed, *size)] for seed, size in enumerate(sizes)])
