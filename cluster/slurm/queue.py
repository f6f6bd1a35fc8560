"""What SLURM says of jobs: squeue and, where there is accounting, sacct, each once for all jobs of a run.

Functions raise `ControllerUnreachable` if the controller does not answer, unless they say otherwise.

Jobs that a driver left behind when it was killed are cancelled by the next run on the same store, and fenced. They are
named after their run. In its folder of logs a run says who drives it, again and again, and what its arrays of jobs are
to do. Whether a driver on another login node is dead, the time of its file tells.
"""

import contextlib
import getpass
import json
import logging
import re
import signal
import subprocess
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import CannotRun
from cluster.host import Process
from cluster.protocol import Cause
from cluster.store.layout import STATUS, appears
from cluster.store.lease import fence

log = logging.getLogger(__name__)

LIMIT = 60.0  # seconds a command may take: an unreachable controller keeps it waiting
AT_ONCE = 500  # ids in one command
ALIVE = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING",
         "STAGE_OUT", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD"}  # fmt: skip
CAUSES = {
    **dict.fromkeys(["PREEMPTED", "REVOKED"], Cause.PREEMPTED),
    "CANCELLED": Cause.PREEMPTED,  # not by us: an administrator, or a preemption that cancels
    **dict.fromkeys(["NODE_FAIL", "BOOT_FAIL", "LAUNCH_FAILED", "RECONFIG_FAIL"], Cause.NODE),
    **dict.fromkeys(["TIMEOUT", "DEADLINE"], Cause.TIMEOUT),
    "OUT_OF_MEMORY": Cause.OOM,
    "FAILED": Cause.CRASHED,
    "COMPLETED": Cause.LOST,
}
FOLDER = "slurm"  # in the folder of logs of a run
SILENCE = 300.0  # seconds without a sign of life of a driver on another host after which it counts as dead
LEAVE_LIMIT = 30.0  # seconds that cancelled jobs have to leave the queue
_NAME = re.compile(r".+-(?P<run>\d{8}-\d{6}-[0-9a-f]{8})")  # as the executor names the jobs of a run
_USABLE = ("idle", "mix", "alloc", "comp")  # states of nodes, as sinfo abbreviates them
_REASON = re.compile(r"\b(?:QOS|Assoc)\w+")
_LATER = re.compile(r"Submit|MaxJobs|GrpJobs|MaxJobCount|temporarily unable|unable to contact", re.IGNORECASE)


class ControllerUnreachable(CannotRun):
    """The controller does not answer."""

    def __init__(self, said: str) -> None:
        super().__init__(f"SLURM does not answer: {said}")


@dataclass(frozen=True)
class State:
    """Of a job: its state as SLURM names it, the node it is on, why it waits, and its name."""

    state: str
    node: str = ""
    reason: str = ""
    name: str = ""

    @property
    def alive(self) -> bool:
        """Whether it may still do something."""
        return self.state in ALIVE


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


