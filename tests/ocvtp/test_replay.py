"""What is recorded as a CUDA graph, and what simply runs."""

import copy

import pytest
import torch
from torch import Tensor

from ocvtp.replay import Replays
from ocvtp.selection import CHOICES

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: graphs are recorded there alone")


def test_without_cuda_the_function_runs_each_time() -> None:
    replays, calls = Replays(), []

    def doubled(tokens: Tensor) -> Tensor:
        calls.append(tokens)
        return 2 * tokens

    tokens = torch.ones(3)
    assert [replays("key", doubled, tokens).tolist() for _ in range(4)] == [[2.0] * 3] * 4
    assert len(calls) == 4
    assert all(call is tokens for call in calls)


def test_copies_and_pickles_are_empty() -> None:
    replays = Replays()
    replays._hold("key", None)
    for made in (copy.deepcopy(replays), copy.copy(replays)):  # the second as pickle makes it, by __reduce__
        assert not made._held
        assert made._lock is not replays._lock


def test_the_least_recently_used_is_dropped() -> None:
    replays = Replays()
    for number in range(16):
        replays._hold(number, None)
    replays._hold(0, None)
    replays._hold("new", None)
    assert 0 in replays._held
    assert 1 not in replays._held


@CUDA
@pytest.mark.parametrize("choice", CHOICES)
def test_a_replayed_choice_is_the_launched_one(choice: str) -> None:
    draws = torch.Generator().manual_seed(0)
    for _ in range(5):
        tokens = torch.randn(2, 70, 32, generator=draws)
        assert torch.equal(CHOICES[choice](tokens.cuda(), 9).cpu(), CHOICES[choice](tokens, 9))
