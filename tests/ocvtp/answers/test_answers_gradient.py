"""Kept sets drawn around the pruner's: how often, how likely, and that their gradient is that of the expectation."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from ocvtp.pruner import PrunerConfig
from ocvtp.pruner.training import answers
from ocvtp.selection import css, qr
from ocvtp.selection.proposals import RULES, propose, sample

ASSIGNMENTS = ("shared", "distinct", "residual", "gain")
SLOTS, COUNT = 2, 5


def drawn(seed: int, *shape: int) -> Any:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gumbel(seed: int, *shape: int) -> Any:
    return -torch.rand(*shape, generator=torch.Generator().manual_seed(seed)).log().neg().log()


def test_gain_is_greedy_column_subset_selection_where_attention_is_even() -> None:
    tokens, everywhere = drawn(0, 4, 14, 9), torch.ones(4, 14, dtype=torch.bool)
    even, slots = torch.full((4, 5, 14), 0.2), torch.ones(4, 5, dtype=torch.bool)
    for rule, choice in (("residual", qr), ("gain", css)):
        found = propose(even, tokens, everywhere, slots, rule)
        assert found.sort(1).values.tolist() == choice(tokens, 5).tolist()
    sharp = torch.eye(14)[[3, 7, 1, 9, 12]].expand(4, -1, -1)
    assert propose(sharp, tokens, everywhere, slots, "gain").tolist() == [[3, 7, 1, 9, 12]] * 4


@pytest.mark.parametrize("assignment", ["residual", "gain"])
def test_near_a_temperature_of_zero_picks_are_those_of_the_pruner(assignment: str) -> None:
    tokens, attention = drawn(1, 6, 12, 8), (2 * drawn(2, 6, 4, 12)).softmax(1)
    mask = torch.arange(12) < torch.tensor([12, 12, 7, 3, 2, 12])[:, None]
    attention, tokens = attention * mask[:, None], tokens * mask[:, :, None]
    found, logarithm = sample(attention, tokens, mask, gumbel(0, 6, 4, 12), assignment, 1e-4)
    assert torch.equal(found, propose(attention, tokens, mask, torch.ones(6, 4, dtype=torch.bool), assignment))
    # Two tokens that are left are equally far from their mean: either could be first.
    torch.testing.assert_close(logarithm[[0, 1, 2, 5]], torch.zeros(4), atol=1e-3, rtol=0)
    assert found[4].sort().values.tolist() == [0, 1, 12, 12]  # it has no more


@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_picks_are_drawn_as_often_as_their_probability_says(assignment: str) -> None:
    many = 20_000
    tokens, attention = drawn(3, 1, COUNT, 4).expand(many, -1, -1), drawn(4, 1, SLOTS, COUNT).softmax(1)
    exists = torch.ones(many, COUNT, dtype=torch.bool)
    picks, logarithm = sample(attention.expand(many, -1, -1), tokens, exists, gumbel(5, many, SLOTS, COUNT),
                              assignment, 0.7)  # fmt: skip
    keys = (picks * torch.tensor([COUNT, 1])).sum(1)
    total = 0.0
    for key in keys.unique():
        here = keys == key
        # Of a rule the same pairs of slot and token may come in another order, which is another draw.
        expected = sum(float(one.exp()) for one in logarithm[here].mul(1e4).round().div(1e4).unique())
        assert here.float().mean().item() == pytest.approx(expected, abs=0.015)
        total += expected
    assert total == pytest.approx(1, abs=0.02)


class Priced:
    """Teaches that some kept sets answer worse than others."""

    def __init__(self) -> None:
        self.prices = drawn(6, COUNT, COUNT).abs()
        self.asked = 0

    def price(self, kept: Sequence[int]) -> float:
        return float(self.prices[kept[0], kept[-1]])

    def divergence(self, images: Sequence[str], kept_BS: Any, weights_BSN: Any, draw: int | None) -> Any:
        assert torch.equal(weights_BSN.argmax(2), kept_BS)
        assert not weights_BSN.requires_grad
        self.asked += 1
        return torch.tensor([self.price(row) for row in kept_BS.tolist()])


@pytest.mark.parametrize("assignment", ["residual", "gain"])
def test_the_gradient_is_that_of_the_expected_divergence(assignment: str) -> None:
    tokens, logits = drawn(3, 1, COUNT, 4), drawn(4, 1, SLOTS, COUNT).requires_grad_()
    exists, temperature = torch.ones(1, COUNT, dtype=torch.bool), 0.7
    teacher, config = Priced(), PrunerConfig(4, decoder=None, assignment=assignment)

    attention = logits.softmax(1)
    expected = torch.zeros(())
    for first, second in itertools.permutations(range(COUNT), 2):  # every draw, made certain by noise
        noise = torch.full((1, SLOTS, COUNT), -1e4)
        noise[0, 0, first] = noise[0, 1, second] = 1e4
        picks, logarithm = sample(attention, tokens, exists, noise, assignment, temperature)
        assert sorted(picks[0].tolist()) == sorted([first, second])
        expected = expected + logarithm[0].exp() * teacher.price(sorted([first, second]))
    (exact,) = torch.autograd.grad(expected, logits)

    many = 3000
    attention = logits.softmax(1).expand(many, -1, -1)
    loss = answers.sampled_loss(config, attention, tokens.expand(many, -1, -1), None, teacher,
                                [str(i) for i in range(many)], 1, samples=4, temperature=temperature)  # fmt: skip
    (found,) = torch.autograd.grad(loss, logits)
    assert teacher.asked == 4
    assert loss.item() == pytest.approx(expected.item(), rel=0.05)
    torch.testing.assert_close(found, exact, atol=0.1 * float(exact.abs().max()), rtol=0.1)


def test_what_is_drawn_of_an_image_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the batch, and another for each step."""
    kept: list[Any] = []
    teacher = Priced()
    monkeypatch.setattr(
        teacher, "divergence", lambda images, kept_BS, *_: kept.append(kept_BS) or torch.rand(len(images))
    )
    tokens, attention = drawn(7, 2, 12, 8), drawn(8, 2, 4, 12).softmax(1)
    config = PrunerConfig(8, decoder=None, assignment="gain")

    def sets(images: slice, names: Sequence[str], draw: int) -> Any:
        kept.clear()
        answers.sampled_loss(config, attention[images], tokens[images], None, teacher, names, draw, samples=3,
                             temperature=1.0)  # fmt: skip
        return torch.stack(kept, 1)

    both = sets(slice(0, 2), ["a", "b"], 5)
    assert torch.equal(both[1:], sets(slice(1, 2), ["b"], 5))
    assert not torch.equal(both, sets(slice(0, 2), ["a", "b"], 6))
    assert len({tuple(row) for row in both[0].tolist()}) > 1
    assert set(RULES) == {"residual", "gain", "mass"}
