"""The driver's side of one worker process: start it, send it jobs, read its news, kill it and its children."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from cluster.fingerprint import dotted_name
from cluster.host import group_members
from cluster.protocol import Cause, Event, EventStream, Job, encode
from cluster.worker.attempt import remove_if_empty

_START = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); "
    "from cluster.worker.attempt import serve; serve(int(sys.argv[2]))"
)
_THREADS = ("OMP", "MKL", "OPENBLAS", "NUMEXPR", "VECLIB", "BLIS")


def worker_path() -> list[str]:
    """Our `sys.path`, with a script's folder inside a package replaced by the parent of the package."""
    path: dict[str, None] = {}
    for entry in sys.path:
        folder = Path(entry or ".").absolute()
        if (folder / "__init__.py").exists():
            folder = folder.resolve()
            folder = folder.parents[len(dotted_name(folder / "__init__.py").split(".")) - 2]
        path[str(folder)] = None
    return list(path)


class WorkerProcess:
    """A worker process and the job it is at. Its thread count and its GPUs are fixed before it imports anything."""

    def __init__(self, threads: int, gpus: tuple[str, ...], log: Path) -> None:
        self.threads, self.gpus, self.log = threads, gpus, log
        self.ready = False
        self.started = time.monotonic()
        self.job: Job | None = None
        self.job_started: float | None = None  # when it said that it began
        self.stopping: float | None = None  # since when it knows that its job's time is up
        self.oom_kills = 0  # of the machine when the job began
        self.killed: tuple[Cause, str] | None = None
        self._stream, self._outbox = EventStream(), b""
        # Threads as the task asked, so that results do not depend on the machine.
        limits = {f"{library}_NUM_THREADS": str(threads) for library in _THREADS}
        fixed = {"CUDA_VISIBLE_DEVICES": ",".join(gpus), "PYTHONUNBUFFERED": "1"}
        self.channel, theirs = socket.socketpair()
        with theirs, log.open("ab") as output:
            handle = theirs.fileno()
            self.process = subprocess.Popen(
                [sys.executable, "-c", _START, json.dumps(worker_path()), str(handle)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={"PYTHONHASHSEED": "0", **os.environ, **limits, **fixed},
                pass_fds=[handle],
                start_new_session=True,
            )
        self.channel.setblocking(False)
        self.pid = self.process.pid

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
        """Send what the socket takes without waiting."""
        with contextlib.suppress(OSError):  # it is full, or its worker died, which the executor will see
            while self.ready and self._outbox:
                self._outbox = self._outbox[self.channel.send(self._outbox) :]

    def read(self) -> list[Event]:
        """News that have come."""
        events: list[Event] = []
        with contextlib.suppress(OSError):  # there is no more, or its worker died
            while data := self.channel.recv(1 << 16):
                events.extend(self._stream.feed(data))
        return events

    def kill(self, cause: Cause, detail: str = "") -> None:
        """Kill it and its children; why is remembered for when its end is noticed."""
        self.killed = self.killed or (cause, detail)
        with contextlib.suppress(ProcessLookupError, PermissionError):  # none is left
            os.killpg(self.pid, signal.SIGKILL)

    def hang_up(self) -> None:
        """Send it no more jobs: it ends once it is idle."""
        with contextlib.suppress(OSError):  # it has ended
            self.channel.shutdown(socket.SHUT_WR)

    def close(self, grace: float) -> None:
        """End it, an idle one with `grace` seconds for its exit handlers; nothing of it is left."""
        self.hang_up()
        if self.idle and self.ready:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(grace)
        deadline = time.monotonic() + 5.0
        while time.monotonic() < deadline:  # a child may fork while it is killed
            self.kill(Cause.CANCELLED)
            if self.process.poll() is not None and not group_members([self.pid])[self.pid]:
                break
            time.sleep(0.005)
        self.channel.close()
        remove_if_empty(self.log)
