"""The driver's side of one local worker: start it, send it jobs, read its news, kill it and its children."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import wire
from cluster.fingerprint import dotted_name
from cluster.host.machine import group_members
from cluster.protocol import Cause, Job

_START = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); "
    "from cluster.local.worker import main; main(*map(int, sys.argv[2:]))"
)
_THREADS = ("OMP", "MKL", "OPENBLAS", "NUMEXPR", "VECLIB", "BLIS")


@dataclass(frozen=True)
class Shape:
    """What a worker is made for: its thread count and its GPUs are fixed before it imports anything."""

    threads: int
    gpus: tuple[str, ...]


def worker_environment(shape: Shape) -> dict[str, str]:
    """Environment of a worker: threads as the task asked, so that results do not depend on the machine."""
    threads = {f"{library}_NUM_THREADS": str(shape.threads) for library in _THREADS}
    return {
        "PYTHONHASHSEED": "0",
        **os.environ,
        **threads,
        "CUDA_VISIBLE_DEVICES": ",".join(shape.gpus),
        "PYTHONUNBUFFERED": "1",
    }


def worker_path() -> list[str]:
    """Our `sys.path`, with a script's folder inside a package replaced by the parent of the package."""
    path = []
    for entry in sys.path:
        folder = Path(entry or ".").absolute()
        if (folder / "__init__.py").exists():
            folder = folder.resolve()
            folder = folder.parents[len(dotted_name(folder / "__init__.py").split(".")) - 2]
        if str(folder) not in path:
            path.append(str(folder))
    return path


class WorkerProcess:
    """A worker process and the job it is at."""

    def __init__(self, shape: Shape, log: Path) -> None:
        self.shape = shape
        self.log = log
        self.ready = False
        self.started = time.monotonic()
        self.job: Job | None = None
        self.job_started: float | None = None  # when it said that it began
        self.oom_kills = 0  # of the machine when the job began
        self.killed: tuple[Cause, str] | None = None
        self._lines, self._outbox = wire.Lines(), b""
        commands, self._commands = os.pipe()
        self.events, events = os.pipe()
        try:
            self._process = self._spawn(commands, events)
        finally:
            os.close(commands)
            os.close(events)
        os.set_blocking(self._commands, False)
        os.set_blocking(self.events, False)
        self.pid = self._process.pid

    def _spawn(self, commands: int, events: int) -> subprocess.Popen[bytes]:
        arguments = [json.dumps(worker_path()), str(commands), str(events), str(os.getpid())]
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-c", _START, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=worker_environment(self.shape),
                pass_fds=(commands, events),
                start_new_session=True,
            )

    @property
    def idle(self) -> bool:
        """Whether it can take a job."""
        return self.job is None and self.killed is None

    def assign(self, job: Job) -> None:
        """Give it a job; it need not be ready yet."""
        self.job, self.job_started = job, None
        self._outbox += wire.encode(job.to_json())
        self.flush()

    def flush(self) -> None:
        """Send what the pipe takes without waiting."""
        while self.ready and self._outbox and self._commands >= 0:
            try:
                self._outbox = self._outbox[os.write(self._commands, self._outbox) :]
            except BlockingIOError:
                return
            except BrokenPipeError:  # it died: `poll` of the executor will see it
                self._outbox = b""

    def read(self) -> list[dict[str, Any]]:
        """Messages that have come."""
        messages: list[dict[str, Any]] = []
        while True:
            try:
                data = os.read(self.events, 1 << 16)
            except BlockingIOError:
                return messages
            if not data:
                return messages
            messages.extend(self._lines.feed(data))

    def exit_code(self) -> int | None:
        """None while it runs; minus the signal if one killed it."""
        return self._process.poll()

    def kill(self, cause: Cause, detail: str = "") -> None:
        """Kill it and its children; why is remembered for when its end is noticed."""
        self.killed = self.killed or (cause, detail)
        self._kill_group()

    def _kill_group(self) -> bool:
        """False if no process of it is left, not even a dead one that nobody has waited for."""
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            return False
        return True

    def hang_up(self) -> None:
        """Close the pipe to it: it ends once it is idle, and at once if it is not."""
        if self._commands >= 0:
            os.close(self._commands)
            self._commands = -1

    def close(self, grace: float) -> None:
        """End it, an idle one with `grace` seconds for its exit handlers; nothing of it is left."""
        self.hang_up()
        if self.idle and self.ready:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(grace)
        deadline = time.monotonic() + 5.0
        while time.monotonic() < deadline:  # a child may fork while it is killed
            some = self._kill_group()
            if self._process.poll() is not None and not (some and group_members([self.pid])[self.pid]):
                break
            time.sleep(0.005)
        if self.events >= 0:
            os.close(self.events)
            self.events = -1
        with contextlib.suppress(OSError):
            if self.log.stat().st_size == 0:
                self.log.unlink()
