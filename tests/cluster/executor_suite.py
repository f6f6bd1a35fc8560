"""What every executor must do alike: 24 tasks, of which one is no good and five meet with an accident once.

`python executor_suite.py WORK [PROFILE]` runs them (CLUSTER_EXECUTOR says where) and writes WORK/report.json.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import cluster_jobs as jobs

import cluster
from cluster import ClusterConfig, Resources, Store, Task, run

FINE = 17
# How the attempts of the others end.
HISTORIES = {
    "raises": ["exception"],
    "killed": ["crashed", "done"],
    "killed from outside": ["crashed", "done"],
    "too much memory": ["oom", "done"],
    "no memory": ["oom", "done"],
    "preempted": ["preempted", "done"],
    "on a GPU": ["done"],
}


def victim(spec: dict[str, Any], folder: Path) -> None:
    """Waits in its first attempt, with a child, until somebody kills it."""
    path = Path(spec["pid"])
    if not path.exists():
        child = subprocess.Popen(["sleep", "600"])
        path.with_suffix(".new").write_text(f"{os.getpid()} {child.pid}")
        path.with_suffix(".new").rename(path)
        time.sleep(600)
    (folder / "alive").write_text("still")


def on_gpu(spec: dict[str, Any], folder: Path) -> None:
    """Says how many GPUs it sees."""
    seen = [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name]
    (folder / "gpus").write_text(str(len(seen)))


def preempted(spec: dict[str, Any], folder: Path) -> None:
    """Told to give way in its first attempt: what that one had done need not be done again."""
    checkpoint = folder / "resume" / "steps"
    done = int(checkpoint.read_text()) if checkpoint.exists() else 0
    first = done == 0
    try:
        while done < 20:
            done += 1
            if first and done == 10:
                os.kill(os.getpid(), signal.SIGTERM)
            cluster.progress(done, 20)
    except cluster.Stopped:
        checkpoint.parent.mkdir(exist_ok=True)
        checkpoint.write_text(str(done))
        raise
    (folder / "began").write_text("anew" if first else "at the checkpoint")


def tasks(work: Path) -> list[Task]:
    """The 24 tasks."""
    store = Store(work / "store")

    def one(name: str, call: Any, resources: Resources | None = None, **spec: Any) -> Task:
        spec = {"calls": str(work / f"calls {name}"), **spec}
        return store.task("accident", name, call, spec, resources=resources)

    fine = [store.task("square", f"square {x}", jobs.square, {"x": x, "seconds": 0.02}) for x in range(FINE)]
    accidents = [
        one("raises", jobs.raises),
        one("killed", jobs.killed, times=1),
        one("killed from outside", victim, pid=str(work / "victim")),
        one("too much memory", jobs.eats, Resources(memory_gb=0.5), megabytes=600, seconds=1.5),
        one("no memory", jobs.memory_error),
        one("preempted", preempted),
        one("on a GPU", on_gpu, Resources(gpus=1)),
    ]
    return [*accidents, *fine]


def _kill_victim(path: Path) -> None:
    while not path.exists():
        time.sleep(0.05)
    os.kill(int(path.read_text().split()[0]), signal.SIGKILL)


def main(folder: str, profile: str | None = None) -> int:
    work = Path(folder)
    threading.Thread(target=_kill_victim, args=(work / "victim",), daemon=True).start()
    values = {"store": str(work / "store"), "workers": 2} | ({"profile": profile} if profile else {})
    config = ClusterConfig.from_params(values)
    report = run(tasks(work), config=config, label="suite")
    outcomes = {
        outcome.task.name: {"cause": outcome.cause, "history": outcome.history, "detail": outcome.detail}
        for outcome in report.done + report.failed
    }
    counts = {kind: len(getattr(report, kind)) for kind in ("done", "failed", "skipped", "cancelled")}
    (work / "report.json").write_text(json.dumps({"outcomes": outcomes, **counts, "table": report.table()}))
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
