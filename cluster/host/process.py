"""Who a process is, in a way that survives pid reuse, reboots and shared file systems.

A pid alone names nobody: it is reused, and means nothing on another host or in another container.
`Process` adds the start time and the domain (boot and pid namespace) within which the pid can be looked up.
"""

import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Self

import psutil

LINUX = sys.platform == "linux"
ENDED = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)


@cache
def domain() -> str:
    """The boot and pid namespace of this process: pids can be compared within one domain only."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return socket.gethostname()


def start_time(pid: int) -> str | None:
    """When `pid` started, in seconds since boot; "" if it has ended but is not reaped, None if it cannot be seen."""
    try:
        process = psutil.Process(pid)
        # The difference is what the kernel counts: setting the clock moves both by the same.
        return "" if process.status() in ENDED else f"{process.create_time() - psutil.boot_time():.2f}"
    except psutil.Error:
        return None


@dataclass(frozen=True)
class Process:
    """One process, named so that anybody sharing the file system can tell whether it is the same one."""

    host: str
    pid: int
    started: str
    domain: str

    @classmethod
    def me(cls) -> Self:
        """The calling process."""
        return cls(socket.gethostname(), os.getpid(), start_time(os.getpid()) or "unknown", domain())

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read what `to_json` wrote; KeyError or ValueError if it is something else."""
        return cls(str(data["host"]), int(data["pid"]), str(data["started"]), str(data["domain"]))

    def to_json(self) -> dict[str, Any]:
        """A JSON object that names this process."""
        return asdict(self)

    def alive(self) -> bool | None:
        """Whether it still runs; None if that cannot be seen from here (another host, container or user)."""
        if self.domain != domain():
            return None
        started = start_time(self.pid)
        if started is None:  # no such process, or, where /proc hides them (hidepid=2), one of another user
            try:
                os.kill(self.pid, 0)
            except ProcessLookupError:
                return False
            except PermissionError:
                return None
            started = start_time(self.pid)  # it began, or was reaped, in between
        return started == self.started

    def __str__(self) -> str:
        return f"{self.host}:{self.pid}"
