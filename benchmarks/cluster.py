"""What the fan-out costs: each executor against its bare engine, planning, and the use of two cores.

    python benchmarks/cluster.py                 # local and Ray: about five minutes on two cores
    python benchmarks/cluster.py --slurm         # also SLURM: the cluster of this machine, or, as root where SLURM is
                                                 # installed and none runs, a virtual one of three nodes
    python benchmarks/cluster.py --quick         # few tasks, to see that it runs

Rivals take turns within one run. What ours do beyond the engine: attempts with a lease, a checksummed manifest, fsync
and one rename for each result, logs, retries. Times are from the call to the last result, the start of workers
included. Needs cluster, and ray and submitit for their parts.
"""

import argparse
import contextlib
import logging
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # `cluster` is the package, not this file
    sys.path[:1] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import cluster_work
from machine import add_output, heading, machine, say

from cluster import ClusterConfig, Store, Task, run
from cluster.driver.plan import check_tasks
from cluster.store.publish import About, publish
from cluster.store.workspace import Workspace

SLURM_SECONDS = (0.05, 1.0)  # of a task; a job is not worth its place in the queue for less
HERE = Path(__file__).resolve().parent


def tasks(store: Store, call: str, count: int, seconds: float) -> list[Task]:
    work = getattr(cluster_work, call)
    return [store.task("bench", f"{x}", work, {"x": x, "seconds": seconds}, code="1") for x in range(count)]


def ours(folder: Path, executor: str, call: str, count: int, seconds: float, **config: Any) -> float:
    """Seconds of a run."""
    made = tasks(Store(folder / "store"), call, count, seconds)
    start = time.perf_counter()
    report = run(made, config=ClusterConfig(executor=executor, store=folder / "store", **config))
    took = time.perf_counter() - start
    assert len(report.done) == count, report.table()
    return took


def pool(folder: Path, call: str, count: int, seconds: float, workers: int) -> float:
    """Seconds of concurrent.futures."""
    start = time.perf_counter()
    with ProcessPoolExecutor(workers) as bare:
        waiting = [
            bare.submit(cluster_work.plain, call, {"x": x, "seconds": seconds}, f"{folder}/{x}") for x in range(count)
        ]
        for one in waiting:
            one.result()
    return time.perf_counter() - start


def in_turns(rounds: int, rivals: dict[str, Callable[[Path], float]]) -> dict[str, list[float]]:
    """Seconds of each rival in each round, each time in an empty folder."""
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(rounds):
        for name, rival in rivals.items():
            with tempfile.TemporaryDirectory() as folder:
                times[name].append(rival(Path(folder)))
    return times


def row(name: str, rival: str, count: int, seconds: float, times: dict[str, list[float]]) -> dict[str, Any]:
    bare, with_us = (statistics.median(times[which]) for which in ("bare", "ours"))
    return {"executor": name, "rival": rival, "tasks": count, "task_seconds": seconds, "bare": bare, "ours": with_us,
            "ratio": with_us / bare, "rounds": times}  # fmt: skip


def local(count: int, seconds: float, rounds: int, workers: int) -> dict[str, Any]:
    times = in_turns(rounds, {
        "bare": lambda folder: pool(folder, "wait", count, seconds, workers),
        "ours": lambda folder: ours(folder, "local", "wait", count, seconds, workers=workers),
    })  # fmt: skip
    return row("local", "ProcessPoolExecutor", count, seconds, times)


def ray(count: int, seconds: float, rounds: int, workers: int) -> dict[str, Any]:
    """Both on one cluster, which is up before."""
    import ray as engine

    engine.init(num_cpus=workers, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False,
                object_store_memory=100 * 2**20)  # fmt: skip
    remote = engine.remote(cluster_work.plain)

    def bare(folder: Path) -> float:
        start = time.perf_counter()
        spec = [({"x": x, "seconds": seconds}, f"{folder}/{x}") for x in range(count)]
        engine.get([remote.remote("wait", *each) for each in spec])
        return time.perf_counter() - start

    try:
        times = in_turns(1 + rounds, {
            "bare": bare,
            "ours": lambda folder: ours(folder, "ray", "wait", count, seconds),
        })  # fmt: skip
    finally:
        engine.shutdown()
    kept = {name: taken[1:] for name, taken in times.items()}  # in the first round both start workers
    return row("ray", "ray.remote", count, seconds, kept)


