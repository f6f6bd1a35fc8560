"""The driver's side of one local worker: start it, send it jobs, read its news, kill it and its children."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from cluster.host.machine import group_members
from cluster.protocol import Cause, Event, Job, Lines, encode
from cluster.worker.environment import remove_if_empty, worker_environment, worker_path

_START = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); "
    "from cluster.local.worker import main; main(*map(int, sys.argv[2:]))"
)


class WorkerProcess:
    """A worker process and the job it is at. Its thread count and its GPUs are fixed before it imports anything."""

    def __init__(self, threads: int, gpus: tuple[str, ...], log: Path) -> None:
        self.threads, self.gpus = threads, gpus
        self.log = log
        self.ready = False
        self.started = time.monotonic()
        self.job: Job | None = None
        self.job_started: float | None = None  # when it said that it began
        self.stopping: float | None = None  # since when it knows that its job's time is up
        self.oom_kills = 0  # of the machine when the job began
        self.killed: tuple[Cause, str] | None = None
        self._lines, self._outbox = Lines(Event.from_json), b""
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
                env=worker_environment(self.threads, self.gpus),
                pass_fds=(commands, events),
                start_new_session=True,
            )

    @property
    def idle(self) -> bool:
        """Whether it can take a job."""
        return self.job is None and self.killed is None

    def assign(self, job: Job) -> None:
        """Give it a job; it need not be ready yet."""
        self.job, self.job_started, self.stopping = job, None, None
        self._outbox += encode(job)
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

    def read(self) -> list[Event]:
        """News that have come."""
        events: list[Event] = []
        while True:
            try:
                data = os.read(self.events, 1 << 16)
            except BlockingIOError:
                return events
            if not data:
                return events
            events.extend(self._lines.feed(data))

    def exit_code(self) -> int | None:
        """None while it runs; minus the signal if one killed it."""
        return self._process.poll()

    def signal(self, number: int) -> None:
        """Send it a signal, but not its children."""
        self._process.send_signal(number)

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
        remove_if_empty(self.log)
