"""For `ocvtp doctor`: whether Ray and SLURM can be used from here, and what is missing for them."""

import importlib.util
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from typing import Literal

LIMIT = 10.0  # seconds that a command or a connection may take
Said = tuple[Literal["ok", "missing", "warning"], str, str]
"""State, what was found, and the mend."""


def ray() -> Said:
    """Installed, and the cluster of RAY_ADDRESS answers."""
    if importlib.util.find_spec("ray") is None:
        return "missing", "not installed", "pip install 'ocvtp[pipeline]'"
    address = os.environ.get("RAY_ADDRESS", "auto")
    host, mark, port = address.rpartition(":")
    if not mark or "/" in host or not port.isdigit():
        if address in ("auto", "local"):
            detail = "a cluster started on this machine, else a private one" if address == "auto" else "a private one"
            return "ok", detail, ""
        return ("warning", f"RAY_ADDRESS is {address}, where a driver cannot connect",
                "drivers connect to HOST:6379 or auto; with `ray job submit` leave it to Ray")  # fmt: skip
    try:
        socket.create_connection((host.strip("[]"), int(port)), LIMIT).close()
    except OSError as error:
        mend = "start one (`ray start --head`), or mend RAY_ADDRESS"
        return "warning", f"no cluster answers at {address}: {error}", mend
    return "ok", f"a cluster answers at {address}; its nodes must share the store (OCVTP_STORE)", ""


def slurm() -> Said:
    """Installed, the controller answers, nodes are there, and whether there is accounting."""
    if importlib.util.find_spec("submitit") is None:
        return "missing", "submitit is not installed", "pip install 'ocvtp[pipeline]'"
    lacking = [name for name in ("sbatch", "squeue", "scancel") if not shutil.which(name)]
    if lacking:
        return "missing", f"no {', '.join(lacking)} in PATH", "run on a login node of a SLURM cluster"
    told = _said("sinfo", "--noheader", "--format=%R %D %t")
    if told is None:
        return ("warning", "the controller does not answer (sinfo)",
                "see `scontrol ping`; runs wait for it as long as `patience_minutes` of the profile says")  # fmt: skip
    up = sorted({partition for partition, ready in _partitions(told) if ready})
    if not up:
        return "warning", f"no node is up: {' '.join(told.split()) or 'no partition'}", "see `sinfo -R`"
    states = "states from squeue and sacct" if _said("sacct", "-n", "-X", "-S", "now-1minutes") is not None else (
        "no accounting: states from squeue alone")  # fmt: skip
    return "ok", f"nodes are up in {', '.join(up)}; {states}", ""


def _partitions(told: str) -> Iterator[tuple[str, bool]]:
    for line in told.splitlines():
        partition, _, state = line.split()
        yield (
            partition,
            state.strip("*~#!%$@^-") in ("idle", "mix", "mixed", "alloc", "allocated", "comp", "completing"),
        )


def _said(*command: str) -> str | None:
    """What a command prints; None if it fails, is not there or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return None if done.returncode else done.stdout
