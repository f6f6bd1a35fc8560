"""Where work runs: tasks, their atomic publication, retries by cause, and the machines that do the work.

a task may run any number of times; its result is published at most once, whole, verified, under a name that
is a function of everything that determines it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cluster.errors import (
    BadConfig,
    BadTask,
    CannotRun,
    ClusterError,
    CorruptResult,
    Fenced,
    Interrupted,
    Locked,
    Stopped,
    StoreUnavailable,
    TasksFailed,
)
from cluster.protocol import Cause
from cluster.store.layout import is_published
from cluster.store.publish import Manifest, drop, set_aside, verify
from cluster.task import Resources, Store, Task
from cluster.worker.attempt import progress

if TYPE_CHECKING:
    from cluster.config import ClusterConfig
    from cluster.driver.board import Outcome, Report
    from cluster.driver.runner import run

__all__ = [
    "BadConfig", "BadTask", "CannotRun", "Cause", "ClusterConfig", "ClusterError", "CorruptResult", "Fenced",
    "Interrupted", "Locked", "Manifest", "Outcome", "Report", "Resources", "Stopped", "Store", "StoreUnavailable",
    "Task", "TasksFailed", "drop", "is_published", "progress", "run", "set_aside", "verify",
]  # fmt: skip

_OF_DRIVERS = {"ClusterConfig": "config", "Outcome": "driver.board", "Report": "driver.board", "run": "driver.runner"}


def __getattr__(name: str) -> Any:
    """What workers have no use for is imported when it is first used: each job of SLURM is a worker."""
    if name not in _OF_DRIVERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_OF_DRIVERS[name]}"), name)
