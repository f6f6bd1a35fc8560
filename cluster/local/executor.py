"""The local executor: persistent worker processes on this machine, each core, GPU and byte given out once."""

import contextlib
import logging
import os
import signal
import socket
import time
from collections import Counter, deque
from collections.abc import Iterator
from multiprocessing.connection import wait
from pathlib import Path

from cluster.host import LINUX, Machine, group_members, memory_of, oom_kills, visible_gpus
from cluster.local.process import WorkerProcess
from cluster.protocol import Cause, Context, Event, Executor, Job
from cluster.task import Resources
from cluster.worker.attempt import remove_if_empty
from cluster.worker.guardian import Guardian

log = logging.getLogger(__name__)

TICK = 0.25  # seconds; the longest a death may go unnoticed whose socket is still held open by a child
MEMORY_PERIOD = 0.5  # seconds between two looks at memory
START_LIMIT = 180.0  # seconds a worker may take to come up
START_FAILURES = 10  # workers in a row that die before they are ready: something is wrong with all of them
MOST_INHERITED = 0.5  # of a task's memory may be taken by what its worker holds from earlier tasks
GRACE = 2.0
WORKER_LOGS = "workers"  # folder, in the logs of a run, of workers on other machines
STOP_GRACE = 1.0  # seconds that a task has to write a checkpoint once its time is up


class Workers(Executor):
    """Runs jobs in worker processes of this machine."""

    def __init__(self, logs: Path, machine: Machine, stop_grace: float = STOP_GRACE) -> None:
        super().__init__()
        self.machine = machine
        self._logs, self._stop_grace = logs, stop_grace
        self._workers: list[WorkerProcess] = []
        self._guardian = Guardian()
        self._unstarted: Counter[str] = Counter()  # workers that died with a job they had not begun
        self._count, self._start_failures, self._memory_looked = 0, 0, 0.0
        if not LINUX:
            log.warning("memory limits of tasks are watched on Linux only")

    def memory_limit_gb(self, asked: Resources) -> float:
        """All the memory there is to hand out."""
        return self.machine.memory_gb

    def _objection(self, asked: Resources) -> str | None:
        # No word of cores: a task has as many threads as it asks for, so that its result is the same everywhere.
        if asked.gpus > len(self.machine.gpus):
            lack = f"{asked.gpus} GPU(s), this machine has {len(self.machine.gpus)}"
        elif asked.memory_gb > self.machine.memory_gb:
            lack = f"{asked.memory_gb:g} GB of memory, there are {self.machine.memory_gb:.1f} to hand out"
        else:
            return None
        return f"asks for {lack}: ask for less, or choose another executor"

    def release(self) -> None:
        """End all workers, idle ones in peace, and forget what they were at or what waits for them."""
        for worker in self._workers:
            worker.hang_up()  # all at once, so that they end beside each other
        for worker in list(self._workers):
            self._remove(worker)
        self._queues.clear()
        self._events.clear()

    def close(self) -> None:
        """End all workers and what looks after them."""
        self.release()
        self._guardian.close()

    def _cancel_running(self, ids: set[str]) -> None:
        for worker in self._workers:
            if worker.job is not None and worker.job.id in ids:
                worker.kill(Cause.CANCELLED)

    def _advance(self, timeout: float) -> None:
        self._dispatch()
        wait([worker.channel for worker in self._workers], min(timeout, TICK))
        for worker in list(self._workers):
            self._read(worker)
            self._look_after(worker)
        self._watch_memory()
        self._dispatch()  # at once: a worker that has just become idle does not wait for the caller

    def _dispatch(self) -> None:
        for resources, queue in self._queues.items():
            while queue and self._fits(resources):
                worker = self._worker_for(resources)
                if worker is None:
                    break
                worker.oom_kills = oom_kills()
                worker.assign(queue.popleft())

    def _share(self, cpus: int) -> int:
        return min(cpus, self.machine.cpus)

    def _fits(self, resources: Resources) -> bool:
        asked = [resources, *(worker.job.resources for worker in self._workers if worker.job is not None)]
        # A retry with all the memory there is may differ from it by rounding.
        memory_fits = sum(one.memory_gb for one in asked) <= self.machine.memory_gb * (1 + 1e-9)
        return memory_fits and sum(self._share(one.cpus) for one in asked) <= self.machine.cpus

    def _worker_for(self, resources: Resources) -> WorkerProcess | None:
        """An idle worker of the right shape, or a new one; None if its GPUs are taken."""
        for worker in [one for one in self._workers if one.idle]:
            if (worker.threads, len(worker.gpus)) == (resources.cpus, resources.gpus):
                if memory_of([worker.pid]) < resources.memory_gb * MOST_INHERITED:
                    return worker
                self._remove(worker)  # what earlier tasks left in memory would count against this one
        # A worker holds its GPUs as long as it lives: CUDA keeps memory on them.
        held = {gpu for worker in self._workers if not worker.idle for gpu in worker.gpus}
        gpus = tuple(gpu for gpu in self.machine.gpus if gpu not in held)[: resources.gpus]
        if len(gpus) < resources.gpus:
            return None
        # Idle workers of other shapes hold memory, too: those that would make more of them than cores give way.
        idle = [one for one in self._workers if one.idle]
        for worker in sorted(idle, key=lambda one: set(gpus).isdisjoint(one.gpus)):
            shares = self._share(resources.cpus) + sum(self._share(worker.threads) for worker in self._workers)
            if shares > self.machine.cpus or not set(gpus).isdisjoint(worker.gpus):
                self._remove(worker)
        self._count += 1
        self._logs.mkdir(parents=True, exist_ok=True)
        worker = WorkerProcess(resources.cpus, gpus, self._logs / f"worker-{self._count}.log")
        self._guardian.tell("+", worker.pid)
        self._workers.append(worker)
        return worker

    def _read(self, worker: WorkerProcess) -> None:
        for event in worker.read():
            if event.kind == "ready":
                worker.ready = True
                self._start_failures = 0
            elif worker.job is not None and worker.job.id == event.job:
                if event.kind == "started":
                    worker.job_started = time.monotonic()
                elif event.kind == "ended":
                    worker.job = None
                self._events.append(event)
        worker.flush()

    def _look_after(self, worker: WorkerProcess) -> None:
        now = time.monotonic()
        if worker.process.poll() is not None:
            self._bury(worker)
        elif not worker.ready and now - worker.started > START_LIMIT:
            worker.kill(Cause.CRASHED, f"the worker did not come up within {START_LIMIT:.0f} s")
        elif worker.job is not None and worker.job_started is not None:
            minutes = worker.job.resources.minutes
            if worker.stopping is None and now - worker.job_started > minutes * 60:
                worker.stopping = now
                worker.process.send_signal(signal.SIGUSR2)
            elif worker.stopping is not None and now - worker.stopping > self._stop_grace:
                worker.kill(Cause.TIMEOUT, f"took longer than {minutes:g} minutes")

    def _watch_memory(self) -> None:
        now = time.monotonic()
        if not LINUX or now - self._memory_looked < MEMORY_PERIOD:
            return
        self._memory_looked = now
        limits = {worker: worker.job.resources.memory_gb for worker in self._workers if worker.job is not None}
        members = group_members(worker.pid for worker in limits)
        for worker, limit in limits.items():
            if (used := memory_of(members[worker.pid])) > limit:
                worker.kill(Cause.OOM, f"used {used:.2f} GB of memory, {limit:g} were asked for")

    def _bury(self, worker: WorkerProcess) -> None:
        """A worker died: say how its job ended, which may have been well just before."""
        self._read(worker)
        job = worker.job
        code = worker.process.poll() or 0
        said = (
            f"left with exit code {code}" if code >= 0 else f"was killed by signal {-code} ({signal.strsignal(-code)})"
        )
        cause, detail = worker.killed or (Cause.CRASHED, f"the worker {said}")
        if not worker.killed and code == -signal.SIGKILL and oom_kills() > worker.oom_kills:
            cause, detail = Cause.OOM, "killed by the kernel for lack of memory"
        self._remove(worker)
        if not worker.ready:
            self._start_failures += 1
        if job is None:
            return
        if worker.job_started is None:
            self._unstarted[job.id] += 1
            if worker.killed is None and max(self._unstarted[job.id], self._start_failures) < START_FAILURES:
                # It never began: no fault of the job, which goes to another worker as it is.
                self._queues.setdefault(job.resources, deque()).appendleft(job)
                return
            detail = f"{detail}; workers do not come up, see {worker.log}"
        self._events.append(Event(job.id, "ended", cause, detail))

    def _remove(self, worker: WorkerProcess) -> None:
        self._workers.remove(worker)
        worker.close(GRACE)
        self._guardian.tell("-", worker.pid)


