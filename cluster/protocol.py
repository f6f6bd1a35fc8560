"""What an executor is: the one seam between `run`, which holds all policy, and the machines that do the work.

An executor starts attempts and says how they end. It never retries, never publishes, never decides: attempts
publish (`cluster.worker.attempt`), `run` decides (`cluster.driver.runner`). So executors are thin, and behave alike.
Jobs and events travel as JSON, one object a line.
"""

import json
import logging
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from cluster.errors import CannotRun
from cluster.task import Resources, Task

if TYPE_CHECKING:
    from cluster.config import ClusterConfig

log = logging.getLogger(__name__)


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
    BUSY = "busy"  # it never began: another run is at work on the result or has published it, or its turn did not come


@dataclass(frozen=True)
class Job:
    """One attempt of a task."""

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
    inputs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The job of which this is `asdict`, with or without a trip through JSON."""
        paths = {name: Path(data[name]) for name in ("out", "log")}
        names = {name: tuple(data[name]) for name in ("supersedes", "avoid")}
        return cls(**{**data, **paths, **names, "resources": Resources(**data["resources"])})


@dataclass(frozen=True)
class Event:
    """News of one job."""

    job: str  # "": of "ready"
    kind: Literal["ready", "started", "progress", "ended"]  # ready: a worker process is up; only its owner hears of it
    cause: Cause | None = None  # of "ended"
    detail: str = ""  # one line for people
    done: float = 0.0  # of "progress"
    total: float = 0.0
    note: str = ""
    node: str = ""  # of "started" and "ended": where it runs, as far as the executor knows and has several
    seconds: float | None = None  # of "ended": how long it ran, as far as the executor knows

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The event of which this is `asdict`."""
        return cls(**{**data, "cause": Cause(data["cause"]) if data["cause"] else None})


def encode(message: Job | Event) -> bytes:
    """One line of JSON."""
    return json.dumps(asdict(message), separators=(",", ":"), default=str).encode() + b"\n"


class EventStream:
    """Cuts a stream of bytes into events. A damaged line is skipped, with a warning: it must not end a run."""

    rest = b""

    def feed(self, data: bytes) -> Iterator[Event]:
        """The events that `data` completes."""
        *lines, self.rest = (self.rest + data).split(b"\n")
        for line in lines:
            try:
                event = Event.from_json(json.loads(line))
            except (ValueError, TypeError, KeyError) as error:
                log.warning("skipped a damaged line, %r: %r", line[:200], error)
            else:
                yield event


@dataclass(frozen=True)
class Context:
    """What an executor is made with."""

    run_id: str
    logs: Path  # folder of this run's logs
    config: "ClusterConfig"


class Executor(ABC):
    """Runs attempts somewhere. Here is what all executors do alike: refuse, queue, collect news, cancel what waits."""

    def __init__(self) -> None:
        self._queues: dict[Any, deque[Job]] = {}  # by what jobs ask for
        self._events: list[Event] = []

    def check(self, tasks: Sequence[Task]) -> None:
        """Refuse tasks that could never run here, before anything starts: `CannotRun` says what there is instead."""
        for asked, name in {task.resources: task.name for task in reversed(tasks)}.items():
            if objection := self._objection(asked):
                raise CannotRun(f"task {name!r} {objection}")

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue jobs; returns at once. They start with the next `poll`."""
        for job in jobs:
            self._queues.setdefault(self._shape(job), deque()).append(job)

    def poll(self, timeout: float) -> list[Event]:
        """News since the last call; waits for some at most `timeout` seconds.

        Every submitted job gets exactly one "ended" event, whatever happens to it, and no later event. When
        it comes, no process of that attempt is alive, or `Job.supersedes` must fence it.
        """
        deadline = time.monotonic() + timeout
        while True:
            self._advance(0.0 if self._events else max(deadline - time.monotonic(), 0.0))
            if self._events or time.monotonic() >= deadline:
                events, self._events = self._events, []
                return events

    def cancel(self, ids: Collection[str]) -> None:
        """Stop these jobs, queued or running; their "ended" events come with the next polls."""
        wanted = set(ids)
        for shape, queue in self._queues.items():
            self._events += [Event(job.id, "ended", Cause.CANCELLED) for job in queue if job.id in wanted]
            self._queues[shape] = deque(job for job in queue if job.id not in wanted)
        self._cancel_running(wanted)

    def _shape(self, job: Job) -> Any:
        """Jobs of one shape can take each other's place."""
        return job.resources

    @abstractmethod
    def close(self) -> None:
        """Stop everything that is left and let go of all machines; no process stays behind."""

    @abstractmethod
    def memory_limit_gb(self, asked: Resources) -> float | None:
        """The most memory that an attempt with these cores and GPUs can be given; None if unknown."""

    @abstractmethod
    def _objection(self, asked: Resources) -> str | None:
        """Why no such task could ever run here: "asks for ...", and what there is. None if one could."""

    @abstractmethod
    def _advance(self, timeout: float) -> None:
        """Start what can start, and append what has happened to `_events`; may wait, at most `timeout` seconds."""

    @abstractmethod
    def _cancel_running(self, ids: set[str]) -> None:
        """Stop those of these jobs that have left the queue."""
