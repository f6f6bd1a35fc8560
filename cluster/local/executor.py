"""The local executor: persistent worker processes on this machine, each core, GPU and byte given out once."""

from __future__ import annotations

import logging
import selectors
import signal
import time
from collections import Counter, deque
from collections.abc import Collection, Sequence

from cluster import wire
from cluster.errors import NotAvailable
from cluster.host.machine import Machine, group_members, memory_of, oom_kills
from cluster.host.process import LINUX
from cluster.local.process import Shape, WorkerProcess
from cluster.protocol import Cause, Context, Event, Job
from cluster.task import Resources, Task
from cluster.worker.guard import Guardian

log = logging.getLogger(__name__)

TICK = 0.25  # seconds; the longest a death may go unnoticed whose pipe is still held open by a child
MEMORY_PERIOD = 0.5  # seconds between two looks at memory
START_LIMIT = 180.0  # seconds a worker may take to come up
START_FAILURES = 10  # workers in a row that die before they are ready: something is wrong with all of them
MOST_INHERITED = 0.5  # of a task's memory may be taken by what its worker holds from earlier tasks
GRACE = 2.0


class LocalExecutor:
    """Runs jobs in worker processes of this machine."""

    def __init__(self, context: Context) -> None:
        self.machine = Machine.here(cpus=context.config.workers, memory_gb=context.config.memory_gb)
        self._logs = context.logs
        self._queues: dict[Resources, deque[Job]] = {}
        self._workers: list[WorkerProcess] = []
        self._selector = selectors.DefaultSelector()
        self._events: list[Event] = []
        self._guardian: Guardian | None = None
        self._unstarted: Counter[str] = Counter()  # workers that died with a job they had not begun
        self._count, self._start_failures, self._memory_looked = 0, 0, 0.0
        if not LINUX:
            log.warning("memory limits of tasks are watched on Linux only")

    def memory_limit_gb(self, asked: Resources) -> float:
        """All the memory there is to hand out."""
        return self.machine.memory_gb

    def check(self, tasks: Sequence[Task]) -> None:
        """Refuse tasks that need more memory or GPUs than there are.

        More cores than there are is no reason: such a task has as many threads as it asks for, so that its
        result is the same everywhere, and runs alone.
        """
        for task in tasks:
            asked, machine = task.resources, self.machine
            if asked.gpus > len(machine.gpus):
                raise NotAvailable(
                    f"task {task.name!r} asks for {asked.gpus} GPU(s), this machine has {len(machine.gpus)}: "
                    "ask for fewer, or choose another executor"
                )
            if asked.memory_gb > machine.memory_gb:
                raise NotAvailable(
                    f"task {task.name!r} asks for {asked.memory_gb:g} GB of memory, there are "
                    f"{machine.memory_gb:.1f} to hand out: ask for less, or choose another executor"
                )

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue jobs."""
        for job in jobs:
            self._queues.setdefault(job.resources, deque()).append(job)

    def poll(self, timeout: float) -> list[Event]:
        """News; waits for some at most `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while True:
            self._dispatch()
            left = 0.0 if self._events else max(deadline - time.monotonic(), 0.0)
            for key, _ in self._selector.select(min(left, TICK)):
                self._read(key.data)
            for worker in list(self._workers):
                self._look_after(worker)
            self._watch_memory()
            self._dispatch()  # at once: a worker that has just become idle does not wait for the caller
            if self._events or time.monotonic() >= deadline:
                events, self._events = self._events, []
                return events

    def cancel(self, ids: Collection[str]) -> None:
        """Drop these from the queue and kill those that run."""
        wanted = set(ids)
        for resources, queue in self._queues.items():
            dropped = [job for job in queue if job.id in wanted]
            self._queues[resources] = deque(job for job in queue if job.id not in wanted)
            self._events += [Event(job.id, "ended", Cause.CANCELLED) for job in dropped]
        for worker in self._workers:
            if worker.job is not None and worker.job.id in wanted:
                worker.kill(Cause.CANCELLED)

    def close(self) -> None:
        """End all workers, idle ones in peace."""
        self._queues.clear()
        for worker in self._workers:
            worker.hang_up()  # all at once, so that they end beside each other
        for worker in list(self._workers):
            self._remove(worker)
        self._selector.close()
        if self._guardian is not None:
            self._guardian.close()
            self._guardian = None

    # Giving out work

    def _dispatch(self) -> None:
        for resources, queue in self._queues.items():
            while queue and self._fits(resources):
                worker = self._worker_for(resources)
                if worker is None:
                    break
                worker.oom_kills = oom_kills()
                worker.assign(queue.popleft())

    def _share(self, resources: Resources) -> int:
        return min(resources.cpus, self.machine.cpus)

    def _fits(self, resources: Resources) -> bool:
        running = [worker.job.resources for worker in self._workers if worker.job is not None]
        cpus = sum(map(self._share, running)) + self._share(resources)
        memory = sum(r.memory_gb for r in running) + resources.memory_gb
        # A retry with all the memory there is may differ from it by rounding.
        return cpus <= self.machine.cpus and memory <= self.machine.memory_gb * (1 + 1e-9)

    def _worker_for(self, resources: Resources) -> WorkerProcess | None:
        """An idle worker of the right shape, or a new one; None if its GPUs are taken."""
        wanted = (resources.cpus, resources.gpus)
        for worker in [worker for worker in self._workers if worker.idle]:
            if (worker.shape.threads, len(worker.shape.gpus)) == wanted:
                if memory_of([worker.pid]) < resources.memory_gb * MOST_INHERITED:
                    return worker
                self._remove(worker)  # what earlier tasks left in memory would count against this one
        gpus = self._free_gpus(resources.gpus)
        if gpus is None:
            return None
        # Idle workers of other shapes hold memory; those that would make more of them than cores give way.
        shares = sum(min(worker.shape.threads, self.machine.cpus) for worker in self._workers)
        for worker in [worker for worker in self._workers if worker.idle]:
            if shares + self._share(resources) > self.machine.cpus:
                shares -= min(worker.shape.threads, self.machine.cpus)
                self._remove(worker)
        return self._start(Shape(resources.cpus, gpus))

    def _free_gpus(self, count: int) -> tuple[str, ...] | None:
        """GPUs no worker holds. A worker holds its GPUs as long as it lives: CUDA keeps memory on them."""
        if count == 0:
            return ()
        held = {gpu for worker in self._workers if not worker.idle for gpu in worker.shape.gpus}
        free = [gpu for gpu in self.machine.gpus if gpu not in held][:count]
        if len(free) < count:
            return None
        for worker in [worker for worker in self._workers if set(worker.shape.gpus) & set(free)]:
            self._remove(worker)
        return tuple(free)

    def _start(self, shape: Shape) -> WorkerProcess:
        if self._guardian is None:
            self._guardian = Guardian()
        self._count += 1
        self._logs.mkdir(parents=True, exist_ok=True)
        worker = WorkerProcess(shape, self._logs / f"worker-{self._count}.log")
        self._guardian.tell("+", worker.pid)
        self._workers.append(worker)
        self._selector.register(worker.events, selectors.EVENT_READ, worker)
        return worker

    # Following what runs

    def _read(self, worker: WorkerProcess) -> None:
        for message in worker.read():
            if "ready" in message:
                worker.ready = True
                self._start_failures = 0
            else:
                self._take(worker, wire.event_from_json(message["event"]))
        worker.flush()

    def _take(self, worker: WorkerProcess, event: Event) -> None:
        if worker.job is None or worker.job.id != event.job:
            return
        if event.kind == "started":
            worker.job_started = time.monotonic()
        elif event.kind == "ended":
            worker.job = None
        self._events.append(event)

    def _look_after(self, worker: WorkerProcess) -> None:
        worker.flush()
        if worker.exit_code() is not None:
            self._bury(worker)
            return
        now = time.monotonic()
        if not worker.ready and now - worker.started > START_LIMIT:
            worker.kill(Cause.CRASHED, f"the worker did not come up within {START_LIMIT:.0f} s")
        elif worker.job is not None and worker.job_started is not None:
            minutes = worker.job.resources.minutes
            if now - worker.job_started > minutes * 60:
                worker.kill(Cause.TIMEOUT, f"took longer than {minutes:g} minutes")

    def _watch_memory(self) -> None:
        now = time.monotonic()
        if not LINUX or now - self._memory_looked < MEMORY_PERIOD:
            return
        self._memory_looked = now
        busy = [worker for worker in self._workers if worker.job is not None]
        members = group_members(worker.pid for worker in busy)
        for worker in busy:
            used = memory_of(members[worker.pid])
            if worker.job is not None and used > worker.job.resources.memory_gb:
                limit = worker.job.resources.memory_gb
                worker.kill(Cause.OOM, f"used {used:.2f} GB of memory, {limit:g} were asked for")

    def _bury(self, worker: WorkerProcess) -> None:
        """A worker died: say how its job ended, which may have been well just before."""
        self._read(worker)
        job, code = worker.job, worker.exit_code() or 0
        cause, detail = worker.killed or self._diagnose(worker, code)
        self._remove(worker)
        if not worker.ready:
            self._start_failures += 1
        if job is None:
            return
        if worker.killed is None and worker.job_started is None and self._may_start_again(job):
            # It never began: no fault of the job, which goes to another worker as it is.
            self._queues.setdefault(job.resources, deque()).appendleft(job)
            return
        if worker.job_started is None:
            detail = f"{detail}; workers do not come up, see {worker.log}"
        self._events.append(Event(job.id, "ended", cause, detail))

    def _may_start_again(self, job: Job) -> bool:
        self._unstarted[job.id] += 1
        return max(self._unstarted[job.id], self._start_failures) < START_FAILURES

    def _diagnose(self, worker: WorkerProcess, code: int) -> tuple[Cause, str]:
        if code == -signal.SIGKILL and oom_kills() > worker.oom_kills:
            return Cause.OOM, "killed by the kernel for lack of memory"
        if code < 0:
            return Cause.CRASHED, f"the worker was killed by signal {-code} ({signal.strsignal(-code)})"
        return Cause.CRASHED, f"the worker left with exit code {code}"

    def _remove(self, worker: WorkerProcess) -> None:
        if worker in self._workers:
            self._workers.remove(worker)
            self._selector.unregister(worker.events)
            worker.close(GRACE)
            if self._guardian is not None:
                self._guardian.tell("-", worker.pid)
