"""The SLURM executor: attempts run in arrays of SLURM jobs. The only module that imports submitit.

Jobs of an array ask for the same; each makes one attempt, or several short ones one after another (`tasks_per_job` of
the profile). submitit writes and submits arrays; what each job is to do lies in one file an array, and how it goes is
read from files that the jobs write (`cluster.slurm.worker`) and from squeue, once for all jobs at a time. SLURM
requeues nothing, `run` retries: a job that is started again by SLURM would be the same attempt twice.
"""

import json
import logging
import math
import os
import re
import shlex
import statistics
import time
from collections import defaultdict, deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import submitit

from cluster.local.executor import remove_empty_logs
from cluster.local.process import worker_path
from cluster.protocol import Cause, Context, Event, EventStream, Executor, Job
from cluster.slurm import queue as slurm_queue
from cluster.slurm.profile import SlurmProfile
from cluster.slurm.queue import CAUSES, FOLDER, ControllerUnreachable, State
from cluster.slurm.worker import events_file, run_jobs, write_array
from cluster.task import Resources

log = logging.getLogger(__name__)

TICK = 0.25  # seconds between two looks at the files of attempts
VISIBLE_WITHIN = 10.0  # seconds a shared file system may take to show what an attempt wrote last
CLOSE_LIMIT = 20.0  # seconds that cancelled jobs have to leave the queue
# With `tasks_per_job: auto`, of tasks with the same call and resources:
FEW = 4  # so many need no packing
SAMPLE = 2  # attempts that go first, each in a job of its own, to be measured
SAMPLE_LIMIT = 20.0  # seconds that the others wait for that: longer tasks need no packing
SHORTEST, LONGEST = 1.0, 10.0  # seconds of work to give to a job
ALLOWANCE = 60.0  # seconds that the tasks of a pack may take in all, before the last one begins
_UNHEARD = re.compile(r"timed out|Zero Bytes", re.IGNORECASE)  # it may have queued them all the same
_HELD = re.compile(r"held|BadConstraints|PartitionDown|PartitionInactive", re.IGNORECASE)
_MEMORY = re.compile(r"exceeded (job |step )?memory limit|oom[-_ ]kill", re.IGNORECASE)

_Shape = tuple[Resources, tuple[str, ...], str]  # what jobs of one array share: resources, nodes they avoid, call


@dataclass(eq=False)
class _SlurmJob:
    """A job in the hands of SLURM."""

    id: str
    attempts: dict[str, Job]  # those that have not ended, in order, by their ids
    shape: _Shape
    events: Path
    log: Path  # of srun, and of the process that starts the attempts
    stream: EventStream = field(default_factory=EventStream)
    read: int = 0  # bytes of its events
    gone: float | None = None  # when it was first seen to have ended, or not seen any more
    last: str = ""  # state, for messages
    node: str = ""
    cancelled: set[str] = field(default_factory=set)  # attempts that we cancelled


