"""What a Ray cluster's nodes have, and whether one of them can run a task."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal, Self

from pydantic import Field

from cluster.host.machine import GIB
from cluster.profiles import Profile
from cluster.task import Resources
from cluster.validation import Section, Text

ACCELERATOR = "accelerator_type:"  # Ray's prefix of the resource that names a node's GPUs


@dataclass(frozen=True)
class Node:
    """A node."""

    cpus: float
    gpus: float
    memory_gb: float
    extra: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of_ray(cls, resources: Mapping[str, float]) -> Self:
        """From an entry of `ray.nodes()`."""
        extra = {name: value for name, value in resources.items() if name not in ("CPU", "GPU", "memory")}
        return cls(resources.get("CPU", 0.0), resources.get("GPU", 0.0), resources.get("memory", 0.0) / GIB, extra)

    def fits(self, asked: Resources, profile: "RayProfile") -> bool:
        """Whether it could run such a task if it had nothing else to do."""
        if any(self.extra.get(name, 0.0) < amount for name, amount in profile.needs(asked).items()):
            return False
        # A retry with all the memory there is may differ from it by rounding.
        return asked.cpus <= self.cpus and asked.gpus <= self.gpus and asked.memory_gb <= self.memory_gb * (1 + 1e-9)

    def __str__(self) -> str:
        return f"{self.cpus:g} core(s), {self.gpus:g} GPU(s), {self.memory_gb:.1f} GB of memory"


class LargestNode(Section):
    """Of a cluster that grows by itself. Without cores or memory no task would fit it."""

    cpus: float = Field(gt=0)
    gpus: float = Field(default=0.0, ge=0)
    memory_gb: float = Field(gt=0)


class RayProfile(Profile):
    """How to use a Ray cluster: a file of `cluster/ray/`, where `default.yaml` explains each key."""

    kind = "ray"
    address: Text | None = None
    working_dir: Text | None = None
    environment: dict[str, str] = Field(default={})
    resources: dict[str, Annotated[float, Field(gt=0)]] = Field(default={})
    accelerator_type: Text | None = None
    scheduling: Literal["DEFAULT", "SPREAD"] = "DEFAULT"
    largest_node: LargestNode | None = None
    patience_minutes: float = Field(default=10.0, ge=0)

    def needs(self, asked: Resources) -> dict[str, float]:
        """Resources that a task needs on its node beside cores, GPUs and memory; of a type of GPU a trace will do."""
        kind = {f"{ACCELERATOR}{self.accelerator_type}": 1e-3} if self.accelerator_type and asked.gpus else {}
        return self.resources | kind

    def growth(self, asked: Resources) -> list[Node]:
        """The largest node that the cluster may grow by, if it grows."""
        size = self.largest_node
        return [Node(size.cpus, size.gpus, size.memory_gb, self.needs(asked))] if size else []


def misfit(asked: Resources, nodes: Sequence[Node], profile: RayProfile) -> str | None:
    """Why no node can ever run such a task, as the rest of a sentence; None if one can."""
    if any(node.fits(asked, profile) for node in [*nodes, *profile.growth(asked)]):
        return None
    extra = [f"{amount:g} {name}" for name, amount in profile.resources.items()]
    if profile.accelerator_type and asked.gpus:
        extra.append(f"GPUs of type {profile.accelerator_type}")
    also = f", with {' and '.join(extra)} as its profile says" if extra else ""
    there = "; ".join(f"{count} with {kind}" for kind, count in Counter(map(str, nodes)).items()) or "none"
    return (
        f"asks for {asked.cpus} core(s), {asked.gpus} GPU(s) and {asked.memory_gb:g} GB of memory on one node{also}. "
        f"Nodes there are: {there}. Ask for less, add such a node, or, if the cluster grows by itself, say in the "
        "profile how large its nodes get (largest_node)"
    )
