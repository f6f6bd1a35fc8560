"""Where work runs and how: the `cluster` section of the parameters, and profiles. Never what: no result depends on it.

A profile says how to use a cluster, in a file of `cluster/ray/` or `cluster/slurm/`, or of one's own. `default.yaml` of
each has every legal key, explained, with its default. A profile names those that differ.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator

from cluster.errors import BadConfig
from cluster.validation import Section, Text, load_yaml, nearest, settle, show

EXECUTORS: dict[str, str] = {
    "local": "cluster.local.executor:LocalExecutor",
    "ray": "cluster.ray.executor:RayExecutor",
    "slurm": "cluster.slurm.executor:SlurmExecutor",
}
"""module:class of every executor of this version; imported when asked for: its packages are not needed before."""
OnLocked = Literal["wait", "refuse"]


class ClusterConfig(Section):
    """How to run tasks. An application names itself, and what its tasks need to see, in a subclass."""

    # The names of jobs begin with it and, in capitals, those of the environment variables that override entries.
    application: ClassVar[str] = "cluster"
    # How variables begin, beside the application's own, that tasks on other machines see too.
    passed_on: ClassVar[tuple[str, ...]] = ()
    moved_by: ClassVar[str] = "CLUSTER_STORE"  # the variables that put the store elsewhere, for messages

    executor: str = "local"  # which machines do the work: a key of `EXECUTORS`
    store: Path = Path(".cluster/store")  # folder of published results and logs
    profile: Text | None = None  # of a Ray or SLURM cluster: a file of `cluster/ray/` or `cluster/slurm/`, or a path
    workers: Annotated[int, Field(ge=1)] | None = None  # cores to hand out on this machine; all it has if null
    memory_gb: Annotated[float, Field(gt=0)] | None = None  # likewise
    on_locked: OnLocked = "wait"  # what a second run with the same label does
    tries: int = Field(default=3, ge=1)  # attempts of a task whose worker crashes or is lost
    preemptions: int = Field(default=10, ge=1)  # of one that is preempted, or out of time after having made progress
    # A machine that cannot be reached and shows no sign of life for so long has lost its tasks.
    lease_seconds: float = Field(default=60.0, gt=0)

    @classmethod
    def from_params(cls, section: Mapping[str, Any] | None = None) -> Self:
        """The section as `overridden`; `BadConfig` lists unknown keys, with the nearest legal ones, and bad values."""
        return settle(cls, cls.overridden(section or {}), "the configuration", "cluster")

    @classmethod
    def overridden(cls, section: Mapping[str, Any]) -> dict[str, Any]:
        """The section with what the environment has instead: CLUSTER_EXECUTOR, CLUSTER_STORE."""
        found = {entry: os.environ.get(f"{cls.application}_{entry}".upper()) for entry in ("executor", "store")}
        return {**section, **{entry: value for entry, value in found.items() if value}}

    @field_validator("executor")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in EXECUTORS:
            variable = f"{cls.application}_executor".upper()
            origin = f" ({variable})" if os.environ.get(variable) == name else ""
            raise ValueError(f"{show(name)}{origin} is no executor{nearest(name, sorted(EXECUTORS))}")
        return name

    @field_validator("store", mode="before")
    @classmethod
    def _folder(cls, value: object) -> object:
        if not isinstance(value, str | Path) or not str(value):
            raise ValueError(f"{show(value)} is not the path of a folder")
        return Path(value)


class Profile(Section):
    """The keys of a kind of profile."""

    kind: ClassVar[str]

    @classmethod
    def load(cls, name: str | None) -> Self:
        """The profile of that name, or in the YAML file of that path; the defaults if None.

        `BadConfig` says that there is none, that it is not YAML, or all unknown keys and impossible values in it.
        """
        if name is None:
            return cls()
        path = Path(name)
        if path.suffix not in (".yaml", ".yml") and len(path.parts) == 1:
            files = (Path(__file__).parent / cls.kind).glob("*.yaml")
            known = {file.stem: file for file in sorted(files) if file.stem != "cluster"}
            if name not in known:
                raise BadConfig(f"cluster.profile: there is no {cls.kind} profile {name!r}{nearest(name, known)}; "
                                "a path of your own ends with .yaml")  # fmt: skip
            path = known[name]
        elif not path.is_file():
            raise BadConfig(f"cluster.profile: there is no file {name}")
        return settle(cls, load_yaml(path), str(path))
