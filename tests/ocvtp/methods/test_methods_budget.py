"""Counts, shares and percentages."""

import numpy as np
import pytest

from ocvtp.errors import BadInput
from ocvtp.methods import Budget


@pytest.mark.parametrize(
    ("keep", "whole", "tokens"),
    [
        (64, 576, 64),
        (576, 576, 576),
        (np.int64(5), 16, 5),
        (1, 16, 1),
        (1.0, 16, 16),
        (0.111, 144, 16),
        (0.222, 144, 32),
        (0.333, 144, 48),
        ("11.1%", 144, 16),
        (" 33.3 %", 576, 192),
        ("100%", 7, 7),
        (0.5, 5, 3),
        (0.001, 16, 1),
    ],
)
def test_tokens_that_stay(keep: int | float | str, whole: int, tokens: int) -> None:
    assert Budget.parse(keep).tokens(whole) == tokens


@pytest.mark.parametrize(
    "keep", [0, -3, 0.0, -0.1, 1.01, float("nan"), float("inf"), "0%", "101%", "half", "0.5", "%", True, None, [3]]
)
def test_what_is_no_budget_is_refused_with_what_is_right(keep: object) -> None:
    with pytest.raises(BadInput, match=r"^keep is "):
        Budget.parse(keep)


def test_more_than_there_are() -> None:
    with pytest.raises(BadInput, match="keep is 17, but image 3 has 16 tokens: at most 16 can stay"):
        Budget.parse(17).tokens(16, "image 3")
