"""How to use a Ray cluster, and which of its nodes can run a task."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import Field

from cluster.config import Profile
from cluster.host import GIB
from cluster.task import Resources
from cluster.validation import Section, Text

Node = Mapping[str, float]
"""What `ray.nodes()` calls the Resources of a node: its CPU, GPU, memory in bytes, and what else it offers."""


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

    def fitting(self, asked: Resources, nodes: Sequence[Node]) -> list[Node]:
        """Nodes, there or to be added, that could run such a task if they had nothing else to do."""
        needs = {"CPU": asked.cpus, "GPU": asked.gpus, "memory": asked.memory_gb * GIB, **self.resources}
        if self.accelerator_type and asked.gpus:
            needs[f"accelerator_type:{self.accelerator_type}"] = 1e-3  # Ray names a node's GPUs so
        size = self.largest_node
        if size is not None:
            nodes = [*nodes, {**needs, "CPU": size.cpus, "GPU": size.gpus, "memory": size.memory_gb * GIB}]
        # A retry with all the memory there is may differ from it by rounding.
        return [node for node in nodes if all(node.get(one, 0.0) * (1 + 1e-9) >= needs[one] for one in needs)]


def misfit(asked: Resources, nodes: Sequence[Node], profile: RayProfile) -> str | None:
    """Why no node can ever run such a task, as the rest of a sentence; None if one can."""
    if profile.fitting(asked, nodes):
        return None
    extra = [f"{amount:g} {name}" for name, amount in profile.resources.items()]
    if profile.accelerator_type and asked.gpus:
        extra.append(f"GPUs of type {profile.accelerator_type}")
    also = f", with {' and '.join(extra)} as its profile says" if extra else ""
    there = "; ".join(f"{count} with {kind}" for kind, count in Counter(map(_described, nodes)).items()) or "none"
    return (
        f"asks for {asked.cpus} core(s), {asked.gpus} GPU(s) and {asked.memory_gb:g} GB of memory on one node{also}. "
        f"Nodes there are: {there}. Ask for less, add such a node, or, if the cluster grows by itself, say in the "
        "profile how large its nodes get (largest_node)"
    )


def _described(node: Node) -> str:
    cpus, gpus, memory = (node.get(name, 0.0) for name in ("CPU", "GPU", "memory"))
    return f"{cpus:g} core(s), {gpus:g} GPU(s), {memory / GIB:.1f} GB of memory"
