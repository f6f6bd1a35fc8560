"""What a Ray cluster's nodes have, and whether one of them can run a task."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from cluster.errors import BadConfig
from cluster.host.machine import GIB
from cluster.profiles import load_profile, nearest
from cluster.task import Resources

SCHEDULING = ("DEFAULT", "SPREAD")
SIZES = ("cpus", "gpus", "memory_gb")
ACCELERATOR = "accelerator_type:"  # Ray's prefix of the resource that names a node's GPUs


@dataclass(frozen=True)
class Node:
    """A node."""

    cpus: float
    gpus: float
    memory_gb: float
    extra: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of_ray(cls, resources: Mapping[str, float]) -> Node:
        """From an entry of `ray.nodes()`."""
        known = {"CPU", "GPU", "memory"}
        extra = {name: value for name, value in resources.items() if name not in known}
        memory = resources.get("memory", 0.0) / GIB
        return cls(resources.get("CPU", 0.0), resources.get("GPU", 0.0), memory, extra)

    def fits(self, asked: Resources, profile: Profile) -> bool:
        """Whether it could run such a task if it had nothing else to do."""
        if profile.accelerator_type and asked.gpus and ACCELERATOR + profile.accelerator_type not in self.extra:
            return False
        if any(self.extra.get(name, 0.0) < amount for name, amount in profile.resources.items()):
            return False
        # A retry with all the memory there is may differ from it by rounding.
        return asked.cpus <= self.cpus and asked.gpus <= self.gpus and asked.memory_gb <= self.memory_gb * (1 + 1e-9)

    def __str__(self) -> str:
        return f"{self.cpus:g} core(s), {self.gpus:g} GPU(s), {self.memory_gb:.1f} GB of memory"


@dataclass(frozen=True)
class Profile:
    """How to use a Ray cluster: a file of `cluster/ray/`."""

    address: str | None = None
    working_dir: str | None = None
    environment: dict[str, str] = field(default_factory=dict)
    resources: dict[str, float] = field(default_factory=dict)
    accelerator_type: str | None = None
    scheduling: str = "DEFAULT"
    largest_node: dict[str, float] | None = None
    patience_minutes: float = 10.0

    @classmethod
    def load(cls, name: str | None) -> Profile:
        """The profile of that name or path; that of `default.yaml` if None.

        Raises:
            BadConfig: an unknown key or an impossible value.
        """
        values: dict[str, Any] = load_profile("ray", name or "default")
        _check(values, f"Ray profile {name or 'default'}")
        return cls(**{one.name: values[one.name] for one in fields(cls) if values.get(one.name) is not None})

    @property
    def growth(self) -> list[Node]:
        """The largest node that the cluster may grow by, if it grows."""
        if self.largest_node is None:
            return []
        size = self.largest_node
        extra = dict.fromkeys(self.resources, float("inf"))
        if self.accelerator_type:
            extra[ACCELERATOR + self.accelerator_type] = 1.0
        return [Node(size.get("cpus", 0.0), size.get("gpus", 0.0), size.get("memory_gb", 0.0), extra)]


def _check(values: Mapping[str, Any], where: str) -> None:
    """Raise BadConfig for what the kinds of the default values do not tell."""
    for key in ("address", "working_dir", "accelerator_type"):
        if not (values[key] is None or (isinstance(values[key], str) and values[key])):
            raise BadConfig(f"{where}: {key} is {values[key]!r}: a text is needed")
    if values["scheduling"] not in SCHEDULING:
        raise BadConfig(f"{where}: scheduling is {values['scheduling']!r}: {' or '.join(SCHEDULING)}")
    if not 0 <= values["patience_minutes"] < math.inf:
        raise BadConfig(f"{where}: patience_minutes is {values['patience_minutes']!r}: a number, at least 0")
    for name, value in values["environment"].items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise BadConfig(f"{where}: environment.{name} is {value!r}: a text is needed (quote numbers)")
    for name, value in values["resources"].items():
        if not _is_amount(value) or value == 0:
            raise BadConfig(f"{where}: resources.{name} is {value!r}: a number greater than zero")
    size = values["largest_node"]
    if size is None:
        return
    if not isinstance(size, dict) or not size:
        raise BadConfig(f"{where}: largest_node is {size!r}: a mapping such as {{cpus: 32, gpus: 4, memory_gb: 200}}")
    for name, value in size.items():
        if name not in SIZES:
            raise BadConfig(f"{where}: unknown key largest_node.{name}: {nearest(str(name), SIZES)}")
        if not _is_amount(value):
            raise BadConfig(f"{where}: largest_node.{name} is {value!r}: a number, at least 0")
    for name in ("cpus", "memory_gb"):
        if not size.get(name):
            raise BadConfig(f"{where}: largest_node does not say how much {name} it has: no task would fit it")


def _is_amount(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def misfit(asked: Resources, nodes: Sequence[Node], profile: Profile) -> str | None:
    """Why no node can ever run such a task, as the rest of a sentence; None if one can."""
    if any(node.fits(asked, profile) for node in [*nodes, *profile.growth]):
        return None
    wanted = f"{asked.cpus} core(s), {asked.gpus} GPU(s) and {asked.memory_gb:g} GB of memory on one node"
    extra = [f"{amount:g} {name}" for name, amount in profile.resources.items()]
    if profile.accelerator_type and asked.gpus:
        extra.append(f"GPUs of type {profile.accelerator_type}")
    if extra:
        wanted += f", with {' and '.join(extra)} as its profile says"
    kinds = Counter(map(str, nodes))
    there = "; ".join(f"{count} with {kind}" for kind, count in kinds.items()) or "none"
    return (
        f"asks for {wanted}. Nodes there are: {there}. Ask for less, add such a node, or, if the cluster grows by "
        "itself, say in the profile how large its nodes get (largest_node)"
    )
