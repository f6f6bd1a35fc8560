"""Ctrl-C and SIGTERM as a flag, looked at between steps, so that cleaning up is never itself interrupted."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

from cluster.errors import Interrupted


@contextlib.contextmanager
def signals_caught() -> Iterator[Callable[[], None]]:
    """Note signals instead of being ended by them; yields what raises `Interrupted` if one has come.

    Only the main thread can do that: in any other, signals keep their effect.
    """
    seen: list[int] = []

    def check() -> None:
        if seen:
            raise Interrupted(seen[0])

    caught = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, lambda number, _: seen.append(number)) for number in caught}
    try:
        yield check
    finally:
        for number, handler in before.items():
            # None: a handler that was not set from Python cannot be restored from Python either
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
