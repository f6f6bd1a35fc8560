"""What became of a run."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cluster.errors import TasksFailed
from cluster.protocol import Cause
from cluster.task import Task, display

TAIL_LINES, TAIL_BYTES = 6, 8192
MOST_DESCRIBED = 20


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

    def lines(self) -> Iterator[str]:
        """How it failed: cause, attempts, last log lines, where the log is."""
        tries = f"{self.attempts} attempt{'s' * (self.attempts != 1)}"
        yield f"  {display(self.task.name)}: {self.cause} after {tries}: {self.detail}"
        if self.log is not None:
            yield from (f"      | {line}" for line in _tail(self.log))
            yield f"      log: {self.log}"


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
        """The failures as text."""
        total = len(self.done) + len(self.skipped) + len(self.failed) + len(self.cancelled)
        given_up = f", {len(self.cancelled)} were given up (fail_fast)" if self.cancelled else ""
        lines = [f"{len(self.failed)} of {total} tasks failed{given_up}"]
        lines += [line for outcome in self.failed[:MOST_DESCRIBED] for line in outcome.lines()]
        if rest := [display(outcome.task.name) for outcome in self.failed[MOST_DESCRIBED:]]:
            lines.append(f"  and {len(rest)} more: {', '.join(rest)}")
        return "\n".join(lines)


def _tail(log: Path) -> list[str]:
    try:
        with log.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    return [line.rstrip() for line in text.splitlines() if line.strip()][-TAIL_LINES:]
