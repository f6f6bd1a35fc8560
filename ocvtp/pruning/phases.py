"""Where the time of a call goes: tower, method, projector, prefill, and the rest, on the clock of the device.

What is not seen from outside of the modules, the choice of a method, is marked in the code by `phase`, which does
nothing unless somebody listens.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from ocvtp.vlms.families import family_of

PHASES = ("tower", "method", "projector", "prefill", "other")
"""In their order, but for `other`: what `generate` does before, between and after them, `lm_head` among it."""

_LISTENS: ContextVar["_Stopwatch | None"] = ContextVar("_LISTENS", default=None)


def now(device: torch.device) -> float:
    """Seconds, after all that was asked of the device is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


class _Stopwatch:
    """A phase within another counts for itself alone."""

    def __init__(self, device: torch.device) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._device, self._open = device, list[list[Any]]()

    def enter(self, name: str) -> None:
        self._open.append([name, now(self._device), 0.0])

    def leave(self) -> None:
        name, start, within = self._open.pop()
        spent = now(self._device) - start
        self.seconds[name] += spent - within
        if self._open:
            self._open[-1][2] += spent


@contextmanager
def phase(name: str) -> Iterator[None]:
    """What is done within belongs to this phase."""
    watch = _LISTENS.get()
    if watch is None:
        yield
        return
    watch.enter(name)
    try:
        yield
    finally:
        watch.leave()


@contextmanager
def timed(model: Any, device: torch.device) -> Iterator[Mapping[str, float]]:
    """Seconds of each of `PHASES` of what a model does within; complete when the context is left.

    The device is waited for at both ends of a phase, so nothing overlaps: the sum may exceed what the same call takes
    unwatched.

    Raises:
        BadInput: a model of no supported family.
    """
    family, watch = family_of(model), _Stopwatch(device)
    parts = {"tower": [family.tower], "projector": family.projectors, "prefill": [model.get_decoder()]}
    with ExitStack() as undo:
        for name, modules in parts.items():
            for module in modules:
                before = module.register_forward_pre_hook(lambda *_, name=name: watch.enter(name), prepend=True)
                # Always: towers are left by an exception after the deepest layer that is needed.
                after = module.register_forward_hook(lambda *_: watch.leave(), always_call=True)
                undo.callback(before.remove)
                undo.callback(after.remove)
        token = _LISTENS.set(watch)
        undo.callback(_LISTENS.reset, token)
        with phase("other"):
            yield watch.seconds
