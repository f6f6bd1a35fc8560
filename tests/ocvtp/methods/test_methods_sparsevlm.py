"""SparseVLM's numbers, and its clusters against plain loops."""

from typing import Any

import inside_arithmetic
import pytest
import torch

from ocvtp.errors import BadInput
from ocvtp.methods import REGISTRY, options_of
from ocvtp.methods.base import Entry
from ocvtp.methods.sparsevlm import SparseVLM
from ocvtp.selection.density_peaks import cluster, clusters, means, recycled

ENTRY: Entry = REGISTRY["sparsevlm"]
LISTS = {192: (309, 204, 113), 128: (312, 117, 39), 64: (82, 32, 18)}
"""Tokens after layers 2, 6 and 15, of which 300/200/110, 303/110/36 and 66/30/17 are kept as they are."""


def per_layer(tokens: int, keep: int, depth: int = 32, **options: Any) -> list[int]:
    assert ENTRY.per_layer is not None
    return ENTRY.per_layer(tokens, keep, depth, options_of(ENTRY, options))


@pytest.mark.parametrize(
    ("keep", "true", "counted"), [(192, 206.5, 192.0), (128, 145.4, 128.6), (96, 114.1, 96.9), (64, 82.3, 64.8)]
)
def test_reference_takes_the_authors_lists(keep: int, true: float, counted: float) -> None:
    counts = per_layer(576, keep, budget="reference")
    assert counts[:3] == [576] * 3
    if keep in LISTS:
        first, second, third = LISTS[keep]
        assert counts[3:] == [first] * 4 + [second] * 9 + [third] * 16
    assert sum(counts) / 32 == pytest.approx(true, abs=0.05)
    # The authors count what leaves a layer.
    assert sum([*counts[1:], counts[-1]]) / 32 == pytest.approx(counted, abs=0.05)


@pytest.mark.parametrize("recycle", [True, False])
@pytest.mark.parametrize("depth", [2, 4, 12, 28, 32])
@pytest.mark.parametrize("tokens", [16, 144, 576, 999])
def test_average_stays_within_the_budget(depth: int, tokens: int, recycle: bool) -> None:
    made = SparseVLM(depth, options_of(ENTRY, {"recycle": recycle}))
    for share in (0.6, 0.75, 0.9):
        keep = int(share * tokens)
        counts = made.per_layer(tokens, keep)
        assert counts == sorted(counts, reverse=True)
        assert sum(counts) <= keep * depth
        # What is left would not buy one more token at any stage.
        assert sum(counts) + depth > keep * depth - (2 if recycle else 0) * depth
    assert made.per_layer(tokens, tokens) == [tokens] * depth


def test_steps_merge_a_tenth_of_three_tenths() -> None:
    made = SparseVLM(32, options_of(ENTRY, {"budget": "reference"}))
    assert [(step.kept, step.merged) for step in made.steps(576, 192)] == [(300, 9), (200, 4), (110, 3)]
    plain = SparseVLM(32, options_of(ENTRY, {"budget": "reference", "recycle": False}))
    assert [(step.kept, step.merged) for step in plain.steps(576, 192)] == [(300, 0), (200, 0), (110, 0)]


def test_reference_behaviour_drops_one_token_when_all_could_stay() -> None:
    made = SparseVLM(32, options_of(ENTRY, {"behaviour": "reference"}))
    assert [(step.kept, step.merged) for step in made.steps(576, 576)] == [(575, 1)] * 3


def test_stages_stand_at_the_same_share_of_other_depths() -> None:
    def scored(depth: int) -> list[int]:
        made = SparseVLM(depth, options_of(ENTRY, {}))
        assert [stage.pruned for stage in made.stages] == [stage.scored + 1 for stage in made.stages]
        return [stage.scored for stage in made.stages]

    assert [scored(depth) for depth in (32, 40, 4, 2)] == [[2, 6, 15], [3, 8, 19], [0, 1, 2], [0]]


@pytest.mark.parametrize(
    ("tokens", "keep", "depth", "options", "message"),
    [
        (2880, 160, 32, {}, r"first 3 layers read all of them, so at least \d+ are needed; budget='reference'"),
        (144, 16, 4, {}, r"first layer reads all of them, so at least \d+ are needed"),
        (576, 64, 32, {"behaviour": "fast"}, "no behaviour='fast': legal: 'default', 'reference'"),
        (576, 64, 32, {"recycle": 1}, "no recycle=1: legal: True, False"),
        (576, 64, 32, {"layers": [31]}, "rising whole numbers from 0 to 30"),
    ],
)
def test_what_cannot_be_is_refused(tokens: int, keep: int, depth: int, options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message) as error:
        per_layer(tokens, keep, depth, **options)
    if "at least" in message:
        least = int(str(error.value).split("at least ")[1].split()[0])
        assert min(per_layer(tokens, least, depth, **options)) >= 1
        with pytest.raises(BadInput, match="at least"):
            per_layer(tokens, least - 1, depth, **options)


@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_clusters_are_those_of_plain_loops(seed: int, noise: bool) -> None:
    """Whole numbers on a line, so that many distances, densities and products are equal, and none by rounding."""
    generator = torch.Generator().manual_seed(seed)
    count, number = (7, 1) if seed == 0 else (5 * seed + 4, seed + 1)
    tokens = torch.zeros(3, count, 4)
    tokens[..., seed % 4] = torch.randint(-9, 10, (3, count), generator=generator).float()
    centres, belongs = cluster(tokens, number, noise=noise)
    for image in range(3):
        expected = inside_arithmetic.peaks(list(tokens[image]), number, noise=noise)
        assert (centres[image].tolist(), belongs[image].tolist()) == expected
    made = means(tokens, belongs, number)
    for image in range(3):
        for rank in range(number):
            members = tokens[image][belongs[image] == rank]
            torch.testing.assert_close(made[image, rank], members.mean(0))


def test_how_many_are_merged() -> None:
    assert [(recycled(n), clusters(n)) for n in (0, 1, 2, 33, 276, 513)] == [
        (0, 0), (1, 1), (1, 1), (10, 2), (83, 9), (154, 16),
    ]  # fmt: skip
