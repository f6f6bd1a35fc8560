"""What became of a run."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from cluster.errors import TasksFailed
from cluster.protocol import Cause
from cluster.task import Task, display

TAIL_LINES, TAIL_BYTES = 6, 8192
MOST_DESCRIBED = 20


def log_tail(path: Path | None, lines: int = TAIL_LINES) -> list[str]:
    """The last lines of a log; empty if there is none."""
    if path is None:
        return []
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    return [line.rstrip() for line in text.splitlines() if line.strip()][-lines:]


@dataclass(frozen=True)
class Outcome:
    """What became of one task."""

    task: Task
    cause: Cause
    """How the last attempt ended: `done` unless the task failed."""
    attempts: int
    """How many attempts there were; 0 for a task that was published before or never began."""
    log: Path | None
    """Output of the last attempt."""
    detail: str = ""
    """The last attempt's end in one line."""
    history: tuple[Cause, ...] = ()
    """How every attempt ended."""


@dataclass
class Report:
    """What became of the tasks of a run."""

    done: list[Outcome] = field(default_factory=list)
    """Run and published now."""
    skipped: list[Outcome] = field(default_factory=list)
    """Published before."""
    failed: list[Outcome] = field(default_factory=list)
    cancelled: list[Outcome] = field(default_factory=list)
    """Given up because another one failed (`fail_fast`)."""

    @property
    def ok(self) -> bool:
        """Whether every result is there."""
        return not self.failed and not self.cancelled

    def raise_if_failed(self) -> None:
        """Raise `TasksFailed`, with a table of what failed, unless every result is there."""
        if not self.ok:
            raise TasksFailed(self.table())

    def table(self) -> str:
        """The failures as text: name, cause, attempts, last log lines, where the log is."""
        total = len(self.done) + len(self.skipped) + len(self.failed) + len(self.cancelled)
        lines = [f"{len(self.failed)} of {total} tasks failed"]
        if self.cancelled:
            lines[0] += f", {len(self.cancelled)} were given up (fail_fast)"
        for outcome in self.failed[:MOST_DESCRIBED]:
            lines += list(_describe(outcome))
        if len(self.failed) > MOST_DESCRIBED:
            names = ", ".join(display(outcome.task.name) for outcome in self.failed[MOST_DESCRIBED:])
            lines.append(f"  and {len(self.failed) - MOST_DESCRIBED} more: {names}")
        return "\n".join(lines)


def _describe(outcome: Outcome) -> Iterable[str]:
    tries = f"{outcome.attempts} attempt{'s' * (outcome.attempts != 1)}"
    yield f"  {display(outcome.task.name)}: {outcome.cause} after {tries}: {outcome.detail}"
    yield from (f"      | {line}" for line in log_tail(outcome.log))
    if outcome.log is not None:
        yield f"      log: {outcome.log}"
