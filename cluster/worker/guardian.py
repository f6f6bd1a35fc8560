"""Kills what workers leave behind if their driver is killed: their children, which no signal would reach.

Run as a script of its own, on purpose without any import of this package: it must be small and start at once.
On stdin come lines `+<process group>` and `-<process group>`; when stdin closes, the groups left are killed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys


def main() -> None:
    """Follow the driver until it closes the pipe, by itself or by dying."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    groups: set[int] = set()
    for line in sys.stdin.buffer:
        if line.endswith(b"\n"):
            (groups.add if line[:1] == b"+" else groups.discard)(int(line[1:]))
    for group in groups:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    main()
