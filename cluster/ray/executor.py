"""The Ray executor: each attempt is one task of a Ray cluster.

An attempt is a generator: what it yields (started, progress, ended) streams back to the driver, so there is no
actor, queue or file between them that could be lost or left over. Ray retries nothing, `run` does. All that
runs belongs to the driver's job: if the driver dies, Ray ends its workers, and they end theirs.
"""

import contextlib
import logging
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.errors import CannotRun
from cluster.host import GIB
from cluster.local.executor import remove_empty_logs
from cluster.protocol import Cause, Context, Event, Executor, Job
from cluster.ray.profile import PACKAGE, Node, RayProfile, connect, misfit
from cluster.ray.worker import code_path, remote_function
from cluster.task import Resources, Task, display

log = logging.getLogger(__name__)

WINDOW = 64  # tasks of one shape handed to Ray beyond two for each core: it need not know of all that wait
LOOK_PERIOD = 5.0  # seconds between two looks at the nodes while tasks wait
SLACK = 60.0  # seconds beyond its time limit after which a task is ended from here; its node does so before
CLOSE_LIMIT = 10.0
NODE_ID = "ray.io/node-id"  # label of every node
PREEMPTED = 3  # `NodeDeathInfo.AUTOSCALER_DRAIN_PREEMPTED` of Ray


@dataclass(eq=False)
class _Flight:
    """A job handed to Ray."""

    job: Job
    stream: Any  # ray.ObjectRefGenerator
    since: float
    node: str = ""  # where it started
    started: float = 0.0
    verdict: tuple[Cause, str] | None = None  # why we ended it


