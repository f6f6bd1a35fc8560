"""`run`: plan, start, follow, retry and report. All policy is here, the same for every executor.

An attempt that ended badly is followed by another one, by its cause:
crashed, lost, node    again, `tries` attempts in all, on another node if there is one
preempted              again, `preemptions` attempts
timeout                again only if the attempt left something new to resume from, `preemptions` attempts
oom                    once more, with twice the memory (or what there is)
exception, cancelled   never: again would end the same
"""

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from cluster.config import EXECUTORS, ClusterConfig
from cluster.driver.board import Board, Journal, Outcome, Report, Running, View
from cluster.driver.lock import run_lock
from cluster.driver.plan import Planned, check_tasks, make_folders, record_code
from cluster.errors import CannotRun, Interrupted
from cluster.protocol import Cause, Context, Event, Executor, Job
from cluster.store.layout import LOCKS, appears, is_published, new_attempt, temporaries
from cluster.store.lease import Watch, fence, sweep
from cluster.task import Resources, Store, Task, display, resolve_call

log = logging.getLogger(__name__)

POLL = 0.25  # seconds; also how long Ctrl-C may go unnoticed
LOOK_PAUSE = 0.5  # seconds until we look again whether another run has finished our task; then twice as long, up to
LOOK_LONGEST = 10.0
VISIBLE_WITHIN = 10.0  # seconds a shared file system may take to show what another machine published
CANCEL_LIMIT = 30.0  # seconds an executor may take to end what was cancelled
MORE_MEMORY = 2.0
ELSEWHERE = (Cause.CRASHED, Cause.LOST, Cause.NODE)  # the node may be to blame
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 30.0  # seconds


def run(
    tasks: Iterable[Task],
    executor: str | Executor | None = None,
    *,
    config: ClusterConfig | None = None,
    label: str = "",
    fail_fast: bool = False,
) -> Report:
    """Make sure that every task is published: skip what is, run the rest, retry by cause, report at the end.

    Args:
        tasks: in the order to start them.
        executor: name of an executor (default: that of the configuration), or one that the caller made and
            closes.
        config: where and how; by default that of the environment.
        label: what this run is, for people; runs with one label on one store follow each other.
        fail_fast: give up at the first task that fails for good instead of running the others.

    Raises:
        BadTask, CannotRun: something cannot be run as asked; no work was started.
        Locked: another run with this label is at work, and `config.on_locked` says to refuse.
        Interrupted: (a KeyboardInterrupt) SIGINT or SIGTERM came; all that ran was stopped and cleaned up.
    """
    config = config or ClusterConfig.from_params()
    executor = config.executor if executor is None else executor
    if isinstance(executor, str) and executor not in EXECUTORS:
        raise CannotRun(f"there is no executor {executor!r}: this version has {', '.join(EXECUTORS)}")
    tasks = list(tasks)
    make_folders(check_tasks(tasks))
    store = Store(config.store)
    run_id = f"{time.strftime('%Y%m%d-%H%M%S')}-{new_attempt()[:8]}"
    context = Context(run_id, store.logs / run_id, config)
    with _signals_noted() as check, run_lock(store.root / LOCKS, label, run_id, config.on_locked, check):
        planned = check_tasks(tasks)  # again: the run we waited for may have done them
        missing = [one for one in planned if not one.published]
        folders, watch = {one.out.parent for one in planned}, Watch()
        for folder in folders:
            sweep(folder, watch)
        report = Report(skipped=[Outcome(one.task, Cause.DONE, 0, None) for one in planned if one.published])
        if not missing:
            log.info("%s: all %d tasks were published before", label or "run", len(planned))
            return report
        made = cast(Executor, resolve_call(EXECUTORS[executor])(context)) if isinstance(executor, str) else executor
        with closing(made) if made is not executor else nullcontext():
            check()
            made.check([one.task for one in missing])
            record_code(store, (one.task for one in missing))
            board = Board(label, run_id, len(planned), report)
            _Run([_Entry(one, one.task.resources) for one in missing], board, made, context, watch, fail_fast).go(check)
        for folder in folders:
            sweep(folder, watch)
        return report


