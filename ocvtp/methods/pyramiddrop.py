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
128 and 192 of 576 tokens on 32 layers).
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ocvtp.methods.base import Entry, no_pruner
from ocvtp.methods.inside import Inside, PruneStage, Step, counts, depth_of, fill, largest, listed, per_layer, scaled
from ocvtp.vlms.family import Family

_LAYERS = (2, 8, 16)


class PyramidDrop(Inside):
    """Stages with geometric shares."""

    name: str = "pyramiddrop"
    positions: Literal["compact", "original"] = "compact"

    def __init__(self, depth: int, options: Mapping[str, Any]) -> None:
        """`options`: as in `ENTRY`."""
        given = options["layers"]
        layers = scaled(_LAYERS, depth) if given is None else listed(self.name, "layers", given, 1, depth - 1)
        super().__init__(depth, options["budget"], [PruneStage(layer, layer) for layer in layers])

    def steps(self, tokens: int, keep: int) -> list[Step]:  # noqa: D102 - as in Inside
        limit = keep * self.depth
        if self._total(tokens, self._kept(tokens, 0.0)) > limit:
            raise self.refuse(tokens, keep, self._total(tokens, self._kept(tokens, 0.0)))
        if self.budget == "reference":
            shares = [number / 100 for number in range(101)]
            kept = self._kept(
                tokens, min(shares, key=lambda s: abs(self._total(tokens, self._kept(tokens, s)) - limit))
            )
        else:
            share = largest(lambda s: self._total(tokens, self._kept(tokens, s)) <= limit)
            kept = fill(self._kept(tokens, share), lambda numbers: self._checked(tokens, numbers), limit)
        return [Step(number) for number in kept]

    def _kept(self, tokens: int, share: float) -> list[int]:
        return [max(1, int(tokens * share**power)) for power in range(1, len(self.stages) + 1)]

    def _total(self, tokens: int, kept: Sequence[int]) -> int:
        return sum(counts(self.depth, tokens, self.stages, [Step(number) for number in kept]))

    def _checked(self, tokens: int, kept: Sequence[int]) -> int | None:
        falling = all(before >= after for before, after in zip([tokens, *kept], kept, strict=False))
        return self._total(tokens, kept) if falling else None


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
