"""One small task, and its publication."""

from __future__ import annotations

import cluster_jobs as jobs
from cluster_helpers import job_of

from cluster import Store, Task
from cluster.protocol import Event
from cluster.worker.attempt import perform


def silent(event: Event) -> None:
    """Nobody listens."""


def square(store: Store, x: int = 3) -> Task:
    return store.task("square", f"square {x}", jobs.square, {"x": x})


def publish(task: Task) -> Event:
    return perform(job_of(task), silent)
