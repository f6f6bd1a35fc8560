"""The Ray executor on a real cluster of three nodes: what dies, who notices, and what is left behind."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from cluster_helpers import alive, descendants, is_worker, kill, results, strays, wait_for

from cluster import ClusterConfig, Store, run

if TYPE_CHECKING:
    from ray_cluster import ServerInfo

pytest_plugins = ["ray_cluster"]

HERE = Path(__file__).parent
Start = Callable[..., "subprocess.Popen[str]"]


def environment(server: ServerInfo | None, **more: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("CLUSTER_", "RAY_"))}
    return inherited | (server.environment if server else {}) | {"CLUSTER_EXECUTOR": "ray"} | more


@pytest.fixture
def start(store: Store, tmp_path: Path, ray_server: ServerInfo) -> Start:
    """Starts `cluster_driver.py` on the cluster."""

    def begin(seconds: float, count: int, label: str = "") -> subprocess.Popen[str]:
        arguments = [str(store.root), str(tmp_path / "calls"), str(seconds), str(count), label]
        return subprocess.Popen(
            [sys.executable, str(HERE / "cluster_driver.py"), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(ray_server),
        )

    return begin


def script(server: ServerInfo | None, code: str, *arguments: object, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a driver that is given as text."""
    head = f"import sys; sys.path.insert(0, {str(HERE)!r})\n"
    return subprocess.run(
        [sys.executable, "-c", head + code, *map(str, arguments)],
        env=environment(server, **more),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def ran(tmp_path: Path) -> list[str]:
    path = tmp_path / "calls"
    return path.read_text().split("\n")[:-1] if path.exists() else []


def local_workers(server: ServerInfo) -> list[int]:
    """The processes that run calls, on all nodes."""
    return [pid for pid in descendants(server.process.pid) if is_worker(pid)]


def ray_workers(server: ServerInfo) -> list[int]:
    """The Ray workers that have one."""
    parents = set()
    for pid in local_workers(server):
        try:
            parents.add(int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]))
        except OSError:
            continue
    return sorted(parents)


def test_ctrl_c_leaves_no_task_no_process_and_no_stray_file(
    start: Start, store: Store, tmp_path: Path, ray_server: ServerInfo
) -> None:
    driver = start(0.05, 60, "hang")
    wait_for(lambda: len(ran(tmp_path)) > 4 and Path(f"{tmp_path}/calls.pids").exists(), seconds=60)
    pids = [int(pid) for pid in Path(f"{tmp_path}/calls.pids").read_text().split()]
    os.kill(driver.pid, signal.SIGINT)
    os.kill(driver.pid, signal.SIGINT)
    out, err = driver.communicate(timeout=30)
    assert driver.returncode == 130, err
    assert out == ""
    wait_for(lambda: not any(map(alive, pids)), seconds=3)
    wait_for(lambda: local_workers(ray_server) == [], seconds=5)
    assert strays(store.root) == []
    done = len(list((store.root / "square").iterdir()))
    assert 0 < done < 60
    status = json.loads(next(store.logs.glob("*/status.json")).read_text())
    assert (status["state"], status["done"]) == ("interrupted", done)
    assert not list(store.logs.glob("*/workers"))


def test_of_a_killed_driver_nothing_goes_on_and_the_next_makes_what_is_missing(
    start: Start, store: Store, tmp_path: Path, ray_server: ServerInfo
) -> None:
    driver = start(0.05, 30, "hang")
    wait_for(lambda: len(ran(tmp_path)) > 8 and Path(f"{tmp_path}/calls.pids").exists(), seconds=60)
    processes = [*local_workers(ray_server), *map(int, Path(f"{tmp_path}/calls.pids").read_text().split())]
    assert len(processes) >= 4
    kill(driver.pid)
    driver.communicate()
    # Also the child of a task, which knows nothing of us.
    wait_for(lambda: not any(map(alive, processes)), seconds=10)
    done = len([path for path in (store.root / "square").iterdir() if not path.name.startswith(".")])
    out, err = start(0.05, 30).communicate(timeout=60)
    assert out == f"{30 - done} {done}\n", err
    assert len([line for line in ran(tmp_path) if line]) <= 30 + 3, "only what was under way is run twice"
    subprocess.run([sys.executable, "-m", "cluster", "clean", "--yes", "--store", str(store.root)], check=True)
    assert list((store.root / "hangs").iterdir()) == []
    assert strays(store.root) == []


