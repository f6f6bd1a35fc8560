"""File systems that fail for a moment, as shared ones do: what is tried again, and for how long."""

import errno
import functools
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

from cluster.errors import StoreUnavailable

log = logging.getLogger(__name__)

PAUSES = (0.1, 0.5, 2.0, 5.0)  # seconds before the second, third, ... try
GONE = (FileNotFoundError, NotADirectoryError)
"""What says that a file is not there; every other error says nothing about it."""
_TRANSIENT = frozenset(
    getattr(errno, name, errno.EIO)  # not every system has them all
    for name in "EIO ESTALE EAGAIN EBUSY EINTR ETIMEDOUT EREMOTEIO EHOSTDOWN EHOSTUNREACH ENETDOWN ENETUNREACH"
    " ECONNREFUSED ECONNRESET ECONNABORTED ENOTCONN ESHUTDOWN ENOBUFS ENOMEM ENFILE EMFILE".split()
)

P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def unavailable(what: str) -> Iterator[None]:
    """Raise `StoreUnavailable`, which begins with `what`, for an error that might be gone in a moment."""
    try:
        yield
    except OSError as error:
        if error.errno in _TRANSIENT:
            raise StoreUnavailable(f"{what}: {error}") from error
        raise


def patient(action: Callable[P, R]) -> Callable[P, R]:
    """Try an action that may be repeated again, with back-off, while the file system fails for a moment.

    Raises `StoreUnavailable` if it fails for longer, and at once any `OSError` that waiting does not mend.
    """

    @functools.wraps(action)
    def tried(*args: P.args, **kwargs: P.kwargs) -> R:
        for pause in PAUSES:
            try:
                return action(*args, **kwargs)
            except OSError as error:
                if error.errno not in _TRANSIENT:
                    raise
                log.warning("%s; again in %g s", error, pause)
            time.sleep(pause)
        with unavailable(f"the file system of the store failed {len(PAUSES) + 1} times"):
            return action(*args, **kwargs)
        raise AssertionError("it returned or raised")

    return tried


def appears(condition: Callable[[], object], seconds: float) -> bool:
    """Whether it comes true in so much time, which shared file systems take to show what another machine did."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
