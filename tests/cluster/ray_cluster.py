"""A real Ray cluster of three nodes with fake GPUs on this machine, listening on loopback only.

`running` starts it in a process of its own (this file as a script), which stops it, by pid, when its stdin closes.
As a pytest plugin it has the fixture `ray_server`, one cluster for all tests.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cluster_helpers import alive, descendants, kill, wait_for

NODES = 3
EACH = {"num_cpus": 1, "num_gpus": 1, "memory": 3 * 2**30, "object_store_memory": 80 * 2**20}


@dataclass
class ServerInfo:
    """How to reach the cluster."""

    environment: dict[str, str]
    profile: Path
    dashboard: str
    process: subprocess.Popen[str]
    raylets: list[int]

    def kill_node(self, index: int) -> None:
        """End a node at once, with all that runs on it. Node 0 is the head: without it there is no cluster."""
        assert index > 0
        raylet = self.raylets[index]
        # The raylet first: a node that dies has no time to say why its workers do.
        for pid in (raylet, *descendants(raylet)):
            kill(pid)
        wait_for(lambda: not alive(raylet))

    def add_node(self) -> None:
        """Another node, in place of one that was killed."""
        self.raylets.append(self.ask("add")["raylet"])

    def ask(self, command: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{command}\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer


def available() -> str | None:
    """Why there can be no cluster here; None if there can."""
    if sys.platform != "linux":
        return "Ray's processes are looked up in /proc"
    return None if importlib.util.find_spec("ray") else "Ray is not installed"


@contextlib.contextmanager
def running(folder: Path) -> Iterator[ServerInfo]:
    """A cluster, as long as the context lasts."""
    short = tempfile.mkdtemp(prefix="r")  # names of sockets are limited
    environment = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # so that nodes on 127.0.0.1 do not move to the outer interface
        "RAY_TMPDIR": short,
        "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "180",  # where other tests keep the cores busy
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_enable_metrics_collection": "0",  # nobody looks at them, and they keep two cores busy
    }
    with (folder / "cluster.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, __file__],
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line, (folder / "cluster.log").read_text()
        info = json.loads(line)
        profile = folder / "profile.yaml"
        profile.write_text(f"address: {info['address']}\nscheduling: SPREAD\n")
        yield ServerInfo(
            {**environment, "RAY_ADDRESS": info["address"]}, profile, info["dashboard"], process, info["raylets"]
        )
    finally:
        below = descendants(process.pid)  # those that the dashboard starts outlive it for a while
        process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        for pid in {*below, *processes_with(environment["RAY_AUTH_TOKEN"])}:
            kill(pid)
        process.wait()
        process.stdout.close()
        shutil.rmtree(short, ignore_errors=True)


def processes_with(text: str) -> list[int]:
    """Running processes that have `text` in their environment."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if text.encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
    return found


@pytest.fixture(scope="session")
def ray_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerInfo]:
    reason = available()
    if reason:
        if os.environ.get("CI"):
            pytest.fail(f"Ray cannot be tested, and must be in CI: {reason}")
        pytest.skip(f"NOT TESTED: {reason}")
    with running(tmp_path_factory.mktemp("ray")) as server:
        yield server


def _raylet(node: Any) -> int:
    pid: int = node.all_processes["raylet"][0].process.pid
    return pid


def main() -> None:
    """Start the cluster, say where it is, follow commands, stop it."""
    said, sys.stdout = sys.stdout, sys.stderr
    from ray.cluster_utils import Cluster

    ports = {"dashboard_port": 0, "dashboard_agent_listen_port": 0}  # any: other clusters may run on this machine
    head = {**EACH, **ports, "include_dashboard": True, "dashboard_host": "127.0.0.1"}
    for tries_left in (2, 1, 0):
        try:
            cluster = Cluster(initialize_head=True, head_node_args=head)
            break
        except Exception:  # Ray gives a node 30 s, which is little where other tests keep the cores busy
            if not tries_left:
                raise
    nodes = [cluster.add_node(wait=False, **EACH) for _ in range(1, NODES)]
    cluster.wait_for_nodes()
    raylets = [_raylet(node) for node in (cluster.head_node, *nodes)]
    answer = {"address": cluster.address, "dashboard": cluster.webui_url, "raylets": raylets}
    print(json.dumps(answer), file=said, flush=True)
    for line in sys.stdin:
        assert line.strip() == "add"
        node = cluster.add_node(wait=False, **EACH)
        print(json.dumps({"raylet": _raylet(node)}), file=said, flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main()
