"""One attempt inside a Ray worker.

The call never runs in Ray's own process but in a local worker beside it, which serves one attempt after another. If
Ray's process dies, the local worker and its children die with it.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.local.executor import Allotted
from cluster.protocol import Cause, Event, Job

VISIBLE_WITHIN = 10.0  # seconds a shared file system may take to show the folder of logs


@dataclass(frozen=True)
class Setup:
    """What the attempts of a run need to know, beside their jobs; JSON."""

    logs: str
    folder: str
    """To work in."""
    environment: dict[str, str]


class _Here:
    """What this process keeps between attempts."""

    executor: Allotted | None = None
    setup: Setup | None = None


def attempt(job: Job, setup: Setup) -> Iterator[Event]:
    """Run one attempt to its end, yielding its news; the last is of kind "ended"."""
    deadline = time.monotonic() + VISIBLE_WITHIN
    while not job.log.parent.is_dir():
        if time.monotonic() > deadline:
            problem = (
                f"node {socket.gethostname()} does not see {job.log.parent}: the store must lie on a file system that "
                "all nodes share, under the same path (OCVTP_ROOT or OCVTP_STORE name it)"
            )
            yield Event(job.id, "ended", Cause.EXCEPTION, problem)
            return
        time.sleep(0.2)
    ended = False
    try:
        for event in _executor(setup).attempt(job):
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
        yield {**event.to_json(), "node": node}


def _executor(setup: Setup) -> Allotted:
    """What runs attempts in this process."""
    if _Here.setup != setup:
        _close()
        os.environ.update(setup.environment)
        if Path(setup.folder).is_dir():
            os.chdir(setup.folder)
        _Here.setup = setup
    if _Here.executor is None:
        _Here.executor = Allotted(Path(setup.logs))
    return _Here.executor


def _close() -> None:
    if _Here.executor is not None:
        _Here.executor.close()
        _Here.executor = None
