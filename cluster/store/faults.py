"""File systems that fail for a moment, as shared ones do: what is tried again, and for how long."""

from __future__ import annotations

import errno
import functools
import logging
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from cluster.errors import StoreUnavailable

log = logging.getLogger(__name__)

PAUSES = (0.1, 0.5, 2.0, 5.0)  # seconds before the second, third, ... try
GONE = (FileNotFoundError, NotADirectoryError)
"""What says that a file is not there; every other error says nothing about it."""
_TRANSIENT = frozenset(
    getattr(errno, name)
    for name in "EIO ESTALE EAGAIN EBUSY EINTR ETIMEDOUT EREMOTEIO EHOSTDOWN EHOSTUNREACH ENETDOWN ENETUNREACH"
    " ECONNREFUSED ECONNRESET ECONNABORTED ENOTCONN ESHUTDOWN ENOBUFS ENOMEM ENFILE EMFILE".split()
    if hasattr(errno, name)
)

P = ParamSpec("P")
R = TypeVar("R")


def is_transient(error: OSError) -> bool:
    """Whether the same call may well succeed in a moment."""
    return error.errno in _TRANSIENT


def patient(action: Callable[P, R]) -> Callable[P, R]:
    """Try an action that may be repeated again, with back-off, while the file system fails for a moment.

    Raises:
        StoreUnavailable: it failed for longer.
        OSError: anything that waiting does not mend, at once.
    """

    @functools.wraps(action)
    def tried(*args: P.args, **kwargs: P.kwargs) -> R:
        for pause in (*PAUSES, None):
            try:
                return action(*args, **kwargs)
            except OSError as error:
                if not is_transient(error):
                    raise
                if pause is None:
                    raise StoreUnavailable(
                        f"the file system of the store failed {len(PAUSES) + 1} times: {error}"
                    ) from error
                log.warning("%s; again in %g s", error, pause)
            time.sleep(pause)
        raise AssertionError("the last try returns or raises")

    return tried
