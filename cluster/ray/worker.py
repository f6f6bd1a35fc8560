"""One attempt inside a Ray worker.

The call never runs in Ray's own process but in a local worker beside it, which serves one attempt after another. If
Ray's process dies, the local worker and its children die with it.
"""

import os
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.local.executor import Allotted
from cluster.protocol import Cause, Event, Job

VISIBLE_WITHIN = 10.0  # seconds a shared file system may take to show the folder of logs


class _Here:
    """What this process keeps between attempts of a run."""

    executor: Allotted | None = None
    logs: Path | None = None


def attempt(job: Mapping[str, Any], setup: Mapping[str, Any], node: str) -> Iterator[Event]:
    """Run one attempt to its end, yielding its news; the last is of kind "ended".

    Args:
        job: as `Job.from_json` reads it.
        setup: the `folder` to work in, variables (`environment`), and those by which the store is moved (`moved_by`).
        node: where this is; comes with each event.
    """
    for event in _attempt(Job.from_json(job), setup):
        yield replace(event, node=node)


def _attempt(job: Job, setup: Mapping[str, Any]) -> Iterator[Event]:
    logs, deadline = job.log.parent, time.monotonic() + VISIBLE_WITHIN
    while not logs.is_dir():
        if time.monotonic() > deadline:
            problem = (
                f"node {socket.gethostname()} does not see {logs}: the store must lie on a file system that all nodes "
                f"share, under the same path ({setup['moved_by']} names it)"
            )
            yield Event(job.id, "ended", Cause.EXCEPTION, problem)
            return
        time.sleep(0.2)
    executor = _executor(logs, setup)
    yield from executor.attempt(job)
    if job.resources.gpus:  # CUDA keeps memory on a GPU as long as its process lives, and Ray gives the GPU away now
        executor.release()


def _executor(logs: Path, setup: Mapping[str, Any]) -> Allotted:
    """What runs attempts in this process."""
    if _Here.executor is None or _Here.logs != logs:
        if _Here.executor is not None:
            _Here.executor.close()
        os.environ.update(setup["environment"])
        if Path(setup["folder"]).is_dir():
            os.chdir(setup["folder"])
        _Here.executor, _Here.logs = Allotted(logs), logs
    return _Here.executor
