"""The state of a run and what became of it: what people see of it, and the files that let others see it too.

On a terminal that is one live view, elsewhere sparse plain lines.
"""

import contextlib
import functools
import json
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Column, Table

from cluster.errors import TasksFailed
from cluster.host import Process
from cluster.protocol import Cause
from cluster.store.layout import ATTEMPTS, STATUS, replace_text
from cluster.task import Task, display

_warn_once = functools.cache(logging.getLogger(__name__).warning)

STATES = ("waiting", "running", "done", "skipped", "retried", "failed", "cancelled")
PERIOD = 1.0  # seconds between two status files
SILENCE = 60.0  # seconds
PLAIN_PERIOD = 30.0  # seconds between two lines where there is no terminal
MOST_ROWS = 12
TAIL_LINES, TAIL_BYTES = 6, 8192
MOST_DESCRIBED = 20


@dataclass(frozen=True)
class Outcome:
    """What became of one task."""

    task: Task
    cause: Cause  # how the last attempt ended: `done` unless the task failed
    attempts: int  # how many there were; 0 for a task that was published before or never began
    log: Path | None  # output of the last attempt
    detail: str = ""  # the last attempt's end in one line
    history: tuple[Cause, ...] = ()  # how every attempt ended

    def lines(self) -> Iterator[str]:
        """How it failed: cause, attempts, last log lines, where the log is."""
        tries = f"{self.attempts} attempt{'s' * (self.attempts != 1)}"
        yield f"  {display(self.task.name)}: {self.cause} after {tries}: {self.detail}"
        if self.log is None:
            return
        with contextlib.suppress(OSError), self.log.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
            said = file.read().decode("utf-8", "replace").splitlines()
            yield from [f"      | {line.rstrip()}" for line in said if line.strip()][-TAIL_LINES:]
        yield f"      log: {self.log}"


@dataclass
class Report:
    """What became of the tasks of a run."""

    done: list[Outcome] = field(default_factory=list)  # run and published now
    skipped: list[Outcome] = field(default_factory=list)  # published before
    failed: list[Outcome] = field(default_factory=list)
    cancelled: list[Outcome] = field(default_factory=list)  # given up because another one failed (`fail_fast`)

    @property
    def ok(self) -> bool:
        """Whether every result is there."""
        return not self.failed and not self.cancelled

    def raise_if_failed(self) -> None:
        """Raise `TasksFailed`, with a table of what failed, unless every result is there."""
        if not self.ok:
            raise TasksFailed(self.table())

    def table(self) -> str:
        """The failures as text."""
        total = len(self.done) + len(self.skipped) + len(self.failed) + len(self.cancelled)
        given_up = f", {len(self.cancelled)} were given up (fail_fast)" if self.cancelled else ""
        lines = [f"{len(self.failed)} of {total} tasks failed{given_up}"]
        lines += [line for outcome in self.failed[:MOST_DESCRIBED] for line in outcome.lines()]
        if rest := [display(outcome.task.name) for outcome in self.failed[MOST_DESCRIBED:]]:
            lines.append(f"  and {len(rest)} more: {', '.join(rest)}")
        return "\n".join(lines)


@dataclass
class Running:
    """One attempt at work."""

    name: str
    attempt: int
    gpus: int
    started: float
    done: float = 0.0
    total: float = 0.0
    note: str = ""


