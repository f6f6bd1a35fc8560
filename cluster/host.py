"""The machine here and its processes: what there is to hand out, from /proc and cgroups, and who is who, without CUDA.

A pid alone names nobody: it is reused, and means nothing on another host or in another container. `Process` adds the
start time and the domain (boot and pid namespace) within which the pid can be looked up.
"""

import contextlib
import math
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Self

import psutil

LINUX = sys.platform == "linux"
ENDED = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
GIB = 2**30


@dataclass(frozen=True)
class Machine:
    """Cores, memory and the GPUs, each named as CUDA_VISIBLE_DEVICES wants it."""

    cpus: int
    memory_gb: float
    gpus: tuple[str, ...]

    @classmethod
    def here(cls, *, cpus: int | None = None, memory_gb: float | None = None) -> Self:
        """What there is here, within the limits of affinity and cgroups, or those given."""
        return cls(cpus or count_cpus(), memory_gb or total_memory_gb(), visible_gpus())


def _cgroup_files(name: str) -> list[Path]:
    """A cgroup v2 file of this process and of every group above it."""
    root = Path("/sys/fs/cgroup")
    try:
        own = root / Path("/proc/self/cgroup").read_text().partition("0::/")[2].partition("\n")[0]
    except OSError:
        return []
    return [level / name for level in (own, *own.parents) if level.is_relative_to(root)]


def count_cpus() -> int:
    """Cores this process may use, by affinity and cgroup quota."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for file in _cgroup_files("cpu.max"):
        with contextlib.suppress(OSError, ValueError):  # ValueError: "max"
            quota, period = map(int, file.read_text().split())
            cpus = min(cpus, max(1, math.ceil(quota / period)))
    return cpus


def total_memory_gb() -> float:
    """Memory of this machine, or of the tightest cgroup, in GiB."""
    limits = [int(psutil.virtual_memory().total)]
    for file in (*_cgroup_files("memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        with contextlib.suppress(OSError, ValueError):
            limits.append(int(file.read_text()))
    return min(limits) / GIB


def visible_gpus() -> tuple[str, ...]:
    """GPUs this process may use: those of CUDA_VISIBLE_DEVICES, else all that nvidia-smi lists."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        names = [name.strip() for name in chosen.split(",")]
        return tuple(name for name in names if name and not name.startswith("-"))
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return parse_gpus(listing.stdout)


def parse_gpus(listing: str) -> tuple[str, ...]:
    """UUIDs in the output of `nvidia-smi -L`; a GPU that is split into MIG parts is replaced by them."""
    found: list[str] = []
    for gpu in re.split(r"^(?=GPU)", listing, flags=re.MULTILINE):
        whole_and_parts = re.findall(r"\(UUID: ([^)]+)\)", gpu)
        found += whole_and_parts[1:] or whole_and_parts
    return tuple(found)


def group_members(groups: Iterable[int]) -> dict[int, list[int]]:
    """The running processes of each process group."""
    members: dict[int, list[int]] = {group: [] for group in groups}
    for pid in psutil.pids():
        with contextlib.suppress(OSError, psutil.Error):
            group = os.getpgid(pid)
            if group in members and psutil.Process(pid).status() not in ENDED:
                members[group].append(pid)
    return members


def memory_of(pids: Iterable[int]) -> float:
    """Memory in GiB that processes hold and nobody else could have back.

    Anonymous pages add up; shared memory is counted once; mapped files (libraries, Arrow shards) not at all,
    since the kernel drops them when memory is short. psutil does not tell these apart.
    """
    anonymous, shared = 0, 0
    for pid in pids:
        held = _counters(f"/proc/{pid}/status")
        anonymous += held.get("RssAnon:", 0)
        shared = max(shared, held.get("RssShmem:", 0))
    return (anonymous + shared) * 1024 / GIB


def oom_kills() -> int:
    """Processes the kernel killed for lack of memory since boot; 0 where it does not say."""
    return _counters("/proc/vmstat").get("oom_kill", 0)


def _counters(path: str) -> dict[str, int]:
    """The lines of a file of /proc that give a number; empty if it cannot be read."""
    with contextlib.suppress(OSError, ValueError):
        fields = (line.split() for line in Path(path).read_text().splitlines())
        return {field[0]: int(field[1]) for field in fields if len(field) > 1 and field[1].isdigit()}
    return {}


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
        """The process of which this is `vars`; KeyError or ValueError if it is something else."""
        return cls(str(data["host"]), int(data["pid"]), str(data["started"]), str(data["domain"]))

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
