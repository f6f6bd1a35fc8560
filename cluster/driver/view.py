"""What people see while tasks run: one live view on a terminal, sparse plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

from cluster.driver.journal import Board
from cluster.driver.report import display

if TYPE_CHECKING:
    from rich.console import RenderableType

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
    parts = [f"{count} {name}" for name, count in board.counts().items() if count]
    finished = board.done + board.failed
    if finished and board.elapsed > 0:
        parts.append(f"{60 * finished / board.elapsed:.3g} a minute")
    if board.gpu_hours >= 0.001:
        parts.append(f"{board.gpu_hours:.3g} GPU hours")
    left = f", {clock(board.seconds_left)} left" if board.waiting or board.running else ""
    return f"{', '.join(parts) or 'nothing to do'} ({clock(board.elapsed)}{left})"


class View:
    """Shows a board until the run ends."""

    def __init__(self, board: Board) -> None:
        from rich.console import Console

        self._board = board
        self._console = Console(stderr=True)
        self._live: Any = None
        self._last = time.monotonic()
        self._shown = ""

    def __enter__(self) -> View:
        from rich.live import Live

        if self._console.is_terminal:
            self._live = Live(console=self._console, get_renderable=self.render, refresh_per_second=4, transient=True)
            self._live.start()
        else:
            self.note(f"{self._board.total} tasks, {self._board.skipped} published before")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
        self.note(summary(self._board))

    def note(self, text: str) -> None:
        """One line that stays."""
        prefix = f"{self._board.label}: " if self._board.label else ""
        self._console.print(f"{prefix}{text}", markup=False, highlight=False, soft_wrap=True)

    def refresh(self) -> None:
        """To be called often; on a terminal the view refreshes itself, elsewhere it writes a line rarely."""
        now = time.monotonic()
        if self._live is None and now - self._last >= PLAIN_PERIOD:
            self._last = now
            self.note(summary(self._board))

    def render(self) -> RenderableType:
        """The live view."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        board = self._board
        finished = board.done + board.failed + board.cancelled + board.skipped
        head = Table.grid(padding=(0, 1))
        head.add_row(
            Text(board.label or "tasks", style="bold"),
            ProgressBar(total=max(board.total, 1), completed=finished, width=30),
            Text(f"{finished}/{board.total}"),
        )
        rows = Table.grid(padding=(0, 1))
        running = list(board.running.values())
        for task in running[:MOST_ROWS]:
            bar = ProgressBar(total=task.total, completed=task.done, width=20) if task.total else Text("")
            again = f" (attempt {task.number})" if task.number > 1 else ""
            seconds = clock(time.monotonic() - task.started)
            rows.add_row(Text(f"  {display(task.name)}{again}"), bar, Text(seconds), Text(task.note, style="dim"))
        more = [Text(f"  and {len(running) - MOST_ROWS} more", style="dim")] if len(running) > MOST_ROWS else []
        return Group(head, Text(f"  {summary(board)}", style="dim"), rows, *more)
