"""How to use a SLURM cluster: a profile as a dataclass, and what sbatch is asked for a task."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from cluster.errors import BadConfig
from cluster.profiles import load_profile
from cluster.task import Resources

_PLAIN = ("partition", "account", "qos", "constraint", "exclude")
_OURS = {"array", "job-name", "output", "error", "time", "mem", "cpus-per-task", "gres", "signal", "requeue",
         "no-requeue", "comment", "ntasks", "nodes"}  # fmt: skip


@dataclass(frozen=True)
class Profile:
    """A file of `cluster/slurm/`, where each key is explained."""

    partition: str | None
    account: str | None
    qos: str | None
    constraint: str | None
    exclude: str | None
    gres: str
    array_parallelism: int
    max_jobs: int
    tasks_per_job: int | str
    spare_memory_gb: float
    signal_seconds: float
    poll_seconds: float
    lost_seconds: float
    patience_minutes: float
    setup: list[str]
    sbatch: dict[str, Any]

    @classmethod
    def load(cls, name: str | None) -> Profile:
        """The profile of that name or path.

        Raises:
            BadConfig: an unknown key or an impossible value.
        """
        values = load_profile("slurm", name)
        where = f"SLURM profile {name or 'default'}"
        for key in _PLAIN:
            if values[key] is not None and not isinstance(values[key], str):
                raise BadConfig(f"{where}: {key} is {values[key]!r}: a text is needed")
        for key in ("array_parallelism", "max_jobs"):
            if not isinstance(values[key], int) or values[key] < 1:
                raise BadConfig(f"{where}: {key} is {values[key]!r}: a whole number, at least 1")
        per_job = values["tasks_per_job"]
        if per_job != "auto" and (isinstance(per_job, bool) or not isinstance(per_job, int) or per_job < 1):
            raise BadConfig(f"{where}: tasks_per_job is {per_job!r}: auto, or a whole number, at least 1")
        for key in ("poll_seconds", "lost_seconds", "patience_minutes", "signal_seconds", "spare_memory_gb"):
            if not 0 <= values[key] < math.inf:
                raise BadConfig(f"{where}: {key} is {values[key]!r}: a number, at least 0")
        if not all(isinstance(line, str) for line in values["setup"]):
            raise BadConfig(f"{where}: setup is {values['setup']!r}: a list of lines is needed")
        for key in values["sbatch"]:
            if str(key).replace("_", "-") in _OURS:
                raise BadConfig(f"{where}: sbatch.{key} is set by ocvtp itself, for each task")
        return cls(**{field.name: values[field.name] for field in fields(cls)})

    def memory_mb(self, asked: Resources) -> int:
        """Of a job."""
        return math.ceil((asked.memory_gb + self.spare_memory_gb) * 1024)

    def minutes(self, asked: Resources) -> int:
        """Of a job: SLURM counts whole ones, and tells the task to stop before they are over."""
        return math.ceil(asked.minutes + self.signal_seconds / 60)

    def parameters(self, asked: Resources) -> dict[str, Any]:
        """Of submitit's `SlurmExecutor`, for jobs that ask for as much."""
        extra: dict[str, Any] = {str(key).replace("_", "-"): value for key, value in self.sbatch.items()}
        extra["no-requeue"] = True  # `run` retries, under another attempt
        found: dict[str, Any] = {key: getattr(self, key) for key in _PLAIN if getattr(self, key) is not None}
        if asked.gpus:
            found["gres"] = f"{self.gres}:{asked.gpus}"
        return {
            **found,
            "time": self.minutes(asked),
            "mem": f"{self.memory_mb(asked)}MB",
            "cpus_per_task": asked.cpus,
            "ntasks_per_node": 1,
            "nodes": 1,
            "signal_delay_s": math.ceil(self.signal_seconds),
            "array_parallelism": self.array_parallelism,
            "additional_parameters": extra,
        }

    def test_arguments(self, asked: Resources) -> list[str]:
        """For `sbatch --test-only`: whether such a job could ever run."""
        found = [f"--{key}={getattr(self, key)}" for key in _PLAIN if getattr(self, key) is not None]
        if asked.gpus:
            found.append(f"--gres={self.gres}:{asked.gpus}")
        for key, value in self.sbatch.items():
            flag = f"--{str(key).replace('_', '-')}"
            found.append(flag if value is True else f"{flag}={value}")
        return [
            *found, f"--time={self.minutes(asked)}", f"--mem={self.memory_mb(asked)}M", "--nodes=1", "--ntasks=1",
            f"--cpus-per-task={asked.cpus}",
        ]  # fmt: skip
