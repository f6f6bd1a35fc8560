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
        ClusterError,
        Corrupt,
        Fenced,
        Interrupted,
        Locked,
        NotAvailable,
        Stopped,
        TasksFailed,
    )
    from cluster.protocol import Cause
    from cluster.store.publish import Manifest, adopt, is_published, quarantine, verify
    from cluster.store.store import Store, default_root
    from cluster.task import Resources, Task
    from cluster.worker.attempt import progress

__all__ = [
    "BadConfig",
    "BadTask",
    "Cause",
    "ClusterConfig",
    "ClusterError",
    "Corrupt",
    "Fenced",
    "Interrupted",
    "Locked",
    "Manifest",
    "NotAvailable",
    "Outcome",
    "Report",
    "Resources",
    "Stopped",
    "Store",
    "Task",
    "TasksFailed",
    "adopt",
    "default_root",
    "is_published",
    "progress",
    "quarantine",
    "run",
    "verify",
]
_HOMES = {
    "worker.attempt": "progress",
    "config": "ClusterConfig",
    "errors": "BadConfig BadTask ClusterError Corrupt Fenced Interrupted Locked NotAvailable Stopped TasksFailed",
    "protocol": "Cause",
    "store.publish": "Manifest adopt is_published quarantine verify",
    "driver.report": "Outcome Report",
    "driver.runner": "run",
    "store.store": "Store default_root",
    "task": "Resources Task",
}


def __getattr__(name: str) -> Any:
    """Parts are imported when they are first used: a worker needs few, and each job of SLURM is a worker."""
    for module, names in _HOMES.items():
        if name in names.split():
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
