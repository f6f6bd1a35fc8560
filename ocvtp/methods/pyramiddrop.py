"""PyramidDrop: image tokens grow fewer stage by stage, ranked anew by the last token of the instruction.

A stage before layer l ranks tokens by what layer l itself would attend to: its norm, queries, keys and rotary
positions on what it is about to read; softmax in float32, mean over heads, the row of the last token of the prompt
(in training, with labels: mean over the tokens right before each answer). The best stay, in their order; nothing is
merged. Positions are numbered anew at each stage, so that a new token has another position in each group of layers.

Stages are before layers 2, 8 and 16 of 32, as the authors advise for small budgets, at the same share of other depths
(`ocvtp.methods.inside`); `layers` gives others. They keep shares s, s^2, s^3 of all tokens, rounded down, at least one
token each.

Budgets: `average` takes the largest s whose average stays within `keep` and then adds tokens where the rest of the
budget allows. `reference` does as the authors: s with two digits, the nearest on average (0.19, 0.42 and 0.56 for 64,
128 and 192 of 576 tokens) with their 32 layers and 576 tokens, whatever the model and what its layers then truly read.
Below 64 of 576 the first two layers soon read more than the budget, and no s would meet it: there s falls with the
budget on the straight line from 0.19 towards nothing. With `layers` given s is found on these, and a budget that the
layers before them exceed is refused.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ocvtp.methods.base import Entry, no_pruner
from ocvtp.methods.inside import (
    AUTHORS_DEPTH,
    Inside,
    PruneStage,
    Step,
    counts,
    depth_of,
    fill,
    largest,
    listed,
    per_layer,
    scaled,
)
from ocvtp.vlms.family import Family

_LAYERS = (2, 8, 16)
_LEAST, _WHOLE, _LEAST_SHARE = 64, 576, 0.19
"""The smallest budget that the authors give a share for, the tokens of the image, and that share."""


class PyramidDrop(Inside):
    """Stages with geometric shares."""

    name: str = "pyramiddrop"
    positions: Literal["compact", "original"] = "compact"

    def __init__(self, depth: int, options: Mapping[str, Any]) -> None:
        """`options`: as in `ENTRY`."""
        given = options["layers"]
        layers = scaled(_LAYERS, depth) if given is None else listed(self.name, "layers", given, 1, depth - 1)
        super().__init__(depth, options["budget"], [PruneStage(layer, layer) for layer in layers])
        self._listed = given is not None

    def steps(self, tokens: int, keep: int) -> list[Step]:  # noqa: D102 - as in Inside
        if self.budget == "reference":
            return [Step(number) for number in self._kept(tokens, self._share(tokens, keep))]
        limit = keep * self.depth
        self._reached(tokens, keep)
        share = largest(lambda s: self._total(tokens, self._kept(tokens, s)) <= limit)
        kept = fill(self._kept(tokens, share), lambda numbers: self._checked(tokens, numbers), limit)
        return [Step(number) for number in kept]

    def _share(self, tokens: int, keep: int) -> float:
        """The s that the authors' setting of a budget has."""
        whole, depth, stages = _WHOLE, AUTHORS_DEPTH, [PruneStage(layer, layer) for layer in _LAYERS]
        if self._listed:
            self._reached(tokens, keep)
            whole, depth, stages = tokens, self.depth, list(self.stages)
        elif keep * _WHOLE < _LEAST * tokens:
            return _LEAST_SHARE * keep * _WHOLE / (_LEAST * tokens)

        def distance(share: float) -> int:
            return abs(_total(depth, whole, stages, _kept(whole, share, len(stages))) * tokens - keep * whole * depth)

        return min((number / 100 for number in range(101)), key=distance)

    def _reached(self, tokens: int, keep: int) -> None:
        """`BadInput` for a budget that the layers before the first stage exceed."""
        least = self._total(tokens, self._kept(tokens, 0.0))
        if least > keep * self.depth:
            way = "budget='reference' takes the authors' shares, whatever their average"
            raise self.refuse(tokens, keep, least, ways=() if self._listed else [way])

    def _kept(self, tokens: int, share: float) -> list[int]:
        return _kept(tokens, share, len(self.stages))

    def _total(self, tokens: int, kept: Sequence[int]) -> int:
        return _total(self.depth, tokens, self.stages, kept)

    def _checked(self, tokens: int, kept: Sequence[int]) -> int | None:
        falling = all(before >= after for before, after in zip([tokens, *kept], kept, strict=False))
        return self._total(tokens, kept) if falling else None


def _kept(tokens: int, share: float, stages: int) -> list[int]:
    return [max(1, int(tokens * share**power)) for power in range(1, stages + 1)]


def _total(depth: int, tokens: int, stages: Sequence[PruneStage], kept: Sequence[int]) -> int:
    return sum(counts(depth, tokens, stages, [Step(number) for number in kept]))


def _build(family: Family, pruner: Any, options: Mapping[str, Any]) -> PyramidDrop:
    no_pruner("pyramiddrop", pruner)
    return PyramidDrop(depth_of("pyramiddrop", family), options)


ENTRY = Entry(
    name="pyramiddrop",
    acts="inside the LLM",
    needs_text=True,
    source="PyramidDrop, arXiv 2410.17247",
    random=False,
    trained=False,
    options={"budget": "average", "layers": None},
    build=_build,
    per_layer=per_layer(PyramidDrop),
)
