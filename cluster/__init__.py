"""Where work runs: tasks, their atomic publication, retries by cause, and the machines that do the work.

a task may run any number of times; its result is published at most once, whole, verified, under a name that
is a function of everything that determines it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluster.config import ClusterConfig
    from cluster.driver.report import Outcome, Report
    from cluster.driver.runner import run
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
    from cluster.results import Store
    from cluster.store.publish import Manifest, adopt, drop, is_published, set_aside, verify
    from cluster.task import Resources, Task
    from cluster.worker.attempt import progress

__all__ = [
    "BadConfig",
    "BadTask",
    "CannotRun",
    "Cause",
    "ClusterConfig",
    "ClusterError",
    "CorruptResult",
    "Fenced",
    "Interrupted",
    "Locked",
    "Manifest",
    "Outcome",
    "Report",
    "Resources",
    "Stopped",
    "Store",
    "StoreUnavailable",
    "Task",
    "TasksFailed",
    "adopt",
    "drop",
    "is_published",
    "progress",
    "run",
    "set_aside",
    "verify",
]
_HOMES = {
    "worker.attempt": "progress",
    "config": "ClusterConfig",
    "errors": "BadConfig BadTask CannotRun ClusterError CorruptResult Fenced Interrupted Locked Stopped"
    " StoreUnavailable TasksFailed",
    "protocol": "Cause",
    "store.publish": "Manifest adopt drop is_published set_aside verify",
    "driver.report": "Outcome Report",
    "driver.runner": "run",
    "results": "Store",
    "task": "Resources Task",
}


def __getattr__(name: str) -> Any:
    """Parts are imported when they are first used: a worker needs few, and each job of SLURM is a worker."""
    for module, names in _HOMES.items():
        if name in names.split():
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
