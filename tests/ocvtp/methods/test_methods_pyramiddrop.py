"""PyramidDrop's numbers: shares s, s^2, s^3 of all tokens, with the averages that its sheet works out."""

from typing import Any

import pytest

from ocvtp.errors import BadInput
from ocvtp.methods import REGISTRY, options_of
from ocvtp.methods.base import Entry
from ocvtp.methods.pyramiddrop import PyramidDrop

ENTRY: Entry = REGISTRY["pyramiddrop"]


def per_layer(tokens: int, keep: int, depth: int = 32, **options: Any) -> list[int]:
    assert ENTRY.per_layer is not None
    return ENTRY.per_layer(tokens, keep, depth, options_of(ENTRY, options))


@pytest.mark.parametrize(
    ("keep", "kept", "average"), [(64, (109, 20, 3), 62.9), (128, (241, 101, 42), 127.4), (192, (322, 180, 101), 191.9)]
)
def test_reference_takes_the_authors_shares(keep: int, kept: tuple[int, int, int], average: float) -> None:
    counts = per_layer(576, keep, budget="reference")
    assert counts == [576] * 2 + [kept[0]] * 6 + [kept[1]] * 8 + [kept[2]] * 16
    assert sum(counts) / 32 == pytest.approx(average, abs=0.05)


@pytest.mark.parametrize("depth", [4, 28, 32])
def test_the_authors_shares_are_those_of_their_models_at_any_depth(depth: int) -> None:
    """Also where the first layers alone read more than the budget: on the line from 0.19 at 64 of 576 to nothing."""
    made = PyramidDrop(depth, options_of(ENTRY, {"budget": "reference"}))
    for tokens, keep, share in (
        (576, 192, 0.56),
        (576, 128, 0.42),
        (576, 64, 0.19),
        (2880, 160, 0.095),
        (144, 4, 0.0475),
    ):
        kept = [max(1, int(tokens * share**power)) for power in (1, 2, 3)]
        assert [step.tokens for step in made.steps(tokens, keep)] == kept
        counts = made.per_layer(tokens, keep)
        first = made.stages[0].pruned
        assert counts[: first + 1] == [tokens] * first + kept[:1]
    assert sum(per_layer(144, 16, 4, budget="reference")) == 144 + 27 + 5 + 1


def test_the_released_shares_follow_from_their_average() -> None:
    counts = per_layer(576, 270, budget="reference", layers=[8, 16, 24])
    assert counts == [576] * 8 + [288] * 8 + [144] * 8 + [72] * 8
    assert sum(counts) / 32 == 270


@pytest.mark.parametrize("depth", [2, 4, 12, 28, 32, 40])
@pytest.mark.parametrize("tokens", [16, 144, 576, 999, 2880])
def test_average_fills_the_budget_and_never_more(depth: int, tokens: int) -> None:
    made = PyramidDrop(depth, options_of(ENTRY, {}))
    stages = [stage.pruned for stage in made.stages]
    for share in (0.6, 0.7, 0.9, 1.0):
        keep = int(share * tokens)
        counts = made.per_layer(tokens, keep)
        kept = [tokens, *(counts[layer] for layer in stages)]
        assert kept == sorted(kept, reverse=True)
        assert sum(counts) <= keep * depth
        # One token more at any stage where it could be would be too much.
        ends = [*stages[1:], depth]
        for i, (start, end) in enumerate(zip(stages, ends, strict=True)):
            if kept[i + 1] < kept[i]:
                assert sum(counts) + end - start > keep * depth
    assert made.per_layer(tokens, tokens) == [tokens] * depth


def test_stages_stand_at_the_same_share_of_other_depths() -> None:
    def stages(depth: int) -> list[int]:
        made = PyramidDrop(depth, options_of(ENTRY, {}))
        assert [stage.scored for stage in made.stages] == [stage.pruned for stage in made.stages]
        return [stage.pruned for stage in made.stages]

    assert [stages(depth) for depth in (32, 28, 40, 4, 3, 2)] == [
        [2, 8, 16], [2, 7, 14], [2, 10, 20], [1, 2, 3], [1, 2], [1],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("tokens", "keep", "depth", "options", "message"),
    [
        (2880, 160, 32, {}, "first 2 layers read all of them, so at least 181"),
        (576, 128, 32, {"budget": "reference", "layers": [8, 16, 24]}, "at least 145"),
        (576, 128, 32, {"layers": [8, 16, 24]}, "first 8 layers read all of them, so at least 145"),
        (144, 32, 4, {}, "first layer reads all of them, so at least 37"),
        (576, 64, 32, {"layers": [8, 2]}, r"no layers=\[8, 2\]: rising whole numbers from 1 to 31"),
        (576, 64, 32, {"layers": [0]}, "rising whole numbers from 1"),
        (576, 64, 32, {"layers": []}, "rising whole numbers from 1"),
    ],
)
def test_what_cannot_be_is_refused(tokens: int, keep: int, depth: int, options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        per_layer(tokens, keep, depth, **options)
    if "at least" in message:
        least = int(message.rsplit(" ", 1)[1])
        assert min(per_layer(tokens, least, depth, **options)) >= 1
