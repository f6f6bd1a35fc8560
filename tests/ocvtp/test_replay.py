"""What is recorded as a CUDA graph, and what simply runs."""

import copy
import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ocvtp import replay
from ocvtp.replay import Replays, _Not
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
    replays._hold("key", _Not.YET)
    for made in (copy.deepcopy(replays), copy.copy(replays)):  # the second as pickle makes it, by __reduce__
        assert not made._held
        assert made._lock is not replays._lock


def test_the_least_recently_used_is_dropped() -> None:
    replays = Replays()
    for number in range(16):
        replays._hold(number, _Not.YET)
    replays._hold(0, _Not.YET)
    replays._hold("new", _Not.YET)
    assert 0 in replays._held
    assert 1 not in replays._held


class Broken:
    """Where a stream is entered to record on it, this error comes; counts who tried."""

    def __init__(self, error: type[Exception]) -> None:
        self.error, self.tried = error, 0

    def stream(self, _: Any) -> Any:
        self.tried += 1
        raise self.error("no graph here")


@pytest.fixture
def broken(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Broken:
    """Recording begins on a CPU, and fails."""
    found = Broken(request.param)
    stream = SimpleNamespace(cuda_stream=0, wait_stream=lambda _: None)
    monkeypatch.setattr(replay, "_can", lambda _: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", found.stream)
    return found


@pytest.mark.parametrize("broken", [RuntimeError], indirect=True)
def test_what_cannot_be_recorded_is_tried_once(broken: Broken, caplog: pytest.LogCaptureFixture) -> None:
    replays = Replays()
    with caplog.at_level(logging.WARNING):
        found = [replays("key", lambda tokens: 2 * tokens, torch.ones(3)).tolist() for _ in range(5)]
    assert found == [[2.0] * 3] * 5
    assert broken.tried == 1
    assert caplog.text.count("is not recorded as a CUDA graph") == 1


@pytest.mark.parametrize("broken", [torch.OutOfMemoryError], indirect=True)
def test_too_little_memory_for_a_recording_is_told(broken: Broken) -> None:
    replays = Replays()
    replays("key", lambda tokens: 2 * tokens, torch.ones(3))
    for tried in (1, 2):  # there may be more of it the next time
        with pytest.raises(torch.OutOfMemoryError, match="no graph here"):
            replays("key", lambda tokens: 2 * tokens, torch.ones(3))
        assert broken.tried == tried


@CUDA
@pytest.mark.parametrize("choice", CHOICES)
def test_a_replayed_choice_is_the_launched_one(choice: str) -> None:
    draws = torch.Generator().manual_seed(0)
    for _ in range(5):
        tokens = torch.randn(2, 70, 32, generator=draws)
        assert torch.equal(CHOICES[choice](tokens.cuda(), 9).cpu(), CHOICES[choice](tokens, 9))
