"""Who a process is, in a way that survives pid reuse, reboots and shared file systems.

A pid alone names nobody: it is reused, and means nothing on another host or in another container.
`Process` adds the start time and the domain (boot and pid namespace) within which the pid can be looked up.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

LINUX = sys.platform == "linux"


@cache
def domain() -> str:
    """The boot and pid namespace of this process: pids can be compared within one domain only."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return socket.gethostname()


def start_time(pid: int) -> str | None:
    """When `pid` started, as an opaque string; None if no such process runs (a zombie does not run)."""
    if LINUX:
        try:
            fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        except OSError:
            return None
        return None if fields[0] in (b"Z", b"X") else fields[19].decode()
    out = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return out.stdout.strip() or None


@dataclass(frozen=True)
class Process:
    """One process, named so that anybody sharing the file system can tell whether it is the same one."""

    host: str
    pid: int
    started: str
    domain: str

    @classmethod
    def me(cls) -> Process:
        """The calling process."""
        pid = os.getpid()
        return cls(socket.gethostname(), pid, start_time(pid) or "", domain())

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Process:
        """Read what `to_json` wrote; KeyError or ValueError if it is something else."""
        return cls(str(data["host"]), int(data["pid"]), str(data["started"]), str(data["domain"]))

    def to_json(self) -> dict[str, Any]:
        """A JSON object that names this process."""
        return asdict(self)

    def alive(self) -> bool | None:
        """Whether it still runs; None if that cannot be seen from here (another host or container)."""
        if self.domain != domain():
            return None
        return start_time(self.pid) == self.started

    def __str__(self) -> str:
        return f"{self.host}:{self.pid}"
