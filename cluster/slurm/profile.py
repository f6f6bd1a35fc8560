"""How to use a SLURM cluster: a profile, and what sbatch is asked for a task."""

import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from cluster.config import Profile
from cluster.task import Resources
from cluster.validation import Text

_OURS = {"array", "job-name", "output", "error", "time", "mem", "cpus-per-task", "gres", "signal", "requeue",
         "no-requeue", "comment", "ntasks", "nodes"}  # fmt: skip


def _theirs(options: dict[str, Any]) -> dict[str, Any]:
    for key in options:
        if key.replace("_", "-") in _OURS:
            raise ValueError(f"{key} is set for each task, and not here")
    return options


class SlurmProfile(Profile):
    """A file of `cluster/slurm/`, where `default.yaml` explains each key."""

    kind = "slurm"
    partition: Text | None = None
    account: Text | None = None
    qos: Text | None = None
    constraint: Text | None = None
    exclude: Text | None = None
    gres: Text = "gpu"
    array_parallelism: int = Field(default=256, ge=1)
    max_jobs: int = Field(default=1000, ge=1)
    tasks_per_job: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    spare_memory_gb: float = Field(default=0.5, ge=0)
    signal_seconds: float = Field(default=90.0, ge=0)
    poll_seconds: float = Field(default=2.0, ge=0)
    lost_seconds: float = Field(default=30.0, ge=0)
    patience_minutes: float = Field(default=30.0, ge=0)
    setup: list[str] = Field(default=[])
    sbatch: Annotated[dict[str, Any], AfterValidator(_theirs)] = Field(default={})

    def _asks(self, asked: Resources) -> dict[str, Any]:
        """Of one job, as submitit names it. SLURM counts whole minutes, and tells the task to stop before they end."""
        found = self.model_dump(include={"partition", "account", "qos", "constraint", "exclude"}, exclude_none=True)
        if asked.gpus:
            found["gres"] = f"{self.gres}:{asked.gpus}"
        memory = math.ceil((asked.memory_gb + self.spare_memory_gb) * 1024)
        minutes = math.ceil(asked.minutes + self.signal_seconds / 60)
        found |= {"cpus_per_task": asked.cpus, "ntasks_per_node": 1, "nodes": 1}
        return {**found, "time": minutes, "mem": f"{memory}MB"}

    def parameters(self, asked: Resources) -> dict[str, Any]:
        """Of submitit's `SlurmExecutor`, for jobs that ask for as much."""
        extra = {key.replace("_", "-"): value for key, value in self.sbatch.items()}
        return {
            **self._asks(asked),
            "signal_delay_s": math.ceil(self.signal_seconds),
            "array_parallelism": self.array_parallelism,
            "additional_parameters": extra | {"no-requeue": True},  # `run` retries, under another attempt
        }

    def test_arguments(self, asked: Resources) -> list[str]:
        """For `sbatch --test-only`: whether such a job could ever run."""
        options = {key.replace("_", "-"): value for key, value in (self._asks(asked) | self.sbatch).items()}
        return [f"--{key}" if value is True else f"--{key}={value}" for key, value in options.items()]
