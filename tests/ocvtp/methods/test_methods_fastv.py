"""FastV's numbers: (K N + (L - K) n) / L, worked out by hand."""

from typing import Any

import pytest

from ocvtp.errors import BadInput
from ocvtp.methods import REGISTRY, options_of
from ocvtp.methods.base import Entry
from ocvtp.methods.fastv import FastV

ENTRY: Entry = REGISTRY["fastv"]


def per_layer(tokens: int, keep: int, depth: int = 32, **options: Any) -> list[int]:
    assert ENTRY.per_layer is not None
    return ENTRY.per_layer(tokens, keep, depth, options_of(ENTRY, options))


@pytest.mark.parametrize(
    ("tokens", "keep", "k", "left"),
    [
        (576, 192, 2, 166), (576, 128, 2, 98), (576, 64, 2, 29),  # 166.4, 98.1, 29.9
        (576, 192, 3, 152), (576, 128, 3, 81), (576, 64, 3, 11),  # 152.3, 81.7, 11.0
        (2880, 640, 2, 490), (2880, 320, 2, 149),
        (576, 576, 2, 576), (576, 575, 2, 574),
    ],
)  # fmt: skip
def test_the_average_is_met_from_below(tokens: int, keep: int, k: int, left: int) -> None:
    assert per_layer(tokens, keep, k=k) == [tokens] * k + [left] * (32 - k)


def test_reference_counts_tokens_after_layer_k() -> None:
    counts = per_layer(576, 144, budget="reference")
    assert counts == [576] * 2 + [144] * 30
    assert sum(counts) / 32 == 171  # R = 75 %
    assert sum(per_layer(576, 288, budget="reference")) / 32 == 306  # R = 50 %


@pytest.mark.parametrize(
    ("depth", "k"), [(32, 2), (40, 2), (28, 2), (36, 2), (24, 2), (16, 1), (12, 1), (4, 1), (2, 1)]
)
def test_k_stands_at_the_same_share_of_other_depths(depth: int, k: int) -> None:
    assert [stage.pruned for stage in FastV(depth, options_of(ENTRY, {})).stages] == [k]
    assert [stage.scored for stage in FastV(depth, options_of(ENTRY, {})).stages] == [k - 1]


@pytest.mark.parametrize(
    ("tokens", "keep", "depth", "options", "message"),
    [
        (
            2880,
            160,
            32,
            {},
            r"first 2 layers read all of them, so at least 181 are needed; budget='reference' counts 160",
        ),
        (144, 16, 4, {}, r"16 of 144 tokens an image on average over 4 layers: the first layer .* at least 37"),
        (576, 64, 1, {}, "between layers, but the language model has 1 of them"),
        (576, 64, 32, {"k": 0}, "fastv has no k=0: a whole number, at least 1"),
        (576, 64, 32, {"k": 32}, r"no k=\[32\]: rising whole numbers from 1 to 31"),
        (576, 64, 32, {"budget": "mean"}, "no budget='mean': legal: 'average', 'reference'"),
        (576, 64, 32, {"K": 2}, "fastv has no option 'K'"),
    ],
)
def test_what_cannot_be_is_refused(tokens: int, keep: int, depth: int, options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        per_layer(tokens, keep, depth, **options)


def test_the_least_average_can_be_had() -> None:
    assert per_layer(2880, 181)[-1] >= 1
    assert per_layer(144, 37, 4) == [144, 1, 1, 1]
