"""Two methods one after the other: one before the LLM, one inside it. `visionzip+fastv` is such a pair.

The first keeps `split` times the budget of an image, rounded, halves up, and at most all; the second drops tokens of
these so that the layers read the budget on average (`ocvtp.methods.inside`; with its `budget="reference"` as its
authors count). With `split` 1 the second has nothing left to do. The default, 1.5, is VScan's.

Options of the two have their names, with `before_` and `inside_` in front.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from ocvtp.errors import BadInput
from ocvtp.methods.base import Encoded, Entry, Kept, Method, no_pruner
from ocvtp.methods.inside import Inside, Later, Scored, Step
from ocvtp.vlms.family import Family, Vision
from ocvtp.vlms.images import Images

SPLIT = 1.5
_MOST = 64.0


class Combined(Inside):
    """All that `inside` does, on what `before` leaves."""

    def __init__(self, name: str, before: Method, inside: Inside, split: float) -> None:
        super().__init__(inside.depth, inside.budget, inside.stages)
        self.before, self.inside, self.split = before, inside, split
        self.fewer = before.fewer
        self.positions, self.reads_attention = inside.positions, inside.reads_attention
        self.reads_text, self.reads_later = inside.reads_text, inside.reads_later
        self.adapts_at = inside.adapts_at
        self.name = name

    # --- Before ------------------------------------------------------------------------------------------------------

    def layers(self) -> Collection[int]:  # noqa: D102 - as in Method
        return {*self.before.layers(), *self.inside.layers()}

    def encode(self, family: Family, images: Images, keeps: Sequence[int]) -> Vision:  # noqa: D102
        if type(self.before).encode is not Method.encode:
            return self.before.encode(family, images, keeps)
        return super().encode(family, images, keeps)

    def choose(self, encoded: Encoded) -> Kept:  # noqa: D102
        return self.before.choose(encoded)

    def slots(self, encoded: Encoded) -> Tensor | None:  # noqa: D102
        return self.before.slots(encoded)

    def enter(self, tokens: int, keep: int) -> int:  # noqa: D102 - as in Inside
        return entering(tokens, keep, self.split)

    # --- Inside ------------------------------------------------------------------------------------------------------

    def steps(self, tokens: int, keep: int) -> list[Step]:  # noqa: D102
        try:
            return self.inside.steps(tokens, keep)
        except BadInput as error:
            raise BadInput(f"{self.name} (split={self.split:g}): {error}") from None

    def raters(self, vision_ND: Tensor, text_TD: Tensor) -> Tensor:  # noqa: D102
        return self.inside.raters(vision_ND, text_TD)

    def score(self, scored: Scored) -> Tensor:  # noqa: D102
        return self.inside.score(scored)

    def rank(self, scores_IN: Tensor, later: Later) -> Tensor:  # noqa: D102
        return self.inside.rank(scores_IN, later)

    def information(self, scored: Scored) -> Tensor:  # noqa: D102
        return self.inside.information(scored)

    def adapted(self, tokens: int, keep: int, information: float) -> list[Step]:  # noqa: D102
        return self.inside.adapted(tokens, keep, information)

    def merge(self, dropped_GdD: Tensor, scores_Gd: Tensor, merged: int) -> tuple[Tensor, Tensor]:  # noqa: D102
        return self.inside.merge(dropped_GdD, scores_Gd, merged)


def entering(tokens: int, keep: int, split: float) -> int:
    """How many of an image's tokens enter the LLM."""
    return min(tokens, max(keep, int(split * keep + 0.5)))


def combined(first: Entry, second: Entry, name: str | None = None, *, source: str | None = None, **fixed: Any) -> Entry:
    """The entry of a pair, by default with the names of both.

    Args:
        first: before the LLM.
        second: inside it.
        name: another name.
        source: where the pair comes from, if it has a source of its own.
        fixed: options that are set and not offered.

    Raises:
        BadInput: the first does not act before the LLM, or the second not inside it.
    """
    name = name or f"{first.name}+{second.name}"
    for entry, acts in ((first, "before the LLM"), (second, "inside the LLM")):
        if entry.acts != acts:
            raise BadInput(f"{name}: {entry.name} acts {entry.acts}, but a method that acts {acts} must stand there")
    if first.trained:
        raise BadInput(f"{name}: {first.name} needs a trained pruner, which a pair cannot be given")
    offered: dict[str, Any] = {"split": SPLIT}
    for prefix, entry in (("before_", first), ("inside_", second)):
        offered |= {prefix + option: value for option, value in entry.options.items()}
    return Entry(
        name=name,
        acts="inside the LLM",
        needs_text=True,
        source=source or f"{first.source}; then {second.source}",
        random=first.random or second.random,
        options={option: value for option, value in offered.items() if option not in fixed},
        build=partial(_build, name, first, second, fixed),
        positions=second.positions,
        per_layer=_per_layer(second, fixed),
        text_asks=second.text_asks,
        without_cls=first.without_cls or second.without_cls,
        needs=first.needs | second.needs,
    )


def _of(prefix: str, entry: Entry, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of one of the two."""
    return {option: options[prefix + option] for option in entry.options}


def _split(name: str, options: Mapping[str, Any]) -> float:
    split = options["split"]
    if isinstance(split, bool) or not isinstance(split, int | float) or not 1 <= split <= _MOST:
        raise BadInput(f"{name} has no split={split!r}: a number from 1 to {_MOST:g} is needed")
    return float(split)


def _build(
    name: str, first: Entry, second: Entry, fixed: Mapping[str, Any], family: Family, pruner: Any,
    options: Mapping[str, Any],
) -> Combined:  # fmt: skip
    no_pruner(name, pruner)
    options = {**options, **fixed}
    before = first.build(family, None, _of("before_", first, options))
    inside = second.build(family, None, _of("inside_", second, options))
    assert before is not None  # noqa: S101 - it acts before the LLM
    if not isinstance(inside, Inside):
        raise BadInput(f"{name}: {second.name} is no ocvtp.methods.inside.Inside, as a method inside the LLM must be")
    return Combined(name, before, inside, _split(name, options))


def _per_layer(second: Entry, fixed: Mapping[str, Any]) -> Callable[[int, int, int, Mapping[str, Any]], list[int]]:
    def found(tokens: int, keep: int, depth: int, options: Mapping[str, Any]) -> list[int]:
        options = {**options, **fixed}
        enter = entering(tokens, keep, _split(second.name, options))
        if second.per_layer is None:
            return [enter] * depth
        return second.per_layer(enter, keep, depth, _of("inside_", second, options))

    return found
