"""One attempt inside a Ray worker: the local executor on a machine of one task.

The call never runs in Ray's own process but in a local worker beside it (`cluster.local.worker`), which serves one
attempt after another: memory, time limit, children, logs and the causes of an end are those of the local
executor, by the same code. If Ray's process dies, however, the local worker and its children die with it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import wire
from cluster.config import ClusterConfig
from cluster.host.machine import Machine, visible_gpus
from cluster.local.executor import LocalExecutor
from cluster.protocol import Cause, Context, Event, Job
from cluster.worker import guard

log = logging.getLogger(__name__)

TICK = 1.0  # seconds between two looks at a local worker that says nothing
VISIBLE_WITHIN = 10.0  # seconds a shared file system may take to show the folder of logs
# Starts the guardian as nobody's child: Ray kills the children of a worker that it ends, and a guardian that
# dies with those it guards would let their children go.
_DETACH = "import os, sys; os.fork() and os._exit(0); os.setsid(); os.execv(sys.argv[1], sys.argv[1:])"


class _Guardian(guard.Guardian):
    """A guardian that outlives the process it is started by."""

    def __init__(self) -> None:
        script = Path(guard.__file__).with_name("guardian.py")
        python = [sys.executable, "-I", "-S"]
        self._process = subprocess.Popen([*python, "-c", _DETACH, *python, str(script)], stdin=subprocess.PIPE)


class _OneTask(LocalExecutor):
    """The local executor, with as much machine as Ray gave to the task."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._guardian = _Guardian()

    def close(self) -> None:
        super().close()
        with contextlib.suppress(OSError):  # it holds output of local workers that belongs to no attempt
            self._logs.rmdir()


@dataclass(frozen=True)
class Setup:
    """What the attempts of a run need to know, beside their jobs; JSON."""

    run_id: str
    logs: str
    folder: str
    """To work in."""
    environment: dict[str, str]


class _Here:
    """What this process keeps between attempts."""

    executor: LocalExecutor | None = None
    setup: Setup | None = None


def attempt(job: Job, setup: Setup) -> Iterator[Event]:
    """Run one attempt to its end, yielding its news; the last is of kind "ended"."""
    problem = _problem(job)
    if problem:
        yield Event(job.id, "ended", Cause.EXCEPTION, problem)
        return
    executor = _executor(job, setup)
    ended = False
    try:
        executor.submit([job])
        while not ended:
            for event in executor.poll(TICK):
                ended = event.kind == "ended"
                # CUDA keeps memory on a GPU as long as its process lives, and Ray gives the GPU away now.
                if ended and job.resources.gpus:
                    _close()
                yield event
    finally:
        if not ended:
            _close()


def encoded(job: dict[str, Any], setup: dict[str, Any], node: str) -> Iterator[dict[str, Any]]:
    """`attempt` as Ray calls it: JSON in, JSON out. The name of the node comes with each event."""
    for event in attempt(Job.from_json(job), Setup(**setup)):
        yield {"event": wire.event_to_json(event), "node": node}


def _problem(job: Job) -> str:
    """Why this node cannot run the job at all; "" if it can."""
    host = socket.gethostname()
    deadline = time.monotonic() + VISIBLE_WITHIN
    while not job.log.parent.is_dir():
        if time.monotonic() > deadline:
            return (
                f"node {host} does not see {job.log.parent}: the store must lie on a file system that all nodes "
                "share, under the same path (OCVTP_ROOT or OCVTP_STORE name it)"
            )
        time.sleep(0.2)
    asked, given = job.resources.gpus, visible_gpus() if job.resources.gpus else ()
    if len(given) < asked:
        shown = os.environ.get("CUDA_VISIBLE_DEVICES")
        return f"Ray on node {host} gave {len(given)} of {asked} GPU(s): CUDA_VISIBLE_DEVICES is {shown!r}"
    return ""


def _executor(job: Job, setup: Setup) -> LocalExecutor:
    """The local executor of this process, with the machine that Ray set aside for the job."""
    if _Here.setup != setup:
        _close()
        os.environ.update(setup.environment)
        if Path(setup.folder).is_dir():
            os.chdir(setup.folder)
        _Here.setup = setup
    asked = job.resources
    if _Here.executor is None:
        logs = Path(setup.logs) / "workers" / f"{socket.gethostname()}-{os.getpid()}"
        config = ClusterConfig(workers=asked.cpus, memory_gb=asked.memory_gb)
        _Here.executor = _OneTask(Context(setup.run_id, logs, config))
    gpus = visible_gpus()[: asked.gpus] if asked.gpus else ()
    _Here.executor.machine = Machine(asked.cpus, asked.memory_gb, gpus)
    return _Here.executor


def _close() -> None:
    if _Here.executor is not None:
        _Here.executor.close()
        _Here.executor = None