def test_two_drivers_at_once_share_the_work(start: Start, store: Store, tmp_path: Path) -> None:
    drivers = [start(0.05, 30) for _ in range(2)]
    outs = [driver.communicate(timeout=90) for driver in drivers]
    counts = [tuple(map(int, out.split())) for out, _ in outs]
    assert all(done + skipped == 30 for done, skipped in counts), outs
    assert 30 <= len(ran(tmp_path)) <= 34
    assert len(list((store.root / "square").iterdir())) == 30
    assert strays(store.root) == []


REFUSED = """
from pathlib import Path
import cluster_jobs as jobs
from cluster import ClusterConfig, CannotRun, Resources, Store, run
store = Store(Path(sys.argv[1]))
for resources in (Resources(gpus=2), Resources(cpus=64), Resources(memory_gb=500)):
    task = store.task("k", "wants much", jobs.square, {"x": 1}, resources=resources)
    try:
        run([task], config=ClusterConfig(executor="ray", store=store.root))
    except CannotRun as error:
        print(error)
"""


def test_what_no_node_could_run_is_refused_at_once(ray_server: ServerInfo, store: Store) -> None:
    said = script(ray_server, REFUSED, store.root)
    lines = said.stdout.splitlines()
    assert len(lines) == 3, said.stderr
    wanted = ["1 core(s), 2 GPU(s) and 2 GB", "64 core(s), 0 GPU(s) and 2 GB", "1 core(s), 0 GPU(s) and 500 GB"]
    for line, asked in zip(lines, wanted, strict=True):
        assert line.startswith(f"task 'wants much' asks for {asked} of memory on one node. Nodes there are: 3 with ")
        assert "1 core(s), 1 GPU(s), 3.0 GB of memory" in line
        assert ray_server.environment["RAY_ADDRESS"] in line
    assert results(store.root) == {}


SLOW = """
from pathlib import Path
import cluster_jobs as jobs
from cluster import ClusterConfig, Resources, Store, run
root = Path(sys.argv[1])
store = Store(root / "store")
spec = {"calls": str(root / "calls"), "die_after": [3], "how": "hang"}
limit = Resources(minutes=1 / 60)
slow = [store.task("slow", "resumes", jobs.resumes, spec, resources=limit)]
spec = {"calls": str(root / "calls-2"), "pids": str(root / "pids")}
slow += [store.task("slow", "never", jobs.hangs, spec, resources=limit)]
report = run(slow, config=ClusterConfig(executor="ray", store=store.root))
print(*(f"{one.task.name} {'-'.join(one.history)}" for one in report.done + report.failed), sep="; ")
"""


def test_time_limits_hold_and_what_progressed_goes_on(ray_server: ServerInfo, tmp_path: Path) -> None:
    said = script(ray_server, SLOW, tmp_path)
    assert said.stdout == "resumes timeout-done; never timeout\n", said.stderr
    (steps,) = (tmp_path / "store" / "slow").glob("*/steps.json")
    assert json.loads(steps.read_text()) == [[step, 1 + (step > 3)] for step in range(10)]
    assert not any(alive(int(pid)) for pid in (tmp_path / "pids").read_text().split())


CHAOS = """
from pathlib import Path
import cluster_jobs as jobs
from cluster import ClusterConfig, Store, run
store = Store(Path(sys.argv[1]))
tasks = [store.task("square", f"{x}", jobs.square, {"x": x, "seconds": 0.2}) for x in range(int(sys.argv[2]))]
report = run(tasks, config=ClusterConfig(executor="ray", store=store.root, tries=20))
print(len(report.done), sum(one.attempts - 1 for one in report.done))
"""


