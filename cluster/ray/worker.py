"""One attempt inside a Ray worker.

The call never runs in Ray's own process but in a local worker beside it, which serves one attempt after another. If
Ray's process dies, the local worker and its children die with it.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cluster.local.executor import Allotted
from cluster.protocol import Cause, Event, Job

VISIBLE_WITHIN = 10.0  # seconds a shared file system may take to show the folder of logs


class _Here:
    """What this process keeps between attempts."""

    executor: Allotted | None = None
    setup: Mapping[str, Any] = MappingProxyType({})


def attempt(job: Mapping[str, Any], setup: Mapping[str, Any], node: str) -> Iterator[dict[str, Any]]:
    """Run one attempt to its end, yielding its news; the last is of kind "ended". JSON in, JSON out.

    Args:
        job: as `Job.to_json` writes it.
        setup: what all attempts of a run need to know: `logs`, the `folder` to work in, and variables (`environment`);
            `moved_by` for a message.
        node: where this is; comes with each event.
    """
    for event in _attempt(Job.from_json(job), setup):
        yield {**event.to_json(), "node": node}


def _attempt(job: Job, setup: Mapping[str, Any]) -> Iterator[Event]:
    deadline = time.monotonic() + VISIBLE_WITHIN
    while not job.log.parent.is_dir():
        if time.monotonic() > deadline:
            problem = (
                f"node {socket.gethostname()} does not see {job.log.parent}: the store must lie on a file system that "
                f"all nodes share, under the same path ({setup['moved_by']} names it)"
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


def _executor(setup: Mapping[str, Any]) -> Allotted:
    """What runs attempts in this process."""
    if _Here.setup != setup:
        _close()
        os.environ.update(setup["environment"])
        if Path(setup["folder"]).is_dir():
            os.chdir(setup["folder"])
        _Here.setup = setup
    if _Here.executor is None:
        _Here.executor = Allotted(Path(setup["logs"]))
    return _Here.executor


def _close() -> None:
    if _Here.executor is not None:
        _Here.executor.close()
        _Here.executor = None
