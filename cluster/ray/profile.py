"""How to use a Ray cluster, which of its nodes can run a task, and connecting to it.

That may be a given cluster, the one of this machine, or a private one.
"""

import logging
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from cluster.config import Profile
from cluster.errors import CannotRun
from cluster.host import GIB, Machine
from cluster.protocol import Context
from cluster.task import Resources
from cluster.validation import Section, Text

log = logging.getLogger(__name__)

PACKAGE = re.compile(r"(?P<root>.*/_ray_pkg_[0-9a-f]+)(/.*)?", re.DOTALL)  # Ray's copy of a working dir

Node = Mapping[str, float]  # what `ray.nodes()` calls its Resources: CPU, GPU, memory in bytes, and what else it offers


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
    also = "".join(f", {amount:g} {name}" for name, amount in profile.resources.items())
    also += f", GPUs of type {profile.accelerator_type}" if profile.accelerator_type and asked.gpus else ""
    has = [[node.get(name, 0.0) for name in ("CPU", "GPU", "memory")] for node in nodes]
    kinds = Counter(f"{cpu:g} core(s), {gpu:g} GPU(s), {size / GIB:.1f} GB of memory" for cpu, gpu, size in has)
    there = "; ".join(f"{count} with {kind}" for kind, count in kinds.items()) or "none"
    return (
        f"asks for {asked.cpus} core(s), {asked.gpus} GPU(s) and {asked.memory_gb:g} GB of memory{also} on one node. "
        f"Nodes there are: {there}. Ask for less, add such a node, or, if the cluster grows by itself, say in the "
        "profile how large its nodes get (largest_node)"
    )


def connect(context: Context, profile: RayProfile) -> tuple[Any, bool, str | None]:
    """(ray, whether the connection is ours, the folder that Ray copies to the nodes).

    As with `ray.init`: the address of the profile, else RAY_ADDRESS (a job that was submitted to a cluster has
    it), else the cluster that was started on this machine, else a private one that ends with this executor.
    """
    address = profile.address or os.environ.get("RAY_ADDRESS") or "auto"
    if "://" in address:
        raise CannotRun(f"{address} is the address of a Ray client server or dashboard: run the driver in the cluster, "
                        "with `ray job submit`, where it connects to HOST:6379 or `auto`")  # fmt: skip
    if address in ("auto", "local"):  # of this machine: what is started here listens on loopback only
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # read by Ray when it is imported
    import ray

    found = PACKAGE.fullmatch(str(Path.cwd()))  # as in a job that was submitted with a working dir
    root = found["root"] if found else None
    if ray.is_initialized():
        return ray, False, root
    runtime_env: dict[str, Any] | None = None
    if profile.working_dir is not None:
        if not Path(profile.working_dir).is_dir():
            raise CannotRun(f"the working dir {profile.working_dir} is not a folder")
        root, runtime_env = str(Path(profile.working_dir).absolute()), {"working_dir": profile.working_dir}
    _init(ray, context, address, runtime_env)
    return ray, True, root


def _init(ray: Any, context: Context, address: str, runtime_env: dict[str, Any] | None) -> None:
    options = {"log_to_driver": False, "logging_level": logging.WARNING, "runtime_env": runtime_env}
    if address != "local":
        try:
            ray.init(address=address, **options)
            return
        except (ConnectionError, ValueError, RuntimeError) as error:
            if address != "auto":
                raise CannotRun(f"cannot use the Ray cluster at {address}: {error}") from error
            log.info("there is no Ray cluster on this machine: starting a private one")
    machine = Machine.here(cpus=context.config.workers, memory_gb=context.config.memory_gb)
    ray.init(
        address="local",
        num_cpus=machine.cpus,
        num_gpus=len(machine.gpus),
        _memory=int(machine.memory_gb * GIB),
        object_store_memory=100 * 2**20,
        include_dashboard=False,
        **options,
    )
