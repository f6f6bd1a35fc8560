"""The SLURM executor: each attempt is one job, in arrays of jobs that ask for the same. The only module that imports
submitit.

submitit writes and submits the scripts of the arrays. What each job is to do lies in one JSON file an array, and how it
goes is read from files that the jobs write themselves (`cluster.slurm.worker`) and from squeue, once for all jobs at a
time. So no pickle travels, and no job spends its time on submitit's. SLURM requeues nothing, `run` retries: a job that
is started again by SLURM would be the same attempt twice.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import sys
import time
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cluster import wire
from cluster.errors import NotAvailable
from cluster.local.process import Shape, worker_environment, worker_path
from cluster.protocol import Cause, Context, Event, Job
from cluster.slurm import queue as slurm_queue
from cluster.slurm import worker
from cluster.slurm.orphans import FOLDER, Ledger, job_name, reap
from cluster.slurm.profile import SlurmProfile
from cluster.slurm.queue import CAUSES, Away, State
from cluster.slurm.worker import events_file, write_array
from cluster.task import Resources, Task

log = logging.getLogger(__name__)

TICK = 0.25  # seconds between two looks at the files of attempts
VISIBLE_WITHIN = 10.0  # seconds a shared file system may take to show what an attempt wrote last
CLOSE_LIMIT = 20.0  # seconds that cancelled jobs have to leave the queue
_UNHEARD = re.compile(r"timed out|Zero Bytes", re.IGNORECASE)  # it may have queued them all the same
_HELD = re.compile(r"held|BadConstraints|PartitionDown|PartitionInactive", re.IGNORECASE)
_MEMORY = re.compile(rb"exceeded (job |step )?memory limit|oom[-_ ]kill", re.IGNORECASE)


_Kind = tuple[Resources, tuple[str, ...]]  # what jobs of one array share: what they ask for, and nodes they avoid


@dataclass(eq=False)
class _Flight:
    """A job in the hands of SLURM."""

    job: Job
    id: str
    log: Path  # of srun, and of the process before its attempt
    submitted: float
    lines: wire.Lines = field(default_factory=wire.Lines)
    read: int = 0  # bytes of its events
    gone: float | None = None  # when it was first seen to have ended, or not seen any more
    state: State | None = None
    node: str = ""
    verdict: Cause | None = None  # why we ended it


class SlurmExecutor:
    """Runs jobs on a SLURM cluster."""

    def __init__(self, context: Context) -> None:
        try:
            import submitit
        except ImportError as error:
            raise NotAvailable("submitit is not installed: pip install 'ocvtp[pipeline]'") from error
        self._submitit = submitit
        self._profile = SlurmProfile.load(context.config.profile)
        self._settings = slurm_queue.settings()
        self._folder = context.logs / FOLDER
        self._name = job_name(context.run_id)
        self._queues: dict[_Kind, deque[Job]] = {}
        self._flights: dict[str, _Flight] = {}  # by id of the SLURM job
        self._known: set[str] = set()  # ids of all jobs that SLURM has taken
        self._events: list[Event] = []
        self._looked, self._away_since = 0.0, None
        self._full_until, self._full_since, self._wave = 0.0, None, self._longest_array
        self._ledger = Ledger(self._folder)
        self._ledger.open()
        reap(self._ledger)
        self._told: set[str] = set()  # reasons to wait of which people know

    _away_since: float | None
    _full_since: float | None

    def memory_limit_gb(self, asked: Resources) -> float | None:
        """Memory of the largest node with GPUs or without, less what each job has beside its task."""
        largest = slurm_queue.largest_memory_gb(self._profile.partition, gpus=asked.gpus > 0)
        return None if largest is None else largest - self._profile.spare_memory_gb

    def check(self, tasks: Sequence[Task]) -> None:
        """Refuse tasks that SLURM says it can never run."""
        for asked in dict.fromkeys(task.resources for task in tasks):
            objection = slurm_queue.objection(self._profile.test_arguments(asked))
            if objection:
                name = next(task.name for task in tasks if task.resources == asked)
                raise NotAvailable(
                    f"task {name!r} asks for {asked.cpus} core(s), {asked.gpus} GPU(s), {asked.memory_gb:g} GB and "
                    f"{asked.minutes:g} minutes, and SLURM refuses that: {objection}. Ask for less, or choose another "
                    "partition in the profile"
                )

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue jobs."""
        for job in jobs:
            self._queues.setdefault((job.resources, job.avoid), deque()).append(job)
        self._launch()

    def poll(self, timeout: float) -> list[Event]:
        """News; waits for some at most `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while True:
            self._read()
            self._look()
            self._launch()
            now = time.monotonic()
            if self._events or now >= deadline:
                events, self._events = self._events, []
                return events
            time.sleep(min(TICK, deadline - now))

    def cancel(self, ids: Collection[str]) -> None:
        """Drop these from the queue here, and cancel those that SLURM has."""
        wanted = set(ids)
        for kind, queue in self._queues.items():
            dropped = [job for job in queue if job.id in wanted]
            self._queues[kind] = deque(job for job in queue if job.id not in wanted)
            self._events += [Event(job.id, "ended", Cause.CANCELLED) for job in dropped]
        flights = [flight for flight in self._flights.values() if flight.job.id in wanted]
        for flight in flights:
            flight.verdict = flight.verdict or Cause.CANCELLED
        slurm_queue.cancel(flight.id for flight in flights)
        self._looked = 0.0

    def close(self) -> None:
        """Cancel what is left, and wait until it is gone."""
        self._queues.clear()
        self.cancel([flight.job.id for flight in self._flights.values()])
        deadline = time.monotonic() + CLOSE_LIMIT
        while time.monotonic() < deadline and (left := self._left()):
            slurm_queue.cancel(left - self._known)  # such as sbatch queued without saying so
            self.poll(TICK)
        self._flights.clear()

    def _left(self) -> set[str]:
        """Jobs of this run in the queue, also such as have said their last word."""
        try:
            return {listed.id for listed in slurm_queue.queue(name=self._name) if listed.state.alive}
        except Away as error:
            log.warning("%s", error)
            return set()

    # Handing jobs to SLURM

    def _launch(self) -> None:
        for kind, queue in self._queues.items():
            while queue and time.monotonic() >= self._full_until:
                room = self._profile.max_jobs - len(self._flights)
                wave = [queue.popleft() for _ in range(min(len(queue), room, self._wave))]
                if not wave:
                    return
                if not self._hand_over(kind, wave):
                    queue.extendleft(reversed(wave))

    @property
    def _longest_array(self) -> int:
        return max(1, int(self._settings.get("MaxArraySize", "1001")))

    def _hand_over(self, kind: _Kind, jobs: Sequence[Job]) -> bool:
        """Submit an array; False if the queue takes no more just now. What it never takes has ended."""
        resources, profile = kind[0], self._elsewhere(*kind)
        executor = self._submitit.SlurmExecutor(folder=self._folder / "submitit")
        executor.update_parameters(**profile.parameters(resources), job_name=self._name, setup=self._setup(resources))
        executor.folder.mkdir(parents=True, exist_ok=True)
        executor.parameters["map_count"] = len(jobs)  # as submitit's own map_array has it
        array = write_array(self._folder, jobs, self._profile.signal_seconds)
        try:
            with slurm_queue.undisturbed():
                first = executor._submit_command(shlex.join([sys.executable, "-u", "-m", worker.__name__, str(array)]))
        except Exception as error:  # submitit has several for what sbatch says
            return self._refused(jobs, " ".join(str(error).split())[-500:])
        now = time.monotonic()
        self._full_since, self._wave = None, min(2 * self._wave, self._longest_array)
        for index, job in enumerate(jobs):
            one = self._submitit.SlurmJob(executor.folder, f"{first.job_id}_{index}", [0])
            self._flights[one.job_id] = _Flight(job, one.job_id, Path(one.paths.stderr), now)
            self._known.add(one.job_id)
            self._ledger.note(one.job_id, job.id, job.out)
        self._looked = now
        return True

    def _elsewhere(self, asked: Resources, avoid: Sequence[str]) -> SlurmProfile:
        """The profile, without nodes to avoid if another one that is up can run such jobs."""
        if not avoid:
            return self._profile
        without = [*([self._profile.exclude] if self._profile.exclude else []), *avoid]
        try:
            away = slurm_queue.unusable_nodes(self._profile.partition)
        except Away:
            return self._profile
        others = self._profile.model_copy(update={"exclude": ",".join([*without, *away])})
        if slurm_queue.objection(others.test_arguments(asked)):
            return self._profile
        return self._profile.model_copy(update={"exclude": ",".join(without)})

    def _refused(self, jobs: Sequence[Job], message: str) -> bool:
        """Later and fewer at once where a limit is reached, for as long as our own jobs hold it or patience lasts."""
        now = time.monotonic()
        self._full_since = None if self._flights else self._full_since or now
        patient = self._full_since is None or now - self._full_since < self._profile.patience_minutes * 60
        if patient and slurm_queue.takes_later(message):
            self._wave = max(1, len(jobs) // 2)
            self._full_until = now + max(self._profile.poll_seconds, 1.0)
            log.info("SLURM takes no more jobs just now: %s", message)
            return False
        cause = Cause.LOST if _UNHEARD.search(message) else Cause.EXCEPTION
        self._events += [Event(job.id, "ended", cause, f"SLURM does not take the job: {message}") for job in jobs]
        return True

    def _setup(self, resources: Resources) -> list[str]:
        """Lines of the job script: the code and the environment that a local worker would have."""
        environment = worker_environment(Shape(resources.cpus, ()))
        names = [name for name in environment if name.endswith("_NUM_THREADS")] + ["PYTHONHASHSEED", "PYTHONUNBUFFERED"]
        values = {name: environment[name] for name in names}
        values |= {"PYTHONPATH": os.pathsep.join(worker_path()), "SRUN_CPUS_PER_TASK": str(resources.cpus)}
        if not resources.gpus:
            values["CUDA_VISIBLE_DEVICES"] = ""
        return [*(f"export {name}={shlex.quote(value)}" for name, value in values.items()), *self._profile.setup]

    # Following what runs

    def _read(self) -> None:
        """What attempts say."""
        for flight in list(self._flights.values()):
            try:
                with events_file(self._folder, flight.job.id).open("rb") as file:
                    file.seek(flight.read)
                    data = file.read()
            except OSError:
                continue
            flight.read += len(data)
            for message in flight.lines.feed(data):
                event = wire.event_from_json(message["event"])
                if event.kind == "ended":
                    self._ended(flight, flight.verdict or event.cause or Cause.LOST, event.detail, event)
                    break
                flight.node = event.node or flight.node
                self._events.append(event)

    def _look(self) -> None:
        """What SLURM says."""
        now = time.monotonic()
        if not self._flights or now - self._looked < self._profile.poll_seconds:
            return
        self._looked = now
        try:
            states = {listed.id: listed.state for listed in slurm_queue.queue(name=self._name)}
            self._away_since = None
        except Away as error:
            self._wait_for_controller(now, str(error))
            return
        missing = [one for one in self._flights if one not in states]
        if missing and self._settings.get("AccountingStorageType", "").endswith("slurmdbd"):
            try:
                states |= slurm_queue.accounted(missing)
            except Away as error:
                log.info("%s", error)
        for flight in list(self._flights.values()):
            self._judge(flight, states.get(flight.id), now)

    def _wait_for_controller(self, now: float, message: str) -> None:
        if self._away_since is None:
            self._away_since = now
            log.warning("SLURM does not answer, jobs go on meanwhile: %s", message)
        elif now - self._away_since > self._profile.patience_minutes * 60:
            for flight in list(self._flights.values()):
                self._ended(flight, flight.verdict or Cause.LOST, f"SLURM has not answered for long: {message}")

    def _judge(self, flight: _Flight, state: State | None, now: float) -> None:
        """An end that the attempt itself has not spoken of, once its words have had time to become visible."""
        flight.state = state or flight.state
        flight.node = (state.node if state else "") or flight.node
        if state is not None and state.alive:
            flight.gone = None
            self._tell(flight, state)
            return
        if flight.gone is None:
            flight.gone = now
        if state is None:
            # Right after sbatch squeue may not list it yet, and one that ended may be forgotten at once.
            if now - max(flight.gone, flight.submitted) >= self._profile.lost_seconds or flight.verdict:
                last = f", last seen {flight.state.state}" if flight.state else ""
                self._ended(flight, flight.verdict or Cause.LOST, f"SLURM knows no job {flight.id} any more{last}")
        elif flight.verdict or state.state != "COMPLETED" or now - flight.gone >= VISIBLE_WITHIN:
            self._read()
            if flight.id in self._flights:
                cause = flight.verdict or self._cause(flight, state)
                where = f" on {state.node}" if state.node else ""
                self._ended(flight, cause, f"SLURM job {flight.id}{where} is {state.state}{_last_words(flight.log)}")

    def _tell(self, flight: _Flight, state: State) -> None:
        """Say once of each reason that jobs wait until a person does something."""
        if state.state == "PENDING" and _HELD.search(state.reason) and state.reason not in self._told:
            self._told.add(state.reason)
            log.warning("SLURM job %s waits and will not start by itself: %s (see `scontrol show job %s`)",
                        flight.id, state.reason, flight.id)  # fmt: skip

    def _cause(self, flight: _Flight, state: State) -> Cause:
        cause = CAUSES.get(state.state, Cause.LOST)
        if cause is Cause.CRASHED and _MEMORY.search(_tail(flight.log)):
            return Cause.OOM
        return cause

    def _ended(self, flight: _Flight, cause: Cause, detail: str, event: Event | None = None) -> None:
        del self._flights[flight.id]
        others = event.others if event else None
        self._events.append(Event(flight.job.id, "ended", cause, detail, others=others, node=flight.node))


def _tail(path: Path) -> bytes:
    try:
        return path.read_bytes()[-4000:]
    except OSError:
        return b""


def _last_words(path: Path) -> str:
    lines = [line for line in _tail(path).decode(errors="replace").splitlines() if line.strip()]
    own = [line for line in lines if not line.startswith("srun:")]  # says more than that it exited with 1
    return f": {json.dumps((own or lines)[-1][:200])}" if lines else ""
