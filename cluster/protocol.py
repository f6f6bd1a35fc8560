"""What an executor is: the one seam between `run`, which holds all policy, and the machines that do the work.

An executor starts attempts and says how they end. It never retries, never publishes, never decides: attempts
publish (`cluster.worker.attempt`), `run` decides (`cluster.driver.retry`). So executors are thin, and behave alike.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from cluster.errors import NotAvailable
from cluster.task import Resources, Task

if TYPE_CHECKING:
    from cluster.config import ClusterConfig

# module:class of every executor; imported when asked for, so that its packages are not needed before.
EXECUTORS: dict[str, str] = {
    "local": "cluster.local.executor:LocalExecutor",
    "ray": "cluster.ray.executor:RayExecutor",
    "slurm": "cluster.slurm.executor:SlurmExecutor",
}


class Cause(StrEnum):
    """How an attempt ended."""

    DONE = "done"
    EXCEPTION = "exception"  # the call raised, or its input is bad: again would end the same
    CRASHED = "crashed"  # the worker process died
    OOM = "oom"  # the worker outgrew its memory
    TIMEOUT = "timeout"
    LOST = "lost"  # it vanished without a trace, or lost its lease
    NODE = "node"  # its machine died, or the store cannot be reached from it
    PREEMPTED = "preempted"
    CANCELLED = "cancelled"  # by us
    BUSY = "busy"  # it never began: another run is at work on the same result, or has published it


@dataclass(frozen=True)
class Job:
    """One attempt of a task, as JSON-able as it must be to reach another machine."""

    id: str  # also names the attempt's temporary folder
    name: str
    number: int  # of the attempt, from 1
    call: str
    spec: dict[str, Any]
    out: Path
    key: str
    kind: str
    code: str
    resources: Resources
    log: Path
    lease: float
    supersedes: tuple[str, ...] = ()  # attempts to fence even if they seem alive
    avoid: tuple[str, ...] = ()  # nodes on which earlier attempts died, as `Event.node` has them: elsewhere if possible

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads."""
        return asdict(self) | {"out": str(self.out), "log": str(self.log)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Job:
        """The job that `to_json` wrote."""
        return cls(
            **{
                **data,
                "out": Path(data["out"]),
                "log": Path(data["log"]),
                "resources": Resources(**data["resources"]),
                "supersedes": tuple(data["supersedes"]),
                "avoid": tuple(data["avoid"]),
            }
        )


@dataclass(frozen=True)
class Event:
    """News of one job."""

    job: str
    kind: Literal["started", "progress", "ended"]
    cause: Cause | None = None  # of "ended"
    detail: str = ""  # one line for people
    done: float = 0.0  # of "progress"
    total: float = 0.0
    note: str = ""
    # Of "ended" as busy: attempt -> (beat, patience) of those at work.
    others: Mapping[str, tuple[int, float]] | None = None
    node: str = ""  # of "started" and "ended": where it runs, as far as the executor knows and has several


class Executor(Protocol):
    """Runs attempts somewhere."""

    def memory_limit_gb(self, asked: Resources) -> float | None:
        """The most memory that an attempt with these cores and GPUs can be given; None if unknown."""

    def check(self, tasks: Sequence[Task]) -> None:
        """Refuse, before anything starts, tasks that could never run here.

        Raises:
            NotAvailable: naming the task, what it asks for and what there is.
        """

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue jobs, all at once where that is cheaper; returns at once."""

    def poll(self, timeout: float) -> list[Event]:
        """News since the last call; waits for some at most `timeout` seconds.

        Every submitted job gets exactly one "ended" event, whatever happens to it, and no later event. When
        it comes, no process of that attempt is alive, or `Job.supersedes` must fence it.
        """

    def cancel(self, ids: Collection[str]) -> None:
        """Stop these jobs, queued or running; their "ended" events come with the next polls."""

    def close(self) -> None:
        """Stop everything that is left and let go of all machines; no process stays behind."""


@dataclass(frozen=True)
class Context:
    """What an executor is made with."""

    run_id: str
    logs: Path  # folder of this run's logs
    config: ClusterConfig


def executor_names() -> list[str]:
    """Executors of this version."""
    return sorted(EXECUTORS)


def check_executor(name: str) -> None:
    """Raise `NotAvailable` unless there is an executor of that name."""
    if name not in EXECUTORS:
        raise NotAvailable(f"there is no executor {name!r}: this version has {', '.join(executor_names())}")


def make_executor(name: str, context: Context) -> Executor:
    """The executor of that name.

    Raises:
        NotAvailable: there is no such executor, or this machine lacks what it needs.
    """
    check_executor(name)
    module, _, attribute = EXECUTORS[name].partition(":")
    factory: Callable[[Context], Executor] = getattr(importlib.import_module(module), attribute)
    return factory(context)