@pytest.mark.parametrize(("count", "kills"), [(24, 12), pytest.param(60, 30, marks=pytest.mark.nightly)])
def test_chaos_loses_nothing(ray_server: ServerInfo, tmp_path: Path, count: int, kills: int) -> None:
    """Tasks, half as many workers SIGKILLed, one every 0.3 s, Ray's or ours: all results equal those of a calm run."""
    import cluster_jobs as jobs

    calm = Store(tmp_path / "calm")
    tasks = [calm.task("square", f"{x}", jobs.square, {"x": x, "seconds": 0.2}) for x in range(count)]
    assert run(tasks, "local", config=ClusterConfig(store=calm.root)).ok
    ended, killed = threading.Event(), []
    choose = random.Random(0)

    def killer() -> None:
        # Not to the end: the last task alone would meet every one of them, and each makes it wait for longer.
        while len(killed) < kills and not ended.wait(0.3):
            workers = local_workers(ray_server)
            if workers:
                # Ray's come up in seconds, ours in tenths: mostly ours, or nothing would ever run.
                kind = ray_workers(ray_server) if len(killed) % 24 == 11 else workers
                killed.append(choose.choice(kind or workers))
                kill(killed[-1])

    thread = threading.Thread(target=killer)
    thread.start()
    try:
        said = script(ray_server, CHAOS, tmp_path / "store", count)
    finally:
        ended.set()
        thread.join()
    done, retries = map(int, said.stdout.splitlines()[-1].split())  # Ray may say something before
    assert (done, said.returncode) == (count, 0), said.stderr
    assert len(killed) > 5
    assert retries > 2
    assert results(tmp_path / "store") == results(calm.root)
    assert strays(tmp_path / "store") == []
    wait_for(lambda: local_workers(ray_server) == [], seconds=5)


PRIVATE = """
import os, signal
from pathlib import Path
import cluster_jobs as jobs
from cluster import ClusterConfig, Store, run
store = Store(Path(sys.argv[1]))
before = signal.getsignal(signal.SIGTERM)
tasks = [store.task("env", f"{x}", jobs.environment, {"x": x}) for x in range(4)]
report = run(tasks, config=ClusterConfig(executor="ray", store=store.root, workers=1))
assert report.ok, report.table()
assert signal.getsignal(signal.SIGTERM) is before
children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
print(len(report.done), [Path(f"/proc/{pid}/comm").read_text() for pid in children])
"""


def test_without_a_cluster_a_private_one_is_started_and_stopped(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="r") as short:  # names of sockets are limited
        home = {"HOME": str(tmp_path), "RAY_TMPDIR": short}  # where Ray writes its token, and looks for clusters
        said = script(None, PRIVATE, tmp_path / "store", **home)
    assert said.stdout == "4 []\n", said.stderr
    assert strays(tmp_path / "store") == []


def test_a_job_that_was_submitted_uses_its_cluster(ray_server: ServerInfo, store: Store, tmp_path: Path) -> None:
    """As `ray job submit --working-dir . -- python pipelines/eval.py` does: code from a copy, store on shared disk."""
    code = tmp_path / "code"
    package = code / "pipelines"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "mine.py").write_text("ANSWER = 42\n")
    (package / "job.py").write_text(JOB)
    (code / "cluster").symlink_to(HERE.parents[1] / "cluster")
    (code / ".rayignore").write_text("big\n")
    (code / "big").write_bytes(b"0" * 2_000_000)
    command = [
        str(Path(sys.executable).with_name("ray")), "job", "submit", "--address", f"http://{ray_server.dashboard}",
        "--working-dir", str(code), "--", sys.executable, "pipelines/job.py", str(store.root),
    ]  # fmt: skip
    environ: dict[str, Any] = environment(ray_server)
    environ.pop("RAY_ADDRESS")
    said = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120, check=False)
    assert said.returncode == 0, said.stdout + said.stderr
    (found,) = (json.loads((out / "found.json").read_text()) for out in store.published())
    assert found["answer"] == 42
    assert "_ray_pkg_" in found["file"], "the code is that of the copy"
    assert "_ray_pkg_" in found["folder"]
    assert not found["big"]