@dataclass
class Board:
    """Counts and running attempts of a run."""

    label: str
    run: str
    total: int
    report: Report
    retried: int = 0
    running: dict[str, Running] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)
    gpu_seconds: float = 0.0  # of attempts that have ended

    def counts(self) -> dict[str, int]:
        """Tasks by state, in the order people read them. Who waits has not begun, or waits for another attempt."""
        counts = {name: len(getattr(self.report, name)) for name in ("done", "skipped", "failed", "cancelled")}
        waiting = max(self.total - sum(counts.values()) - len(self.running), 0)
        counts |= {"waiting": waiting, "running": len(self.running), "retried": self.retried}
        return {name: counts[name] for name in STATES}

    @property
    def elapsed(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self.started

    @property
    def gpu_hours(self) -> float:
        """GPU hours used so far."""
        now = time.monotonic()
        return (self.gpu_seconds + sum(r.gpus * (now - r.started) for r in self.running.values())) / 3600

    @property
    def seconds_left(self) -> float | None:
        """At the present rate; None before anything is done."""
        fractions = sum(r.done / r.total for r in self.running.values() if r.total)
        finished = len(self.report.done) + len(self.report.failed) + fractions
        left = len(self.running) + self.counts()["waiting"] - fractions
        return self.elapsed / finished * left if finished else None

    def end(self, job: str) -> float | None:
        """An attempt ended; seconds that it ran, if it had begun."""
        if (running := self.running.pop(job, None)) is None:
            return None
        seconds = time.monotonic() - running.started
        self.gpu_seconds += running.gpus * seconds
        return seconds


def clock(seconds: float | None) -> str:
    """`h:mm:ss`, with days before it."""
    return "-" if seconds is None else str(timedelta(seconds=round(seconds)))


def summary(board: Board) -> str:
    """The board in one line."""
    counts = board.counts()
    parts = [f"{count} {name}" for name, count in counts.items() if count]
    finished = len(board.report.done) + len(board.report.failed)
    if finished and board.elapsed > 0:
        parts.append(f"{60 * finished / board.elapsed:.3g} a minute")
    if board.gpu_hours >= 0.001:
        parts.append(f"{board.gpu_hours:.3g} GPU hours")
    left = f", {clock(board.seconds_left)} left" if counts["waiting"] or board.running else ""
    return f"{', '.join(parts) or 'nothing to do'} ({clock(board.elapsed)}{left})"


class View:
    """Shows a board until the run ends."""

    def __init__(self, board: Board) -> None:
        self._board, self._last = board, time.monotonic()
        self._console = Console(stderr=True)
        # Not its redirection of stdout, which is the program's own.
        self._live = Live(console=self._console, transient=True, redirect_stdout=False, auto_refresh=False)

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Show the board, and in the end what it came to."""
        if not self._console.is_terminal:
            self.note(f"{self._board.total} tasks, {len(self._board.report.skipped)} published before")
        try:
            with self._live if self._console.is_terminal else contextlib.nullcontext():
                yield
        finally:
            self.note(summary(self._board))

    def note(self, text: str) -> None:
        """One line that stays."""
        prefix = f"{self._board.label}: " if self._board.label else ""
        self._console.print(f"{prefix}{text}", markup=False, highlight=False, soft_wrap=True)

    def refresh(self) -> None:
        """Show the board as it is now; to be called often. Without a terminal that is a line, and rare."""
        board, now = self._board, time.monotonic()
        if not self._console.is_terminal:
            if now - self._last >= PLAIN_PERIOD:
                self._last = now
                self.note(summary(board))
            return
        table = Table.grid(*(Column(no_wrap=True) for _ in range(4)), padding=(0, 1))
        finished = board.total - board.counts()["waiting"] - len(board.running)
        hidden = f", {rest} not shown" if (rest := len(board.running) - MOST_ROWS) > 0 else ""
        note = f"{finished}/{board.total} {escape(summary(board))}{hidden}"
        bar = ProgressBar(board.total, finished, width=20)
        table.add_row(escape(board.label) or "tasks", note, bar, clock(board.elapsed))
        for running in islice(board.running.values(), MOST_ROWS):
            again = f" (attempt {running.attempt})" if running.attempt > 1 else ""
            bar = ProgressBar(running.total or None, running.done, width=20)
            name = f"  {escape(display(running.name))}{again}"
            table.add_row(name, escape(running.note), bar, clock(now - running.started))
        self._live.update(table, refresh=True)


class Journal:
    """Writes the board and every attempt to the logs of a run, for `python -m cluster status`."""

    def __init__(self, folder: Path, board: Board) -> None:
        self._folder, self._board = folder, board
        self._process, self._since = vars(Process.me()), time.time()
        self._last = 0.0

    def attempt(self, **facts: Any) -> None:
        """Note how an attempt ended."""
        with self._forgiving(), (self._folder / ATTEMPTS).open("a") as file:
            file.write(json.dumps({"time": round(time.time(), 3), **facts}) + "\n")

    def write(self, state: str = "running") -> None:
        """Write the board; while the run goes on at most once a period."""
        now, board = time.monotonic(), self._board
        if state == "running" and now - self._last < PERIOD:
            return
        self._last = now
        data = {
            "run": board.run, "label": board.label, "state": state, "process": self._process, "since": self._since,
            "seconds": round(board.elapsed, 1), "total": board.total, **board.counts(),
            "gpu_hours": round(board.gpu_hours, 4), "seconds_left": board.seconds_left,
            "now": [asdict(r) | {"seconds": round(now - r.started, 1)} for r in board.running.values()],
        }  # fmt: skip
        with self._forgiving():
            replace_text(self._folder / STATUS, json.dumps(data, indent=1))

    @contextlib.contextmanager
    def _forgiving(self) -> Iterator[None]:
        """A full disk must not end a run because of its own notes."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            yield
        except OSError as error:
            _warn_once(f"cannot write to {self._folder}: {error}")


def read_status(folder: Path) -> dict[str, Any] | None:
    """The last status of a run, with the seconds since it was written as `silent`.

    Its state is "killed" if its driver is gone without having ended it, and "silent" if that cannot be seen from this
    machine and it has written nothing for a minute.
    """
    try:
        data: dict[str, Any] = json.loads((folder / STATUS).read_bytes())
        data["silent"] = round(max(time.time() - (folder / STATUS).stat().st_mtime, 0.0), 1)
        if data["state"] == "running" and not (alive := Process.from_json(data["process"]).alive()):
            silent = "silent" if data["silent"] > SILENCE else "running"
            data["state"] = "killed" if alive is False else silent
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return data