def next_resources(
    causes: Sequence[Cause], last: Resources, config: ClusterConfig, progressed: bool, memory_limit_gb: float | None
) -> Resources | None:
    """What to give the next attempt, by how each one so far ended and what the last had; None if there is to be none.

    `progressed`: the last one left something new in its `resume/`. `memory_limit_gb`: the most that one can get.
    """
    cause = causes[-1]
    limits = {**dict.fromkeys(ELSEWHERE, config.tries), Cause.PREEMPTED: config.preemptions, Cause.OOM: 2}
    if cause is Cause.TIMEOUT and progressed:
        limits[cause] = config.preemptions
    if causes.count(cause) >= limits.get(cause, 1):
        return None
    if cause is not Cause.OOM:
        return last
    memory = min(last.memory_gb * MORE_MEMORY, memory_limit_gb or float("inf"))
    return replace(last, memory_gb=memory) if memory > last.memory_gb else None


def pause(failures: int, attempt: str) -> float:
    """Seconds to wait before the next attempt: doubling, with a jitter drawn from the attempt's name."""
    jitter = 0.75 + 0.5 * int(attempt[:4], 16) / 0xFFFF
    return min(FIRST_PAUSE * 2.0 ** max(failures - 1, 0), LONGEST_PAUSE) * jitter


@contextmanager
def _signals_noted() -> Iterator[Callable[[], None]]:
    """Note SIGINT and SIGTERM instead of being ended by them; yields what raises `Interrupted` if one has come.

    So cleaning up is never itself interrupted. Only the main thread can do that: in others, signals keep their effect.
    """
    seen: list[int] = []
    caught = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()

    def arm() -> dict[int, Any]:
        return {number: signal.signal(number, lambda number, _: seen.append(number)) for number in caught}

    def check() -> None:
        arm()  # again: `ray.init` sets handlers of its own
        if seen:
            raise Interrupted(seen[0])

    before = arm()
    try:
        yield check
    finally:
        for number, handler in before.items():
            # None: a handler that was not set from Python cannot be restored from Python either
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


@dataclass(eq=False)
class _Entry:
    """A task that is not done yet."""

    planned: Planned
    resources: Resources
    ready_at: float = 0.0
    causes: list[Cause] = field(default_factory=list)
    supersedes: set[str] = field(default_factory=set)
    avoid: set[str] = field(default_factory=set)  # nodes
    look_pause: float = 0.0  # seconds between two looks at others who are at work on it; 0 if there are none
    log: Path | None = None
    detail: str = ""

    def outcome(self, cause: Cause) -> Outcome:
        return Outcome(self.planned.task, cause, len(self.causes), self.log, self.detail, tuple(self.causes))

    def job(self, context: Context) -> Job:
        """Its next attempt."""
        task, number = self.planned.task, len(self.causes) + 1
        log = context.logs / f"{self.planned.log_name}-{number}.log"
        return Job(
            id=new_attempt(), name=task.name, number=number, call=task.call_name, spec=task.spec, inputs=task.inputs,
            out=self.planned.out, key=task.key, kind=task.kind, code=task.code, resources=self.resources, log=log,
            lease=context.config.lease_seconds, supersedes=tuple(sorted(self.supersedes)),
            avoid=tuple(sorted(self.avoid)),
        )  # fmt: skip