class LocalExecutor(Workers):
    """Runs jobs on this machine, or on as much of it as the configuration says."""

    def __init__(self, context: Context) -> None:
        config = context.config
        super().__init__(context.logs, Machine.here(cpus=config.workers, memory_gb=config.memory_gb))


class Allotted(Workers):
    """Runs one job after another, each with what a scheduler of other machines set aside for it here.

    So memory, time limit, children, logs and the causes of an end are the same on Ray and SLURM as on one machine.
    """

    def __init__(self, logs: Path, stop_grace: float = STOP_GRACE) -> None:
        super().__init__(logs / WORKER_LOGS / f"{socket.gethostname()}-{os.getpid()}", Machine(1, 1.0, ()), stop_grace)

    def attempt(self, job: Job) -> Iterator[Event]:
        """Run one attempt to its end, yielding its news; the last is of kind "ended". Given up, it is killed."""
        asked = job.resources
        gpus = visible_gpus() if asked.gpus else ()
        if len(gpus) < asked.gpus:
            seen = f"{len(gpus)} of {asked.gpus} GPU(s), CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES')}"
            yield Event(job.id, "ended", Cause.EXCEPTION, f"the node {socket.gethostname()} has {seen}")
            return
        self.machine = Machine(asked.cpus, asked.memory_gb, gpus[: asked.gpus])
        self.submit([job])
        ended = False
        try:
            while not ended:
                for event in self.poll(1.0):
                    ended = event.kind == "ended"
                    yield event
        finally:
            if not ended:
                self.release()

    def signal(self, number: int) -> None:
        """Pass a signal on to the worker that is at a job."""
        for worker in self._workers:
            if worker.job_started is not None:
                worker.process.send_signal(number)


def remove_empty_logs(logs: Path) -> None:
    """Remove logs of workers that hold nothing; what is left is output that belongs to no attempt."""
    folder = logs / WORKER_LOGS
    for path in [*sorted(folder.rglob("*"), reverse=True), folder]:
        remove_if_empty(path)
        with contextlib.suppress(OSError):
            path.rmdir()