JOB = """
import json, os, sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from cluster import ClusterConfig, Store, run
from pipelines.mine import ANSWER

def call(spec, folder):
    found = {"answer": ANSWER, "file": __file__, "folder": os.getcwd(), "big": Path("big").exists()}
    (folder / "found.json").write_text(json.dumps(found))

if __name__ == "__main__":
    from pipelines.job import call
    store = Store(Path(sys.argv[1]))
    config = ClusterConfig(executor="ray", store=store.root)
    run([store.task("found", "one", call, {})], config=config).raise_if_failed()
"""


ELSEWHERE = """
import json
from pathlib import Path
import cluster_jobs as jobs
from cluster import ClusterConfig, Store, run
root = Path(sys.argv[1])
store = Store(root / "store")
spec = {"calls": str(root / "calls"), "times": 2}
report = run([store.task("killed", "killed", jobs.killed, spec)],
             config=ClusterConfig(executor="ray", store=store.root, profile=sys.argv[2]))
(path,) = store.logs.glob("*/attempts.jsonl")
attempts = [json.loads(line) for line in path.read_text().splitlines()]
print([one["cause"] for one in attempts])
print(len({one["node"] for one in attempts}), all(one["node"] for one in attempts))
"""


def test_a_task_whose_worker_crashed_runs_elsewhere(ray_server: ServerInfo, tmp_path: Path) -> None:
    said = script(ray_server, ELSEWHERE, tmp_path, ray_server.profile)
    assert said.stdout.splitlines() == ["['crashed', 'crashed', 'done']", "3 True"], said.stdout + said.stderr


def test_a_task_that_no_other_node_can_run_runs_again_where_its_worker_crashed(tmp_path: Path) -> None:
    profile = tmp_path / "local.yaml"
    profile.write_text("address: local\n")
    said = script(None, ELSEWHERE, tmp_path, profile)
    assert said.stdout.splitlines() == ["['crashed', 'crashed', 'done']", "1 True"], said.stdout + said.stderr


NODE = """
from pathlib import Path
import cluster_jobs as jobs
from cluster import ClusterConfig, Resources, Store, run
import executor_suite as suite
root = Path(sys.argv[1])
store = Store(root / "store")
tasks = [store.task("v", f"victim {x}", suite.victim, {"pid": str(root / f"victim-{x}")}) for x in range(3)]
report = run(tasks, config=ClusterConfig(executor="ray", store=store.root, profile=sys.argv[2]))
print(sorted("-".join(one.history) for one in report.done))
print(*(one.detail for one in report.done + report.failed))
"""


def test_tasks_of_a_node_that_dies_run_elsewhere(ray_server: ServerInfo, tmp_path: Path) -> None:
    def let_others_go() -> None:
        files = [tmp_path / f"victim-{x}" for x in range(3)]
        wait_for(lambda: all(file.exists() for file in files), seconds=60)
        pids = {int(file.read_text().split()[0]) for file in files}
        lost = pids & set(descendants(ray_server.raylets[-1]))
        assert len(lost) == 1, "tasks are spread over the nodes"
        ray_server.kill_node(len(ray_server.raylets) - 1)
        for pid in pids - lost:
            kill(pid)

    thread = threading.Thread(target=let_others_go)
    thread.start()
    try:
        said = script(ray_server, NODE, tmp_path, ray_server.profile)
    finally:
        thread.join()
        ray_server.add_node()
    # Ray may say on stdout, too, that the node is dead.
    expected = "['crashed-done', 'crashed-done', 'node-done']"
    assert expected in said.stdout.splitlines(), said.stdout + said.stderr
    assert strays(tmp_path / "store") == []
