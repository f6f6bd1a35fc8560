"""A driver of its own process: `python cluster_driver.py STORE CALLS SECONDS COUNT LABEL [ON_LOCKED]`."""

from __future__ import annotations

import sys
from pathlib import Path

import cluster_jobs as jobs

from cluster import ClusterConfig, Interrupted, Locked, Store, run


def main(root: str, calls: str, seconds: str, count: str, label: str, on_locked: str = "wait") -> int:
    store = Store(Path(root))
    tasks = [
        store.task("square", f"square {x}", jobs.count_calls, {"x": x, "calls": calls, "seconds": float(seconds)})
        for x in range(int(count))
    ]
    if label == "hang":
        spec = {"calls": calls, "pids": f"{calls}.pids"}
        tasks = [store.task("hangs", "hangs", jobs.hangs, spec), *tasks]
    tries = 10 if label == "chaos" else 3
    config = ClusterConfig.from_params({"store": root, "workers": 2, "on_locked": on_locked, "tries": tries})
    try:
        report = run(tasks, config=config, label=label)
    except Interrupted as interrupted:
        return interrupted.exit_code
    except Locked as locked:
        sys.stderr.write(f"{locked}\n")
        return 75
    sys.stdout.write(f"{len(report.done)} {len(report.skipped)}\n")
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
