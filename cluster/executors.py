"""The executors of this version, by name: the one list."""

from cluster.errors import CannotRun

# module:class of every executor; imported when asked for, so that its packages are not needed before.
EXECUTORS: dict[str, str] = {
    "local": "cluster.local.executor:LocalExecutor",
    "ray": "cluster.ray.executor:RayExecutor",
    "slurm": "cluster.slurm.executor:SlurmExecutor",
}


def check_executor(name: str) -> None:
    """Raise `CannotRun` unless there is an executor of that name."""
    if name not in EXECUTORS:
        raise CannotRun(f"there is no executor {name!r}: this version has {', '.join(sorted(EXECUTORS))}")
