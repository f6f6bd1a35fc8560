"""The `cluster` section of the parameters: where work runs and how. Never what: no result depends on it."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from cluster.errors import BadConfig
from cluster.protocol import executor_names

OnLocked = Literal["wait", "refuse"]


@dataclass(frozen=True)
class ClusterConfig:
    """How to run tasks."""

    executor: str = "local"
    """Which machines do the work: a name of the registry in `cluster.protocol`."""
    store: Path = Path(".ocvtp/store")
    """Folder of published results and logs."""
    profile: str | None = None
    """How to use a Ray or SLURM cluster: a file of `cluster/ray/` or `cluster/slurm/`, or a path."""
    workers: int | None = None
    """Cores to hand out on this machine; all it has if null."""
    memory_gb: float | None = None
    """Memory to hand out on this machine; all it has if null."""
    remote: str | None = None
    """Where `python -m cluster push` and `pull` keep published results besides, such as s3://bucket/results."""
    on_locked: OnLocked = "wait"
    """What a second run with the same label does."""
    tries: int = 3
    """Attempts of a task whose worker crashes or is lost."""
    preemptions: int = 10
    """Attempts of a task that is preempted, or runs out of time after having made progress."""
    lease_seconds: float = 60.0
    """A machine that cannot be reached and shows no sign of life for so long has lost its tasks."""

    def __post_init__(self) -> None:
        if self.executor not in executor_names():
            raise BadConfig(f"cluster.executor is {_unknown(self.executor)}")
        if not isinstance(self.store, str | Path) or not str(self.store):
            raise BadConfig(f"cluster.store is {self.store!r}: the path of a folder")
        object.__setattr__(self, "store", Path(self.store))
        if self.profile is not None and (not isinstance(self.profile, str) or not self.profile):
            raise BadConfig(f"cluster.profile is {self.profile!r}: the name of a profile, or the path of a YAML file")
        if self.remote is not None and (not isinstance(self.remote, str) or "://" not in self.remote):
            raise BadConfig(f"cluster.remote is {self.remote!r}: the address of a folder, such as s3://bucket/ocvtp")
        if self.on_locked not in get_args(OnLocked):
            raise BadConfig(f"cluster.on_locked is {self.on_locked!r}: {' or '.join(get_args(OnLocked))}")
        for name, value in (
            ("tries", self.tries),
            ("preemptions", self.preemptions),
            ("workers", self.workers),
        ):
            if name == "workers" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise BadConfig(f"cluster.{name} is {value!r}: a whole number, at least 1")
        for name, number in (("lease_seconds", self.lease_seconds), ("memory_gb", self.memory_gb)):
            if name == "memory_gb" and number is None:
                continue
            if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number < math.inf:
                raise BadConfig(f"cluster.{name} is {number!r}: a number greater than zero")

    @classmethod
    def from_params(cls, section: Mapping[str, Any] | None = None) -> ClusterConfig:
        """Read the section; the environment variables OCVTP_EXECUTOR and OCVTP_STORE override it.

        Raises:
            BadConfig: an unknown key (the nearest legal one is named) or an impossible value.
        """
        values = dict(section or {})
        legal = [field.name for field in fields(cls)]
        for key in values:
            if key not in legal:
                near = difflib.get_close_matches(str(key), legal, n=1, cutoff=0.5)
                hint = f"did you mean cluster.{near[0]}?" if near else f"legal keys: {', '.join(legal)}"
                raise BadConfig(f"unknown key cluster.{key}: {hint}")
        for key, variable in (("executor", "OCVTP_EXECUTOR"), ("store", "OCVTP_STORE")):
            if os.environ.get(variable):
                values[key] = os.environ[variable]
                if key == "executor" and values[key] not in executor_names():
                    raise BadConfig(f"{variable} is {_unknown(values[key])}")
        return cls(**values)


def _unknown(executor: object) -> str:
    near = difflib.get_close_matches(str(executor), executor_names(), n=1, cutoff=0.5)
    return f"{executor!r}{f': did you mean {near[0]!r}?' if near else ';'} legal: {', '.join(executor_names())}"
