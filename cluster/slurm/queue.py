"""What SLURM says of jobs: squeue and, where there is accounting, sacct, each once for all jobs of a run."""

from __future__ import annotations

import contextlib
import logging
import re
import signal
import subprocess
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from cluster.errors import CannotRun
from cluster.protocol import Cause

log = logging.getLogger(__name__)

LIMIT = 60.0  # seconds a command may take: an unreachable controller keeps it waiting
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
_USABLE = ("idle", "mix", "alloc", "comp")  # states of nodes, as sinfo abbreviates them
_REASON = re.compile(r"\b(?:QOS|Assoc)\w+")
_LATER = re.compile(r"Submit|MaxJobs|GrpJobs|MaxJobCount|temporarily unable|unable to contact", re.IGNORECASE)


class ControllerUnreachable(Exception):
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


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Within this, the Ctrl-C of a terminal spares commands, which it reaches too; the driver hears of it afterwards.

    An sbatch that it kills may have queued its jobs already, without having said under which id.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _run(command: Sequence[str]) -> str:
    try:
        with undisturbed():
            done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
    except FileNotFoundError as error:
        raise CannotRun(f"there is no {command[0]} on this machine: is it one of a SLURM cluster?") from error
    except subprocess.TimeoutExpired as error:
        raise ControllerUnreachable(f"{command[0]} did not answer within {LIMIT:.0f} s") from error
    if done.returncode:
        raise ControllerUnreachable(f"{command[0]}: {' '.join(done.stderr.split())[-300:]}")
    return done.stdout


def queue(*, name: str | None = None, user: str | None = None) -> list[Listed]:
    """Jobs in the queue, those that ended not long ago included.

    Raises:
        ControllerUnreachable: the controller does not answer.
    """
    # One line for each element of an array: ranges come with steps, and are cut short where they are long.
    command = ["squeue", "--noheader", "--array", "--states=all", "--format=%i|%j|%T|%N|%r"]
    command += [f"--name={name}"] if name else []
    command += [f"--user={user}"] if user else []
    found = []
    for line in _run(command).splitlines():
        identity, _, rest = line.partition("|")
        job, state, node, reason = rest.rsplit("|", 3)
        found.append(Listed(identity, job, State(state, node, reason)))
    return found


def accounted(ids: Collection[str]) -> dict[str, State]:
    """What the accounting says of jobs that the queue has forgotten.

    Raises:
        ControllerUnreachable: there is no accounting, or it does not answer.
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
            except ControllerUnreachable as error:
                log.warning("%s", error)


def settings() -> dict[str, str]:
    """`scontrol show config`.

    Raises:
        ControllerUnreachable: the controller does not answer.
    """
    pairs = (line.partition("=") for line in _run(["scontrol", "show", "config"]).splitlines() if "=" in line)
    return {key.strip(): value.strip() for key, _, value in pairs}


def idle_cpus(partition: str | None) -> int:
    """Cores without work now; 0 if SLURM does not say."""
    try:
        lines = _run(["sinfo", "--noheader", "--format=%C", *_of(partition)]).split()  # allocated/idle/other/total
        return sum(int(line.split("/")[1]) for line in lines)
    except (ControllerUnreachable, ValueError, IndexError):
        return 0


def largest_memory_gb(partition: str | None, *, gpus: bool = False) -> float | None:
    """Of a node, or of one with GPUs; None if SLURM does not say."""
    try:
        lines = _run(["sinfo", "--noheader", "--format=%m|%G", *_of(partition)]).splitlines()
    except (ControllerUnreachable, CannotRun):
        return None
    found = [line.strip().split("|", 1) for line in lines if "|" in line]
    numbers = [float(memory.rstrip("+")) for memory, gres in found if "gpu" in gres or not gpus]
    return max(numbers) / 1024 if numbers else None


def unusable_nodes(partition: str | None) -> list[str]:
    """Nodes that start no job now, however long it waits for those at work.

    Raises:
        ControllerUnreachable: the controller does not answer.
    """
    lines = _run(["sinfo", "--Node", "--noheader", "--format=%N|%t", *_of(partition)]).splitlines()
    nodes = (line.split("|") for line in lines)
    return sorted({name for name, state in nodes if state.endswith("*") or not state.startswith(_USABLE)})


def _of(partition: str | None) -> list[str]:
    return [f"--partition={partition}"] if partition else []


def takes_later(refusal: str) -> bool:
    """Whether what sbatch says is that it takes no more jobs now, not that it never takes such a one."""
    reason = _REASON.search(refusal)  # clearer than the text beside it, which is the same for all limits
    return bool(_LATER.search(reason[0] if reason else refusal))


def objection(arguments: Sequence[str]) -> str | None:
    """Why such a job can never run; None if it can."""
    command = ["sbatch", "--test-only", *arguments, "--wrap=true"]
    try:
        with undisturbed():
            done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotRun(f"sbatch does not answer: {error}") from error
    if done.returncode == 0 or takes_later(done.stderr):
        return None
    return " ".join(done.stderr.replace("sbatch: error:", " ").replace("allocation failure:", " ").split())
