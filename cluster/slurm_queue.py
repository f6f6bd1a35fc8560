"""What SLURM says of jobs: squeue and, where there is accounting, sacct, each once for all jobs of a run."""

from __future__ import annotations

import logging
import re
import subprocess
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from cluster.errors import NotAvailable
from cluster.protocol import Cause

log = logging.getLogger(__name__)

LIMIT = 60.0  # seconds a command may take: a controller that is away keeps it waiting
AT_ONCE = 500  # ids in one command
ALIVE = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING",
         "STAGE_OUT", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD"}  # fmt: skip
CAUSES = {
    "PREEMPTED": Cause.PREEMPTED,
    "REVOKED": Cause.PREEMPTED,
    "CANCELLED": Cause.PREEMPTED,  # not by us: an administrator, or a preemption that cancels
    "NODE_FAIL": Cause.NODE,
    "BOOT_FAIL": Cause.NODE,
    "LAUNCH_FAILED": Cause.NODE,
    "RECONFIG_FAIL": Cause.NODE,
    "TIMEOUT": Cause.TIMEOUT,
    "DEADLINE": Cause.TIMEOUT,
    "OUT_OF_MEMORY": Cause.OOM,
    "FAILED": Cause.CRASHED,
    "COMPLETED": Cause.LOST,
}
_ELEMENTS = re.compile(r"(?P<job>\d+)_\[(?P<ranges>[^\]%]*)")


class Away(Exception):
    """The controller does not answer."""


@dataclass(frozen=True)
class State:
    """Of a job: its state as SLURM names it, the node it is on, and why it waits."""

    state: str
    node: str = ""
    reason: str = ""

    @property
    def alive(self) -> bool:
        """Whether it may still do something."""
        return self.state in ALIVE


@dataclass(frozen=True)
class Listed:
    """A job in the queue, with its name."""

    id: str
    name: str
    state: State


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
    except FileNotFoundError as error:
        raise NotAvailable(f"there is no {command[0]} on this machine: is it one of a SLURM cluster?") from error
    except subprocess.TimeoutExpired as error:
        raise Away(f"{command[0]} did not answer within {LIMIT:.0f} s") from error
    if done.returncode:
        raise Away(f"{command[0]}: {' '.join(done.stderr.split())[-300:]}")
    return done.stdout


def expanded(identity: str) -> list[str]:
    """`7_[1-3,5%2]` as its elements; any other id as it is."""
    match = _ELEMENTS.match(identity)
    if match is None:
        return [identity]
    found = []
    for part in match["ranges"].split(","):
        first, _, last = part.partition("-")
        found += [f"{match['job']}_{number}" for number in range(int(first), int(last or first) + 1)]
    return found


def queue(*, name: str | None = None, user: str | None = None) -> list[Listed]:
    """Jobs in the queue, those that ended not long ago included.

    Raises:
        Away: the controller does not answer.
    """
    command = ["squeue", "--noheader", "--states=all", "--format=%i|%j|%T|%N|%r"]
    command += [f"--name={name}"] if name else []
    command += [f"--user={user}"] if user else []
    found = []
    for line in _run(command).splitlines():
        identity, _, rest = line.partition("|")
        job, state, node, reason = rest.rsplit("|", 3)
        found += [Listed(one, job, State(state, node, reason)) for one in expanded(identity)]
    return found


def accounted(ids: Collection[str]) -> dict[str, State]:
    """What the accounting says of jobs that the queue has forgotten.

    Raises:
        Away: there is no accounting, or it does not answer.
    """
    command = ["sacct", "--allocations", "--noheader", "--parsable2", "--format=JobID,State,NodeList",
               f"--jobs={','.join(sorted(ids))}"]  # fmt: skip
    found = {}
    for line in _run(command).splitlines():
        identity, state, node = line.split("|")
        if identity in ids:
            found[identity] = State(state.split()[0].rstrip("+"), node)  # CANCELLED by 0
    return found


def cancel(ids: Iterable[str]) -> None:
    """Cancel jobs at once. What cannot be cancelled now is noticed by who waits for its end.

    By itself scancel gives what runs half a minute (KillWait), in which a task could still publish.
    """
    wanted = sorted(ids)
    for start in range(0, len(wanted), AT_ONCE):
        some = wanted[start : start + AT_ONCE]
        for how in (["--state=PENDING"], ["--signal=KILL"], []):
            try:
                _run(["scancel", "--quiet", *how, *some])
            except Away as error:
                log.warning("%s", error)


def settings() -> dict[str, str]:
    """`scontrol show config`.

    Raises:
        NotAvailable: the controller does not answer.
    """
    try:
        lines = _run(["scontrol", "show", "config"]).splitlines()
    except Away as error:
        raise NotAvailable(f"SLURM does not answer: {error}") from error
    pairs = (line.partition("=") for line in lines if "=" in line)
    return {key.strip(): value.strip() for key, _, value in pairs}


def largest_memory_gb(partition: str | None) -> float | None:
    """Of a node; None if SLURM does not say."""
    try:
        lines = _run(["sinfo", "--noheader", "--format=%m", *([f"--partition={partition}"] if partition else [])])
    except (Away, NotAvailable):
        return None
    numbers = [float(line.strip().rstrip("+")) for line in lines.split()]
    return max(numbers) / 1024 if numbers else None


def objection(arguments: Sequence[str]) -> str | None:
    """Why such a job can never run; None if it can."""
    command = ["sbatch", "--test-only", *arguments, "--wrap=true"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotAvailable(f"sbatch does not answer: {error}") from error
    if done.returncode == 0:
        return None
    return " ".join(done.stderr.replace("sbatch: error:", " ").replace("allocation failure:", " ").split())