def _finished(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    try:
        with undisturbed():
            return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
    except OSError as error:
        raise CannotRun(f"there is no {command[0]} on this machine: is it one of a SLURM cluster?") from error
    except subprocess.TimeoutExpired as error:
        raise ControllerUnreachable(f"{command[0]} took longer than {LIMIT:.0f} s") from error


def _run(command: Sequence[str]) -> str:
    done = _finished(command)
    if done.returncode:
        raise ControllerUnreachable(f"{command[0]}: {' '.join(done.stderr.split())[-300:]}")
    return done.stdout


def queue(**only: str) -> dict[str, State]:
    """Jobs in the queue by their ids, those that ended not long ago included; only those of a `name` or a `user`."""
    # One line for each element of an array: ranges come with steps, and are cut short where they are long.
    command = ["squeue", "--noheader", "--array", "--states=all", "--format=%i|%T|%N|%r|%j"]
    lines = _run([*command, *(f"--{key}={value}" for key, value in only.items())]).splitlines()
    return {identity: State(*rest) for identity, *rest in (line.split("|", 4) for line in lines)}


def alive(**only: str) -> dict[str, str]:
    """The names of jobs that may still do something, by their ids; only those of a `name` or a `user`."""
    return {one: state.name for one, state in queue(**only).items() if state.alive}


def accounted(ids: Collection[str]) -> dict[str, State]:
    """What the accounting says of jobs that the queue has forgotten."""
    command = ["sacct", "--allocations", "--noheader", "--parsable2", "--format=JobID,State,NodeList"]
    lines = (line.split("|") for line in _run([*command, f"--jobs={','.join(sorted(ids))}"]).splitlines())
    # CANCELLED by 0
    return {one: State(state.split()[0].rstrip("+"), node) for one, state, node in lines if one in ids}


def cancel(ids: Iterable[str]) -> None:
    """Cancel jobs at once. What cannot be cancelled now is noticed by who waits for its end.

    By itself scancel gives what runs half a minute (KillWait), in which a task could still publish.
    """
    wanted = sorted(ids)
    for start in range(0, len(wanted), AT_ONCE):
        for how in (["--state=PENDING"], ["--signal=KILL"], []):
            try:
                _run(["scancel", "--quiet", *how, *wanted[start : start + AT_ONCE]])
            except ControllerUnreachable as error:
                log.warning("%s", error)


def settings() -> dict[str, str]:
    """`scontrol show config`."""
    pairs = (line.partition("=") for line in _run(["scontrol", "show", "config"]).splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _nodes(partition: str | None, form: str, *how: str) -> list[list[str]]:
    """The fields that sinfo gives, line by line."""
    of = [f"--partition={partition}"] if partition else []
    return [line.split("|") for line in _run(["sinfo", "--noheader", f"--format={form}", *how, *of]).split()]


def idle_cpus(partition: str | None) -> int:
    """Cores without work now; 0 if SLURM does not say."""
    try:
        return sum(int(cpus.split("/")[1]) for (cpus,) in _nodes(partition, "%C"))  # allocated/idle/other/total
    except (CannotRun, ValueError, IndexError):
        return 0


def largest_memory_gb(partition: str | None, *, gpus: bool = False) -> float | None:
    """Of a node, or of one with GPUs; None if SLURM does not say."""
    with contextlib.suppress(CannotRun, ValueError):  # ValueError: there is none
        nodes = _nodes(partition, "%m|%G")
        return max(float(memory.rstrip("+")) for memory, gres in nodes if "gpu" in gres or not gpus) / 1024
    return None


def unusable_nodes(partition: str | None) -> list[str]:
    """Nodes that start no job now, however long it waits for those at work."""
    nodes = _nodes(partition, "%N|%t", "--Node")
    return sorted({name for name, state in nodes if state.endswith("*") or not state.startswith(_USABLE)})


def takes_later(refusal: str) -> bool:
    """Whether what sbatch says is that it takes no more jobs now, not that it never takes such a one."""
    reason = _REASON.search(refusal)  # clearer than the text beside it, which is the same for all limits
    return bool(_LATER.search(reason[0] if reason else refusal))


def objection(arguments: Sequence[str]) -> str | None:
    """Why such a job can never run; None if it can."""
    done = _finished(["sbatch", "--test-only", *arguments, "--wrap=true"])
    if done.returncode == 0 or takes_later(done.stderr):
        return None
    return " ".join(done.stderr.replace("sbatch: error:", " ").replace("allocation failure:", " ").split())


def reap(logs: Path, now: float) -> None:
    """Cancel jobs of runs with logs in this folder that are abandoned now, and fence their attempts."""
    user = getpass.getuser()
    jobs: dict[Path, set[str]] = {}
    for job, name in alive(user=user).items():
        if match := _NAME.fullmatch(name):
            jobs.setdefault(logs / match["run"], set()).add(job)
    dead = [run for run in jobs if abandoned(run, now)]
    orphans = {job for run in dead for job in jobs[run]}
    if not orphans:
        return
    log.warning("cancelling %d SLURM jobs that a killed driver left behind", len(orphans))
    cancel(orphans)
    if not appears(lambda: not orphans & alive(user=user).keys(), LEAVE_LIMIT):
        log.warning("some cancelled SLURM jobs have not left the queue; they can publish nothing")
    for array in (array for run in dead for array in (run / FOLDER).glob("*.array")):
        with contextlib.suppress(ValueError):  # its driver was killed while it wrote the file: nothing of it runs
            for pack in map(json.loads, array.read_text().splitlines()):
                for job in pack["jobs"]:
                    fence(Path(job["out"]), job["id"])


def abandoned(run: Path, now: float) -> bool:
    """Whether its driver is dead, by the file system's clock. Should it live, its jobs come again: nothing is lost."""
    try:
        alive = Process.from_json(json.loads((run / STATUS).read_bytes())["process"]).alive()
        silent = now - (run / STATUS).stat().st_mtime > SILENCE
    except (OSError, ValueError, KeyError, TypeError):
        return False  # nobody can say
    return alive is False or (alive is None and silent)
