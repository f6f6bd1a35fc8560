"""What this machine has to hand out, and what processes use of it, from /proc and cgroups, without CUDA."""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

from cluster.host.process import ENDED

GIB = 2**30
_GPU_LINE = re.compile(r"^(?P<indent>\s*)(?:GPU|MIG).*\(UUID: (?P<uuid>[^)]+)\)")


@dataclass(frozen=True)
class Machine:
    """Cores, memory and the GPUs, each named as CUDA_VISIBLE_DEVICES wants it."""

    cpus: int
    memory_gb: float
    gpus: tuple[str, ...]

    @classmethod
    def here(cls, *, cpus: int | None = None, memory_gb: float | None = None) -> Machine:
        """What there is here, within the limits of affinity and cgroups, or those given."""
        return cls(cpus or count_cpus(), memory_gb or total_memory_gb(), visible_gpus())


def _cgroup_files(name: str) -> list[Path]:
    """A cgroup v2 file of this process and of every group above it."""
    try:
        own = Path("/proc/self/cgroup").read_text().rpartition("0::/")[2].splitlines()
    except OSError:
        return []
    root = Path("/sys/fs/cgroup")
    folder = root / (own[0] if own else "")
    return [level / name for level in (folder, *folder.parents) if level.is_relative_to(root)]


def count_cpus() -> int:
    """Cores this process may use, by affinity and cgroup quota."""
    try:
        cpus = len(os.sched_getaffinity(0))
    except AttributeError:
        cpus = os.cpu_count() or 1
    for file in _cgroup_files("cpu.max"):
        with contextlib.suppress(OSError, ValueError):
            quota, period = file.read_text().split()
            if quota != "max":
                cpus = min(cpus, max(1, math.ceil(int(quota) / int(period))))
    return cpus


def total_memory_gb() -> float:
    """Memory of this machine, or of the tightest cgroup, in GiB."""
    limits = [int(psutil.virtual_memory().total)]
    v1 = Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")
    for file in (*_cgroup_files("memory.max"), v1):
        with contextlib.suppress(OSError, ValueError):
            limits.append(int(file.read_text()))
    return min(limits) / GIB


def visible_gpus() -> tuple[str, ...]:
    """GPUs this process may use: those of CUDA_VISIBLE_DEVICES, else all that nvidia-smi lists."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        names = [name.strip() for name in chosen.split(",")]
        return tuple(name for name in names if name and not name.startswith("-"))
    if shutil.which("nvidia-smi") is None:
        return ()
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return parse_gpus(listing.stdout)


def parse_gpus(listing: str) -> tuple[str, ...]:
    """UUIDs in the output of `nvidia-smi -L`; a GPU that is split into MIG parts is replaced by them."""
    gpus: list[list[str]] = []
    for line in listing.splitlines():
        match = _GPU_LINE.match(line)
        if match and not match["indent"]:
            gpus.append([match["uuid"]])
        elif match and gpus:
            gpus[-1].append(match["uuid"])
    return tuple(uuid for gpu in gpus for uuid in (gpu[1:] or gpu))


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
        with contextlib.suppress(OSError, ValueError, IndexError):
            for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                if line.startswith("RssAnon:"):
                    anonymous += int(line.split()[1])
                elif line.startswith("RssShmem:"):
                    shared = max(shared, int(line.split()[1]))
    return (anonymous + shared) * 1024 / GIB


def oom_kills() -> int:
    """Processes the kernel killed for lack of memory since boot; 0 where it does not say."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0
