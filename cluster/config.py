"""The `cluster` section of the parameters: where work runs and how. Never what: no result depends on it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from cluster.executors import executor_names
from cluster.validation import Section, Text, nearest, settle, show

OnLocked = Literal["wait", "refuse"]
OVERRIDES = {"executor": "OCVTP_EXECUTOR", "store": "OCVTP_STORE"}
"""Environment variables, by the entry that each overrides."""


def _executor(name: str) -> str:
    if name not in executor_names():
        origin = f" ({OVERRIDES['executor']})" if os.environ.get(OVERRIDES["executor"]) == name else ""
        raise ValueError(f"{show(name)}{origin} is no executor{nearest(name, executor_names())}")
    return name


def _folder(value: object) -> object:
    if not isinstance(value, str | Path) or not str(value):
        raise ValueError(f"{show(value)} is not the path of a folder")
    return Path(value)


def _address(url: str) -> str:
    if "://" not in url:
        raise ValueError(f"{show(url)} is not the address of a folder, such as s3://bucket/ocvtp")
    return url


class ClusterConfig(Section):
    """How to run tasks."""

    executor: Annotated[str, AfterValidator(_executor)] = "local"
    """Which machines do the work: a name of `cluster.executors`."""
    store: Annotated[Path, BeforeValidator(_folder)] = Path(".ocvtp/store")
    """Folder of published results and logs."""
    profile: Text | None = None
    """How to use a Ray or SLURM cluster: a file of `cluster/ray/` or `cluster/slurm/`, or a path."""
    workers: Annotated[int, Field(ge=1)] | None = None
    """Cores to hand out on this machine; all it has if null."""
    memory_gb: Annotated[float, Field(gt=0)] | None = None
    """Memory to hand out on this machine; all it has if null."""
    remote: Annotated[str, AfterValidator(_address)] | None = None
    """Where `python -m cluster push` and `pull` keep published results besides, such as s3://bucket/results."""
    on_locked: OnLocked = "wait"
    """What a second run with the same label does."""
    tries: int = Field(default=3, ge=1)
    """Attempts of a task whose worker crashes or is lost."""
    preemptions: int = Field(default=10, ge=1)
    """Attempts of a task that is preempted, or runs out of time after having made progress."""
    lease_seconds: float = Field(default=60.0, gt=0)
    """A machine that cannot be reached and shows no sign of life for so long has lost its tasks."""

    @classmethod
    def from_params(cls, section: Mapping[str, Any] | None = None) -> ClusterConfig:
        """Read the section; the environment variables OCVTP_EXECUTOR and OCVTP_STORE override it.

        Raises:
            BadConfig: lists unknown keys, with the nearest legal ones, and impossible values.
        """
        return settle(cls, overridden(section or {}), "the configuration", "cluster")


def overridden(section: Mapping[str, Any]) -> dict[str, Any]:
    """The section with what the environment has instead."""
    return {**section, **{key: os.environ[name] for key, name in OVERRIDES.items() if os.environ.get(name)}}