def slurm(count: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Against an array of sbatch, and against map_array of submitit."""
    with slurm_cluster() as profile:
        for seconds in SLURM_SECONDS:
            times = in_turns(rounds, {
                "bare": lambda folder, seconds=seconds: sbatch_array(folder, count, seconds),
                "submitit": lambda folder, seconds=seconds: map_array(folder, count, seconds),
                "ours": lambda folder, seconds=seconds: ours(folder, "slurm", "wait", count, seconds, profile=profile),
            })  # fmt: skip
            yield row("slurm", "sbatch --array", count, seconds, times)
            submitit = {"bare": times["submitit"], "ours": times["ours"]}
            yield row("slurm", "submitit map_array", count, seconds, submitit)


@contextlib.contextmanager
def slurm_cluster() -> Iterator[str | None]:
    """The cluster of this machine, or a virtual one; the profile to use."""
    if shutil.which("sinfo") and subprocess.run(["sinfo"], capture_output=True, check=False).returncode == 0:
        yield None
        return
    sys.path.insert(0, str(HERE.parent / "tests" / "cluster"))
    import slurm_cluster as virtual

    reason = virtual.available()
    if reason:
        raise SystemExit(f"no SLURM to measure: {reason}")
    with tempfile.TemporaryDirectory() as folder, virtual.running(Path(folder), max_array=1001) as server:
        os.environ.update(server.environment)
        yield str(server.profile)


def sbatch_array(folder: Path, count: int, seconds: float) -> float:
    command = (
        f"{sys.executable} {HERE / 'cluster_work.py'} $SLURM_ARRAY_TASK_ID {seconds} {folder}/$SLURM_ARRAY_TASK_ID"
    )
    start = time.perf_counter()
    submitted = subprocess.run(
        ["sbatch", "--parsable", f"--array=0-{count - 1}", "--mem=1500", f"--output={folder}/%a.out",
         f"--wrap={command}"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    # Not by `sbatch --wait`, which looks for its jobs every ten seconds.
    while not all((folder / str(x) / "result").exists() for x in range(count)):
        time.sleep(0.02)
    taken = time.perf_counter() - start
    while subprocess.run(["squeue", "-h", "-j", submitted.stdout.strip()], capture_output=True, check=False).stdout:
        time.sleep(0.1)
    return taken


def map_array(folder: Path, count: int, seconds: float) -> float:
    import submitit

    executor = submitit.SlurmExecutor(folder / "logs")
    executor.update_parameters(time=5, mem="1500MB")
    specs = [{"x": x, "seconds": seconds} for x in range(count)]
    start = time.perf_counter()
    jobs = executor.map_array(cluster_work.plain, ["wait"] * count, specs, [f"{folder}/{x}" for x in range(count)])
    for job in jobs:
        job.result()
    return time.perf_counter() - start


def planning(count: int) -> dict[str, Any]:
    """Seconds until a run knows that all its tasks are published."""
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        made = tasks(store, "wait", count, 0.0)
        for number, task in enumerate(made):
            workspace = Workspace.claim(task.out, f"{number:012x}")
            (workspace.folder / "result").write_text(f"{number}")
            publish(workspace, About(task.key, task.kind, "cluster_work:wait", task.spec, task.code))
            workspace.discard()
        start = time.perf_counter()
        planned = check_tasks(made)
        checked = time.perf_counter() - start
        assert all(one.published for one in planned)
        start = time.perf_counter()
        report = run(made, config=ClusterConfig(store=store.root))
        whole = time.perf_counter() - start
        assert len(report.skipped) == count
    return {"tasks": count, "check": checked, "run": whole}


def scaling(count: int, seconds: float, rounds: int, workers: int) -> dict[str, Any]:
    """Tasks that compute, on one core and on several."""
    times = in_turns(rounds, {
        "one": lambda folder: ours(folder, "local", "compute", count, seconds, workers=1),
        "all": lambda folder: ours(folder, "local", "compute", count, seconds, workers=workers),
        "pool of one": lambda folder: pool(folder, "compute", count, seconds, 1),
        "pool of all": lambda folder: pool(folder, "compute", count, seconds, workers),
    })  # fmt: skip
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    return {"tasks": count, "task_seconds": seconds, "workers": workers, "seconds": medians,
            "speedup": medians["one"] / medians["all"],
            "speedup_of_pool": medians["pool of one"] / medians["pool of all"]}  # fmt: skip


def table(found: dict[str, Any]) -> str:
    lines = [heading(found["machine"]), "", "| executor | tasks | bare engine | bare, s | ours, s | ratio |",
             "|:--|:--|:--|--:|--:|--:|"]  # fmt: skip
    for one in found["overhead"]:
        what = f"{one['tasks']} of {1000 * one['task_seconds']:.0f} ms"
        lines.append(f"| {one['executor']} | {what} | {one['rival']} | {one['bare']:.2f} | {one['ours']:.2f} | "
                     f"{one['ratio']:.2f}x |")  # fmt: skip
    plan, scale = found["planning"], found["scaling"]
    lines += [
        "",
        f"Planning {plan['tasks']:,} published tasks: {plan['check']:.2f} s; a whole run of them {plan['run']:.2f} s.",
        f"{scale['tasks']} tasks of {scale['task_seconds']} s of computing: {scale['workers']} workers are "
        f"{scale['speedup']:.2f}x as fast as one (ProcessPoolExecutor: {scale['speedup_of_pool']:.2f}x).",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=500, help="of local and Ray (default: 500)")
    parser.add_argument("--slurm-tasks", type=int, default=60, help="of SLURM (default: 60)")
    parser.add_argument("--planned", type=int, default=10_000, help="published tasks to plan (default: 10000)")
    parser.add_argument("--rounds", type=int, default=3, help="of each measurement (default: 3)")
    parser.add_argument("--workers", type=int, default=2, help="cores to use (default: 2)")
    parser.add_argument("--only", nargs="+", choices=("local", "ray"), default=["local", "ray"], help="executors")
    parser.add_argument("--slurm", action="store_true", help="measure SLURM, too")
    parser.add_argument("--quick", action="store_true", help="few tasks, to see that it runs")
    add_output(parser)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.tasks, arguments.slurm_tasks, arguments.planned, arguments.rounds = 20, 4, 200, 1
    logging.getLogger("cluster").setLevel(logging.WARNING)
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])  # for workers of the bare engines
    rounds, workers = arguments.rounds, arguments.workers
    overhead = []
    if "local" in arguments.only:
        overhead.append(local(arguments.tasks, 0.05, rounds, workers))
    if "ray" in arguments.only:
        overhead.append(ray(arguments.tasks, 0.05, rounds, workers))
    if arguments.slurm:
        overhead += slurm(arguments.slurm_tasks, rounds)
    found = {
        "machine": machine(),
        "overhead": overhead,
        "planning": planning(arguments.planned),
        "scaling": scaling(4 if arguments.quick else 40, 0.2, rounds, workers),
    }
    say(found, table, arguments)


if __name__ == "__main__":
    main()
