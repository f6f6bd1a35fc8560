"""Where work runs: tasks, their atomic publication, retries by cause, and the machines that do the work.

a task may run any number of times; its result is published at most once, whole, verified, under a name that
is a function of everything that determines it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluster.config import ClusterConfig as ClusterConfig
    from cluster.driver.report import Outcome as Outcome
    from cluster.driver.report import Report as Report
    from cluster.driver.runner import run as run
    from cluster.errors import BadConfig as BadConfig
    from cluster.errors import BadTask as BadTask
    from cluster.errors import CannotRun as CannotRun
    from cluster.errors import ClusterError as ClusterError
    from cluster.errors import CorruptResult as CorruptResult
    from cluster.errors import Fenced as Fenced
    from cluster.errors import Interrupted as Interrupted
    from cluster.errors import Locked as Locked
    from cluster.errors import Stopped as Stopped
    from cluster.errors import StoreUnavailable as StoreUnavailable
    from cluster.errors import TasksFailed as TasksFailed
    from cluster.protocol import Cause as Cause
    from cluster.results import Store as Store
    from cluster.store.publish import Manifest as Manifest
    from cluster.store.publish import adopt as adopt
    from cluster.store.publish import drop as drop
    from cluster.store.publish import is_published as is_published
    from cluster.store.publish import set_aside as set_aside
    from cluster.store.publish import verify as verify
    from cluster.task import Resources as Resources
    from cluster.task import Task as Task
    from cluster.worker.attempt import progress as progress

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
