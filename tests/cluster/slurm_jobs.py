"""Calls and a driver for the tests on SLURM: `python slurm_jobs.py STORE PROFILE CALLS SECONDS COUNT`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import cluster_jobs as jobs

import cluster
from cluster import ClusterConfig, Interrupted, Resources, Store, Task, run

SMALL = Resources(memory_gb=0.3, minutes=5)


def steps(spec: dict[str, Any], folder: Path) -> None:
    """40 steps of 0.1 s. Told to stop, it notes how far it is, and the next attempt goes on there."""
    checkpoint = folder / "resume" / "steps.json"
    done = json.loads(checkpoint.read_text()) if checkpoint.exists() else []
    with Path(spec["calls"]).open("a") as file:
        file.write(f"{len(done)}\n")
    attempt = len(Path(spec["calls"]).read_text().splitlines())
    try:
        while len(done) < spec.get("steps", 40):
            time.sleep(0.1)
            done.append(attempt)
            cluster.progress(len(done), 40)
    except KeyboardInterrupt:
        checkpoint.parent.mkdir(exist_ok=True)
        checkpoint.write_text(json.dumps(done))
        raise
    (folder / "steps.json").write_text(json.dumps(done))


def squares(store: Store, calls: Path, seconds: float, count: int) -> list[Task]:
    return [
        store.task("square", f"square {x}", jobs.count_calls, {"x": x, "calls": str(calls), "seconds": seconds},
                   resources=SMALL)
        for x in range(count)
    ]  # fmt: skip


def main(root: str, profile: str, calls: str, seconds: str, count: str) -> int:
    store = Store(Path(root))
    config = ClusterConfig.from_params({"store": root, "executor": "slurm", "profile": profile})
    try:
        report = run(squares(store, Path(calls), float(seconds), int(count)), config=config)
    except Interrupted as interrupted:
        return interrupted.exit_code
    sys.stdout.write(f"{len(report.done)} {len(report.skipped)}\n")
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
