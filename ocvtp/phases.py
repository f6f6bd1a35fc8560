"""Where the time of a call goes: tower, method, projector, prefill, and the rest, on the clock of the device.

What is not seen from outside of the modules, the choice of a method, is marked in the code by `phase`, which does
nothing unless somebody listens.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

PHASES = ("tower", "method", "projector", "prefill", "other")
"""In their order, but for `other`: what `generate` does before, between and after them, `lm_head` among it."""

LISTENS: ContextVar["Stopwatch | None"] = ContextVar("LISTENS", default=None)
"""Whoever times this thread's phases."""


def now(device: torch.device) -> float:
    """Seconds, after all that was asked of the device is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


class Stopwatch:
    """Seconds of each phase; one within another counts for itself alone."""

    def __init__(self, device: torch.device) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._device, self._open = device, list[list[Any]]()

    def enter(self, name: str) -> None:
        """A phase begins."""
        self._open.append([name, now(self._device), 0.0])

    def leave(self) -> None:
        """The phase that began last ends."""
        name, start, within = self._open.pop()
        spent = now(self._device) - start
        self.seconds[name] += spent - within
        if self._open:
            self._open[-1][2] += spent


@contextmanager
def phase(name: str) -> Iterator[None]:
    """What is done within belongs to this phase."""
    watch = LISTENS.get()
    if watch is None:
        yield
        return
    watch.enter(name)
    try:
        yield
    finally:
        watch.leave()