class RayExecutor(Executor):
    """Runs jobs as tasks of a Ray cluster."""

    def __init__(self, context: Context) -> None:
        super().__init__()
        self._context = context
        self._profile = RayProfile.load(context.config.profile)
        self._flights: dict[Any, _Flight] = {}  # by stream
        self._looked, self._unplaced_since = 0.0, 0.0
        # Both now: where nodes share a disk, Ray may remove its copy of them for a moment, to make it anew.
        self._working_folder, code = str(Path.cwd()), code_path()
        self._ray, self._owned, root = connect(context, self._profile)
        try:
            self._address = self._ray.get_runtime_context().gcs_address
            self._nodes = self._look()
            self._remote = self._ray.remote(remote_function())
            config = context.config
            passed_on = (f"{config.application.upper()}_", "PYTHONHASHSEED", *config.passed_on)
            environment = {name: value for name, value in os.environ.items() if name.startswith(passed_on)}
            environment |= self._profile.environment
            paths = [self._working_folder, *code]
            if root is not None:  # what does not lie in the working dir keeps its path
                within = ((path, os.path.relpath(path, root)) for path in paths)
                paths = [path if inside.startswith("..") else inside for path, inside in within]
            self._arguments = environment, paths, config.moved_by
            context.logs.mkdir(parents=True, exist_ok=True)
        except BaseException:
            self.close()
            raise

    def memory_limit_gb(self, asked: Resources) -> float | None:
        """Memory of the largest node that has the cores and GPUs."""
        return max((node["memory"] / GIB for node in self._profile.fitting(asked, self._nodes)), default=None)

    def check(self, tasks: Sequence[Task]) -> None:
        """Refuse tasks that fit no node, and a store that workers could not share."""
        config = self._context.config
        if store := PACKAGE.fullmatch(str(Path(self._working_folder, config.store))):
            raise CannotRun(
                f"the store would lie in {store['root']}, Ray's copy of the working dir, which is not kept: set "
                f"{config.moved_by} to a folder of the file system that all nodes share"
            )
        self._nodes = self._look()
        super().check(tasks)

    def _objection(self, asked: Resources) -> str | None:
        problem = misfit(asked, self._nodes, self._profile)
        return problem and f"{problem} (Ray cluster at {self._address})"

    def _advance(self, timeout: float) -> None:
        self._launch()
        self._collect(timeout)
        self._watch()

    def _cancel_running(self, ids: set[str]) -> None:
        for flight in self._flights.values():
            if flight.job.id in ids:
                self._end(flight, Cause.CANCELLED)

    def close(self) -> None:
        """End what is left, and let go of the cluster; one that was started here ends."""
        self._queues.clear()
        for flight in self._flights.values():
            self._end(flight, Cause.CANCELLED)
        deadline = time.monotonic() + CLOSE_LIMIT
        while self._flights and time.monotonic() < deadline:
            self._collect(0.25)
        self._flights.clear()
        if self._owned and self._ray.is_initialized():
            self._ray.shutdown()
        remove_empty_logs(self._context.logs)

    def _launch(self) -> None:
        window = WINDOW + 2 * int(sum(node.get("CPU", 0.0) for node in self._nodes))
        flying = Counter(flight.job.resources for flight in self._flights.values())
        for resources, queue in self._queues.items():
            for _ in range(min(len(queue), window - flying[resources])):
                self._hand_over(queue.popleft())

    def _hand_over(self, job: Job) -> None:
        asked, profile = job.resources, self._profile
        strategy: Any = profile.scheduling
        if job.avoid:  # on which it died, if there are others
            from ray.util.scheduling_strategies import NodeLabelSchedulingStrategy, NotIn

            strategy = NodeLabelSchedulingStrategy(hard={}, soft={NODE_ID: NotIn(*job.avoid)})
        stream = self._remote.options(
            num_cpus=asked.cpus,
            num_gpus=asked.gpus,
            memory=int(asked.memory_gb * GIB),
            resources=profile.resources or None,
            accelerator_type=profile.accelerator_type if asked.gpus else None,
            scheduling_strategy=strategy,
            max_retries=0,
            num_returns="streaming",
            name=display(job.name),
        ).remote(asdict(job), *self._arguments)
        self._flights[stream] = _Flight(job, stream, time.monotonic())

    def _collect(self, timeout: float) -> None:
        """Take the next news of every job that has some."""
        streams = list(self._flights)
        if not streams:
            time.sleep(min(timeout, 0.05))
            return
        ready, rest = self._ray.wait(streams, num_returns=1, timeout=timeout, fetch_local=False)
        if ready and rest:
            ready += self._ray.wait(rest, num_returns=len(rest), timeout=0, fetch_local=False)[0]
        for stream in ready:
            self._take(self._flights[stream])

    def _take(self, flight: _Flight) -> None:
        try:
            event: Event = self._ray.get(next(flight.stream))
        except StopIteration:
            cause, detail = flight.verdict or (Cause.LOST, "it ended and told no end")
        except self._ray.exceptions.RayError as error:
            cause, detail = flight.verdict or self._diagnose(flight, error)
        else:
            if event.kind == "started":
                flight.node, flight.started = event.node, time.monotonic()
            elif event.kind == "ended":
                del self._flights[flight.stream]
            self._events.append(event)
            return
        del self._flights[flight.stream]
        self._events.append(Event(flight.job.id, "ended", cause, detail, node=flight.node))

    def _diagnose(self, flight: _Flight, error: Exception) -> tuple[Cause, str]:
        """Why Ray ended a job, of which no word came."""
        errors, text = self._ray.exceptions, " ".join(str(error).split())[:300]
        if isinstance(error, errors.TaskCancelledError):
            return Cause.CANCELLED, "cancelled by somebody else"
        if isinstance(error, errors.OutOfMemoryError):
            return Cause.OOM, f"Ray killed it because its node ran out of memory: {text}"
        if isinstance(error, errors.NodeDiedError | errors.LocalRayletDiedError | errors.TaskUnschedulableError):
            return self._of_node(flight) or (Cause.NODE, text)
        if isinstance(error, errors.WorkerCrashedError):
            return self._of_node(flight) or (Cause.CRASHED, f"its Ray worker was killed or died: {text}")
        if isinstance(error, errors.RayTaskError | errors.RuntimeEnvSetupError):
            with contextlib.suppress(OSError), flight.job.log.open("a") as file:
                file.write(f"{error}\n")
            return Cause.EXCEPTION, str(error).strip().splitlines()[-1][:500]
        return Cause.LOST, f"{type(error).__name__}: {text}"

    def _of_node(self, flight: _Flight) -> tuple[Cause, str] | None:
        """What became of the node the job ran on; None if it is alive."""
        for node in self._ray.nodes():
            if node["NodeID"] == flight.node and not node["Alive"]:
                why = node.get("DeathReasonMessage") or "no reason given"
                cause = Cause.PREEMPTED if node.get("DeathReason") == PREEMPTED else Cause.NODE
                return cause, f"its node {node['NodeManagerHostname']} is gone: {why}"
        return None

    def _watch(self) -> None:
        """End what is far beyond its time, and what no node can run any more."""
        now = time.monotonic()
        if now - self._looked < LOOK_PERIOD:
            return
        self._looked = now
        waiting = []
        for flight in self._flights.values():
            limit = flight.job.resources.minutes
            if flight.started and now - flight.started > limit * 60 + SLACK:
                self._end(flight, Cause.TIMEOUT, f"took longer than {limit:g} minutes, and its node did not end it")
            elif not flight.started and now - flight.since > LOOK_PERIOD:
                waiting.append(flight)
        if waiting:
            self._nodes = self._look()
        problems = [(flight, misfit(flight.job.resources, self._nodes, self._profile)) for flight in waiting]
        stuck = [(flight, problem) for flight, problem in problems if problem]
        if not stuck:
            self._unplaced_since = 0.0
        elif not self._unplaced_since:
            self._unplaced_since = now
            log.warning("%d tasks wait for nodes that are gone: the first %s", len(stuck), stuck[0][1])
        elif now - self._unplaced_since > self._profile.patience_minutes * 60:
            for flight, problem in stuck:
                self._end(flight, Cause.NODE, f"no node came back for it: it {problem}")

    def _end(self, flight: _Flight, cause: Cause, detail: str = "") -> None:
        flight.verdict = flight.verdict or (cause, detail)
        self._ray.cancel(flight.stream, force=True)

    def _look(self) -> list[Node]:
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