class _Run:
    """The missing tasks of one run, from the first attempt to the last."""

    def __init__(
        self, missing: list[_Entry], board: Board, executor: Executor, context: Context, watch: Watch, fail_fast: bool
    ) -> None:
        self._waiting, self._executor, self._context = missing, executor, context
        self._flying: dict[str, tuple[_Entry, Job]] = {}
        self._board, self._report, self._watch, self._fail_fast = board, board.report, watch, fail_fast
        self._journal, self._view = Journal(context.logs, board), View(board)

    def go(self, check: Callable[[], None]) -> None:
        """Run all tasks to their end, or until `check` raises."""
        state = "failed"
        try:
            self._journal.write()  # who drives this run, before anything of it runs
            with self._view.shown():
                while self._waiting or self._flying:
                    check()
                    self._submit()
                    soonest = min((entry.ready_at for entry in self._waiting), default=float("inf"))
                    for event in self._executor.poll(max(0.0, min(POLL, soonest - time.monotonic()))):
                        self._handle(event)
                    self._view.refresh()
                    self._journal.write()
            state = "done" if self._report.ok else "failed"
        except BaseException as error:
            state = "interrupted" if isinstance(error, Interrupted) else "failed"
            self._stop()
            raise
        finally:
            self._journal.write(state)

    def _submit(self) -> None:
        now = time.monotonic()
        ready = [entry for entry in self._waiting if entry.ready_at <= now]
        if not ready:
            return
        self._waiting = [entry for entry in self._waiting if entry.ready_at > now]
        self._look_at_others(ready)
        started = {job.id: (entry, job) for entry in ready for job in [entry.job(self._context)]}
        self._flying |= started
        self._executor.submit([job for _, job in started.values()])

    def _handle(self, event: Event) -> None:
        entry, job = self._flying[event.job]
        if event.kind == "started":
            self._board.running[job.id] = Running(job.name, job.number, job.resources.gpus, time.monotonic())
        elif event.kind == "ended":
            self._ended(entry, job, event)
        elif running := self._board.running.get(job.id):
            running.done, running.total, running.note = event.done, event.total, event.note

    def _ended(self, entry: _Entry, job: Job, event: Event) -> None:
        del self._flying[job.id]
        seconds = self._board.end(job.id)
        if event.cause is Cause.BUSY:
            self._wait_for_others(entry)
            return
        cause, entry.detail = self._settled(job, event)
        progressed = fence(job.out, job.id)
        entry.causes.append(cause)
        if cause in ELSEWHERE and event.node:
            entry.avoid.add(event.node)
        entry.log = job.log if job.log.exists() else None
        self._journal.attempt(
            task=job.name, key=job.key, attempt=job.number, id=job.id, cause=cause, detail=entry.detail,
            node=event.node, seconds=None if seconds is None else round(seconds, 3), log=job.log.name,
        )  # fmt: skip
        if cause is Cause.DONE:
            self._report.done.append(entry.outcome(cause))
        elif cause is Cause.CANCELLED:
            self._report.cancelled.append(entry.outcome(cause))
        else:
            self._retry_or_fail(entry, job, progressed)

    def _settled(self, job: Job, event: Event) -> tuple[Cause, str]:
        """What the end of an attempt amounts to: the result is there, or it is not."""
        cause = event.cause or Cause.LOST
        if is_published(job.out):
            return Cause.DONE, "" if cause is Cause.DONE else f"{cause} after it had published"
        if cause is not Cause.DONE:
            return cause, event.detail
        if appears(lambda: is_published(job.out), VISIBLE_WITHIN):
            return Cause.DONE, ""
        return Cause.LOST, f"it said that it published, but {job.out} cannot be seen from here"

    def _look_at_others(self, ready: list[_Entry]) -> None:
        """Take off `ready` what another run has published or is still at work on; the lease of the latter tells."""
        looked = [entry for entry in ready if entry.look_pause]
        found = [each for parent in {entry.planned.out.parent for entry in looked} for each in temporaries(parent)]
        for entry in looked:
            out = entry.planned.out
            theirs = [(root, attempt) for root, name, attempt in found if (root.parent, name) == (out.parent, out.name)]
            over = {attempt for root, attempt in theirs if self._watch.abandoned(root)}
            entry.supersedes |= over
            if is_published(out):
                ready.remove(entry)
                self._report.skipped.append(entry.outcome(Cause.DONE))
            elif len(over) < len(theirs):
                ready.remove(entry)
                self._wait_for_others(entry)

    def _wait_for_others(self, entry: _Entry) -> None:
        """Another run is at work on this task, or its turn did not come: look again later, ever more rarely."""
        entry.look_pause = min(2 * entry.look_pause or LOOK_PAUSE, LOOK_LONGEST)
        entry.ready_at = time.monotonic() + entry.look_pause
        self._waiting.append(entry)

    def _retry_or_fail(self, entry: _Entry, job: Job, progressed: bool) -> None:
        name, cause, most = display(job.name), entry.causes[-1], self._executor.memory_limit_gb(entry.resources)
        resources = next_resources(entry.causes, entry.resources, self._context.config, progressed, most)
        if resources is not None and not (self._fail_fast and self._report.failed):
            entry.resources = resources
            entry.ready_at = time.monotonic() + pause(len(entry.causes), job.id)
            self._waiting.append(entry)
            self._board.retried += 1
            self._view.note(f"{name}: {cause} in attempt {job.number}, again ({entry.detail})")
            return
        self._report.failed.append(entry.outcome(cause))
        self._view.note(f"{name}: failed, {cause} ({entry.detail})")
        if self._fail_fast:
            self._executor.cancel(list(self._flying))
            self._report.cancelled += [waiting.outcome(Cause.CANCELLED) for waiting in self._waiting]
            self._waiting = []

    def _stop(self) -> None:
        """Cancel all that is under way and leave nothing of it."""
        self._executor.cancel(list(self._flying))
        deadline = time.monotonic() + CANCEL_LIMIT
        while self._flying and time.monotonic() < deadline:
            for event in self._executor.poll(POLL):
                self._handle(event)
        for _, job in self._flying.values():
            self._board.end(job.id)
            fence(job.out, job.id)
