"""The state of a run as people see it, and the files that let others see it too."""

import contextlib
import json
import logging
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cluster.driver.report import Report
from cluster.host.process import Process
from cluster.store.layout import ATTEMPTS, STATUS

log = logging.getLogger(__name__)

STATES = ("waiting", "running", "done", "skipped", "retried", "failed", "cancelled")
PERIOD = 1.0  # seconds between two status files
SILENCE = 60.0  # seconds


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


class Journal:
    """Writes the board and every attempt to the logs of a run, for `python -m cluster status`."""

    def __init__(self, folder: Path, board: Board) -> None:
        self._folder, self._board = folder, board
        self._process, self._since = Process.me().to_json(), time.time()
        self._last, self._warned = 0.0, False

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
            fresh = self._folder / f"{STATUS}.new"
            fresh.write_text(json.dumps(data, indent=1))
            fresh.replace(self._folder / STATUS)

    @contextlib.contextmanager
    def _forgiving(self) -> Iterator[None]:
        """A full disk must not end a run because of its own notes."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            yield
        except OSError as error:
            if not self._warned:
                log.warning("cannot write to %s: %s", self._folder, error)
            self._warned = True


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
