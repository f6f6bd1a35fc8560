"""Ctrl-C and SIGTERM as a flag, looked at between steps, so that cleaning up is never itself interrupted."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from cluster.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Signals:
    """Which signal has come, if any."""

    signum: int | None = None

    def check(self) -> None:
        """Raise `Interrupted` if one has come."""
        if self.signum is not None:
            raise Interrupted(self.signum)


@contextlib.contextmanager
def signals_caught() -> Iterator[Signals]:
    """Note signals instead of being ended by them; handlers are restored afterwards.

    Only the main thread can do that: in any other, signals keep their effect.
    """
    seen = Signals()

    def note(signum: int, frame: FrameType | None) -> None:
        seen.signum = seen.signum or signum

    if threading.current_thread() is not threading.main_thread():
        yield seen
        return
    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            # None: a handler that was not set from Python cannot be restored from Python either
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
