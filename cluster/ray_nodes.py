"""What a Ray cluster's nodes have, and whether one of them can run a task."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from cluster.machine import GIB
from cluster.profiles import load_profile
from cluster.task import Resources

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