class SlurmExecutor(Executor):
    """Runs jobs on a SLURM cluster."""

    def __init__(self, context: Context) -> None:
        super().__init__()
        self._profile = SlurmProfile.load(context.config.profile)
        self._logs, self._folder = context.logs, context.logs / FOLDER
        self._name = f"{context.config.application}-{context.run_id}"
        self._jobs: dict[str, _SlurmJob] = {}  # by id
        self._looked, self._full_until = 0.0, 0.0
        self._unreachable_since: float | None = None
        self._full_since: float | None = None
        self._seconds: dict[_Shape, deque[float]] = defaultdict(lambda: deque(maxlen=100))  # that attempts took
        self._sampled: dict[_Shape, float] = {}  # when the sample was submitted
        self._single: set[_Shape] = set()  # SLURM refuses packs of those
        self._reasons: set[str] = set()  # to wait, of which people know
        settings = slurm_queue.settings()
        self._accounting = settings.get("AccountingStorageType", "").endswith("slurmdbd")
        self._wave = self._longest_array = max(1, int(settings.get("MaxArraySize", "1001")))
        self._folder.mkdir(parents=True, exist_ok=True)
        slurm_queue.reap(self._logs.parent, self._folder.stat().st_mtime)

    def memory_limit_gb(self, asked: Resources) -> float | None:
        """Memory of the largest node with GPUs or without, less what each job has beside its task."""
        largest = slurm_queue.largest_memory_gb(self._profile.partition, gpus=asked.gpus > 0)
        return None if largest is None else largest - self._profile.spare_memory_gb

    def _objection(self, asked: Resources) -> str | None:
        said = slurm_queue.objection(self._profile.test_arguments(asked))
        return said and (
            f"asks for {asked.cpus} core(s), {asked.gpus} GPU(s), {asked.memory_gb:g} GB and {asked.minutes:g} "
            f"minutes, and SLURM refuses that: {said}. Ask for less, or choose another partition in the profile"
        )

    def close(self) -> None:
        """Cancel what is left, and wait until it is gone."""
        self._queues.clear()
        self.cancel([attempt for job in self._jobs.values() for attempt in job.attempts])
        deadline = time.monotonic() + CLOSE_LIMIT
        try:  # also such jobs as have told the end of all their attempts, or that sbatch queued without saying so
            while (left := slurm_queue.alive(name=self._name)) and time.monotonic() < deadline:
                slurm_queue.cancel(left)
                self.poll(1.0)
        except ControllerUnreachable as error:
            log.warning("%s", error)
        self._jobs.clear()
        remove_empty_logs(self._logs)

    def _shape(self, job: Job) -> _Shape:
        return job.resources, job.avoid, job.call

    def _advance(self, timeout: float) -> None:
        self._read()
        self._look()
        self._launch()
        if not self._events:
            time.sleep(min(TICK, timeout))

    def _cancel_running(self, ids: set[str]) -> None:
        jobs = [job for job in self._jobs.values() if ids & job.attempts.keys()]
        for job in jobs:
            job.cancelled |= ids & job.attempts.keys()
        slurm_queue.cancel(job.id for job in jobs)
        self._looked = 0.0

    def _launch(self) -> None:
        for shape, queue in self._queues.items():
            while queue and time.monotonic() >= self._full_until:
                packs = self._next_packs(shape, queue)
                if not packs:
                    break
                if not self._hand_over(shape, packs):
                    queue.extendleft(job for pack in reversed(packs) for job in reversed(pack))

    def _next_packs(self, shape: _Shape, queue: deque[Job]) -> list[list[Job]]:
        """The attempts of each job of the next array, taken off the queue; none if they have to wait."""
        room = min(self._profile.max_jobs - len(self._jobs), self._wave)
        size = self._pack_size(shape, len(queue)) if room > 0 else 1
        if size == 0:
            now, size = time.monotonic(), 1
            if shape not in self._sampled:
                self._sampled[shape], room = now, min(room, SAMPLE)
            elif now - self._sampled[shape] < SAMPLE_LIMIT:
                return []
        count = min(room, math.ceil(len(queue) / size))
        return [[queue.popleft() for _ in range(min(size, len(queue)))] for _ in range(count)]

    def _pack_size(self, shape: _Shape, waiting: int) -> int:
        """How many attempts one job makes, one after another; 0 if that is to be measured first."""
        asked, avoid, _ = shape
        if avoid or shape in self._single:
            return 1
        if self._profile.tasks_per_job != "auto":
            return int(self._profile.tasks_per_job)
        measured = self._seconds[shape]
        if not measured:
            return 1 if waiting <= FEW else 0
        seconds = max(statistics.median(measured), 1e-3)
        idle = slurm_queue.idle_cpus(self._profile.partition) // asked.cpus
        even = math.ceil(waiting / max(1, min(idle, self._profile.array_parallelism)))
        return max(1, min(max(even, int(SHORTEST / seconds)), int(LONGEST / seconds)))

    def _hand_over(self, shape: _Shape, packs: Sequence[Sequence[Job]]) -> bool:
        """Submit an array; False if the queue takes no more just now. What it never takes has ended."""
        asked, avoid, _ = shape
        allowance = (max(map(len, packs)) - 1) * asked.minutes * 60
        if self._profile.tasks_per_job == "auto":
            allowance = min(allowance, ALLOWANCE)
        profile = self._elsewhere(asked, avoid) if avoid else self._profile
        parameters = profile.parameters(replace(asked, minutes=asked.minutes + allowance / 60))
        executor = submitit.SlurmExecutor(folder=self._folder / "submitit")
        # The job script says where our code is, and what srun does not take from sbatch.
        values = {"PYTHONPATH": os.pathsep.join(worker_path()), "SRUN_CPUS_PER_TASK": str(asked.cpus)}
        setup = [f"export {name}={shlex.quote(value)}" for name, value in values.items()]
        executor.update_parameters(**parameters, job_name=self._name, setup=setup + self._profile.setup)
        array = str(write_array(self._folder, packs, self._profile.signal_seconds, allowance))
        try:
            with slurm_queue.undisturbed():
                handles = executor.map_array(run_jobs, [array] * len(packs), range(len(packs)))
        except Exception as error:  # submitit has several for what sbatch says
            return self._refused(shape, packs, " ".join(str(error).split())[-500:])
        self._looked = time.monotonic()
        self._full_since, self._wave = None, min(2 * self._wave, self._longest_array)
        for handle, pack in zip(handles, packs, strict=True):
            attempts, events = {job.id: job for job in pack}, events_file(self._folder, pack)
            own_log = Path(handle.paths.stderr)
            self._jobs[handle.job_id] = _SlurmJob(handle.job_id, attempts, shape, events, own_log)
        return True

    def _elsewhere(self, asked: Resources, avoid: Sequence[str]) -> SlurmProfile:
        """The profile, without nodes to avoid if another one that is up can run such jobs."""
        profile, without = self._profile, [*avoid, *filter(None, [self._profile.exclude])]
        with suppress(ControllerUnreachable):
            down = slurm_queue.unusable_nodes(profile.partition)
            others = profile.model_copy(update={"exclude": ",".join([*without, *down])})
            if not slurm_queue.objection(others.test_arguments(asked)):
                return profile.model_copy(update={"exclude": ",".join(without)})
        return profile

    def _refused(self, shape: _Shape, packs: Sequence[Sequence[Job]], message: str) -> bool:
        """Later and fewer at once where a limit is reached, for as long as our own jobs hold it or patience lasts."""
        now = time.monotonic()
        self._full_since = None if self._jobs else self._full_since or now
        patient = self._full_since is None or now - self._full_since < self._profile.patience_minutes * 60
        if patient and slurm_queue.takes_later(message):
            self._wave = max(1, len(packs) // 2)
            self._full_until = now + max(self._profile.poll_seconds, 1.0)
            log.info("SLURM takes no more jobs just now: %s", message)
            return False
        cause = Cause.LOST if _UNHEARD.search(message) else Cause.EXCEPTION
        if max(map(len, packs)) > 1 and cause is Cause.EXCEPTION:
            log.warning("SLURM takes no jobs of several tasks, so each gets its own: %s", message)
            self._single.add(shape)
            return False
        detail = f"SLURM does not take the job: {message}"
        self._events += [Event(job.id, "ended", cause, detail) for pack in packs for job in pack]
        return True

    def _read(self) -> None:
        """What the jobs tell of their attempts."""
        for job in list(self._jobs.values()):
            data = b""
            with suppress(OSError), job.events.open("rb") as file:
                file.seek(job.read)
                data = file.read()
            job.read += len(data)
            for event in job.stream.feed(data):
                if event.job in job.attempts:
                    job.node = event.node or job.node
                    if event.kind == "ended":
                        self._end(job, event)
                    else:
                        self._events.append(event)

    def _look(self) -> None:
        """What SLURM tells of the jobs."""
        now = time.monotonic()
        if now - self._looked < self._profile.poll_seconds:
            return
        self._looked = now
        if not self._jobs:
            return
        try:
            states = slurm_queue.queue(name=self._name)
            self._unreachable_since = None
        except ControllerUnreachable as error:
            self._unreachable_since = self._unreachable_since or now
            if now == self._unreachable_since:
                log.warning("%s; jobs go on meanwhile", error)
            elif now - self._unreachable_since > self._profile.patience_minutes * 60:
                for job in list(self._jobs.values()):
                    self._end_all(job, Cause.LOST, f"for {self._profile.patience_minutes:g} minutes, {error}")
            return
        missing = [one for one in self._jobs if one not in states]
        if missing and self._accounting:
            with suppress(ControllerUnreachable):  # asked again with the next look
                states |= slurm_queue.accounted(missing)
        for job in list(self._jobs.values()):
            if job.id in self._jobs:  # judging another one may have read the end of this one
                self._judge(job, states.get(job.id), now)

    def _judge(self, job: _SlurmJob, state: State | None, now: float) -> None:
        """End the attempts of a job that is over, once what it told last has had time to become visible."""
        if state is None:
            # Right after sbatch squeue may not list it yet, and one that ended may be forgotten at once.
            job.gone = job.gone or now
            if now - job.gone >= self._profile.lost_seconds or job.cancelled:
                self._end_all(job, Cause.LOST, f"SLURM knows no job {job.id} any more{job.last}")
            return
        job.last, job.node = f", last seen {state.state}", state.node or job.node
        if state.alive:
            job.gone = None
            # Once of each reason that jobs wait until a person does something.
            if state.state == "PENDING" and _HELD.search(state.reason) and state.reason not in self._reasons:
                self._reasons.add(state.reason)
                log.warning("SLURM job %s waits and will not start by itself: %s (see `scontrol show job %s`)",
                            job.id, state.reason, job.id)  # fmt: skip
            return
        job.gone = job.gone or now
        if job.cancelled or state.state != "COMPLETED" or now - job.gone >= VISIBLE_WITHIN:
            self._read()
            said = ""
            with suppress(OSError):
                said = job.log.read_bytes()[-4000:].decode(errors="replace")
            cause = CAUSES.get(state.state, Cause.LOST)
            if cause is Cause.CRASHED and _MEMORY.search(said):
                cause = Cause.OOM
            lines = [line for line in said.splitlines() if line.strip()]
            own = [line for line in lines if not line.startswith("srun:")]  # says more than that it exited with 1
            last = f": {json.dumps((own or lines)[-1][:200])}" if lines else ""
            self._end_all(job, cause, f"SLURM job {job.id} on {state.node or 'no node'} is {state.state}{last}")

    def _end_all(self, job: _SlurmJob, cause: Cause, detail: str) -> None:
        """A job is over: so is the attempt it was at. The others had not begun, and are free to start elsewhere."""
        for attempt in list(job.attempts):
            self._end(job, Event(attempt, "ended", cause, detail))
            cause = Cause.BUSY

    def _end(self, job: _SlurmJob, event: Event) -> None:
        del job.attempts[event.job]
        if event.cause is Cause.DONE and event.seconds is not None:
            self._seconds[job.shape].append(event.seconds)
        cause = Cause.CANCELLED if event.job in job.cancelled else event.cause
        self._events.append(replace(event, cause=cause, node=job.node))
        if not job.attempts:
            del self._jobs[job.id]
