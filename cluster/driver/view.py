"""What people see while tasks run: one live view on a terminal, sparse plain lines elsewhere."""

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from cluster.driver.journal import Board
from cluster.task import display

PLAIN_PERIOD = 30.0
MOST_ROWS = 12


def clock(seconds: float | None) -> str:
    """`h:mm:ss`, or `m:ss` under an hour."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


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
        columns = [*map(TextColumn, ("{task.description}", "{task.fields[note]}")), BarColumn(20), TimeElapsedColumn()]
        # Not its redirection of stdout, which is the program's own.
        self._progress = Progress(
            *columns, console=self._console, transient=True, redirect_stdout=False, auto_refresh=False,
            disable=not self._console.is_terminal,
        )  # fmt: skip
        self._all = self._progress.add_task(escape(board.label) or "tasks", total=board.total, note="")
        self._rows: dict[str, TaskID] = {}

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Show the board, and in the end what it came to."""
        if self._progress.disable:
            self.note(f"{self._board.total} tasks, {len(self._board.report.skipped)} published before")
        try:
            with self._progress:
                yield
        finally:
            self.note(summary(self._board))

    def note(self, text: str) -> None:
        """One line that stays."""
        prefix = f"{self._board.label}: " if self._board.label else ""
        self._console.print(f"{prefix}{text}", markup=False, highlight=False, soft_wrap=True)

    def refresh(self) -> None:
        """Show the board as it is now; to be called often. Without a terminal that is a line, and rare."""
        board = self._board
        if self._progress.disable:
            if time.monotonic() - self._last >= PLAIN_PERIOD:
                self._last = time.monotonic()
                self.note(summary(board))
            return
        for gone in self._rows.keys() - board.running.keys():
            self._progress.remove_task(self._rows.pop(gone))
        for job, running in board.running.items():
            if job not in self._rows and len(self._rows) < MOST_ROWS:
                again = f" (attempt {running.attempt})" if running.attempt > 1 else ""
                self._rows[job] = self._progress.add_task(f"  {escape(display(running.name))}{again}", note="")
            if job in self._rows:
                total, note = running.total or None, escape(running.note)
                self._progress.update(self._rows[job], completed=running.done, total=total, note=note)
        counts = board.counts()
        finished = sum(counts[name] for name in ("done", "failed", "cancelled", "skipped"))
        hidden = f", {rest} not shown" if (rest := len(board.running) - len(self._rows)) else ""
        note = f"{finished}/{board.total} {escape(summary(board))}{hidden}"
        self._progress.update(self._all, completed=finished, note=note)
        self._progress.refresh()
