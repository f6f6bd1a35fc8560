"""Drivers as processes of their own: stopped, killed, several at once. No process and no stray file is left."""

from __future__ import annotations

import json
import os
import pty
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import cluster_jobs as jobs
import pytest
from cluster_helpers import alive, descendants, is_worker, job_of, kill, results, strays, wait_for

from cluster import ClusterConfig, Interrupted, Locked, Store, run, verify
from cluster.driver.lock import run_lock
from cluster.host import Process
from cluster.local.executor import LocalExecutor
from cluster.protocol import Context, Event, Executor
from cluster.store.layout import new_attempt
from cluster.store.lease import read_owner
from cluster.store.publish import About, publish
from cluster.store.workspace import Workspace
from cluster.worker.attempt import perform

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(store: Store, tmp_path: Path) -> Start:
    def begin(seconds: float, count: int, label: str = "", on_locked: str = "wait") -> subprocess.Popen[str]:
        script = Path(__file__).with_name("cluster_driver.py")
        arguments = [str(store.root), str(tmp_path / "calls"), str(seconds), str(count), label, on_locked]
        return subprocess.Popen(
            [sys.executable, str(script), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={name: value for name, value in os.environ.items() if not name.startswith("CLUSTER_")},
        )

    return begin


def ran(tmp_path: Path) -> list[str]:
    path = tmp_path / "calls"
    return path.read_text().split("\n")[:-1] if path.exists() else []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_it_leaves_no_process_and_no_stray_file(
    start: Start, store: Store, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    driver = start(0.05, 60, "hang")
    wait_for(lambda: len(ran(tmp_path)) > 4 and Path(f"{tmp_path}/calls.pids").exists())
    processes = descendants(driver.pid)
    assert len([pid for pid in processes if is_worker(pid)]) == 2
    os.kill(driver.pid, number)
    os.kill(driver.pid, number)  # impatience does not spoil the cleaning up
    out, err = driver.communicate(timeout=30)
    assert driver.returncode == code, err
    assert out == ""
    assert [pid for pid in processes if alive(pid)] == []
    assert not any(alive(int(pid)) for pid in Path(f"{tmp_path}/calls.pids").read_text().split())
    assert strays(store.root) == []
    done = len(list((store.root / "square").iterdir()))
    assert 0 < done < 60
    status = json.loads(next(store.logs.glob("*/status.json")).read_text())
    assert (status["state"], status["done"]) == ("interrupted", done)


def test_killed_its_processes_die_and_the_next_run_makes_only_what_is_missing(
    start: Start, store: Store, tmp_path: Path
) -> None:
    driver = start(0.05, 30, "hang")
    wait_for(lambda: len(ran(tmp_path)) > 8 and Path(f"{tmp_path}/calls.pids").exists())
    processes = [*descendants(driver.pid), *map(int, Path(f"{tmp_path}/calls.pids").read_text().split())]
    kill(driver.pid)
    driver.communicate()
    # Workers, the guardian, and the child of a task, which knows nothing of us.
    wait_for(lambda: not any(alive(pid) for pid in processes), seconds=3)
    done = len([path for path in (store.root / "square").iterdir() if not path.name.startswith(".")])
    again = start(0.05, 30)
    out, err = again.communicate(timeout=60)
    assert out == f"{30 - done} {done}\n", err
    calls = [line for line in ran(tmp_path) if line]
    assert len(calls) <= 30 + 2, "only what was under way is run twice"
    hangs = list((store.root / "hangs").iterdir())
    assert [path.name[:1] for path in hangs] == ["."], "a temporary folder at most, of the task no longer asked for"
    subprocess.run([sys.executable, "-m", "cluster", "clean", "--yes", "--store", str(store.root)], check=True)
    assert list((store.root / "hangs").iterdir()) == []
    assert strays(store.root) == []


def test_two_at_once_share_the_work(start: Start, store: Store, tmp_path: Path) -> None:
    drivers = [start(0.05, 40) for _ in range(2)]
    outs = [driver.communicate(timeout=90) for driver in drivers]
    counts = [tuple(map(int, out.split())) for out, _ in outs]
    assert all(done + skipped == 40 for done, skipped in counts), outs
    # Both may begin one task at the same instant; its result is published once all the same.
    assert 40 <= len(ran(tmp_path)) <= 44
    assert len(list((store.root / "square").iterdir())) == 40
    assert strays(store.root) == []


def test_with_one_label_the_second_waits_or_refuses(start: Start, store: Store, tmp_path: Path) -> None:
    first = start(0.5, 20, "stage")
    wait_for(lambda: len(ran(tmp_path)) > 2)
    holder = json.loads((store.root / "locks" / "stage.json").read_text())
    assert (holder["process"]["pid"], holder["process"]["host"]) == (first.pid, socket.gethostname())
    first.send_signal(signal.SIGSTOP)  # it holds the lock for as long as the others take to start
    second, third = start(0.5, 20, "stage"), start(0.5, 20, "stage", "refuse")
    _, err = third.communicate(timeout=60)
    first.send_signal(signal.SIGCONT)
    assert third.returncode == 75
    assert f"'stage' is held by run {holder['run']} on {socket.gethostname()}:{first.pid} since" in err
    assert first.communicate(timeout=60)[0] == "20 0\n"
    assert second.communicate(timeout=60)[0] == "0 20\n"
    assert len(ran(tmp_path)) == 20
    assert strays(store.root) == []


def test_the_lock_of_a_dead_owner_is_taken_over(start: Start, store: Store, tmp_path: Path) -> None:
    first = start(0.1, 20, "stage")
    wait_for(lambda: len(ran(tmp_path)) > 2)
    kill(first.pid)
    first.communicate()
    assert (store.root / "locks" / "stage.json").exists()
    second = start(0.0, 20, "stage", "refuse")
    out, err = second.communicate(timeout=60)
    assert sum(map(int, out.split())) == 20, err
    assert strays(store.root) == []


def test_a_lock_excludes_threads_of_one_process_too(tmp_path: Path) -> None:
    with run_lock(tmp_path, "a/b c", "1", "refuse"):
        with (
            pytest.raises(Locked, match=f"'a/b c' is held by run 1 on {Process.me()}"),
            run_lock(tmp_path, "a/b c", "2", "refuse"),
        ):
            pass
        for other in ("another", "a_b c", "a%2Fb c", "", "."):
            with run_lock(tmp_path, other, "3", "refuse"):
                pass
    with run_lock(tmp_path, "a/b c", "5", "refuse"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_where_files_cannot_be_locked_the_name_of_the_owner_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno
    import fcntl

    def unsupported(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "no locks here")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    me = vars(Process.me())
    lock = tmp_path / "x.json"
    for started, free in ((me["started"], False), ("1", True)):
        lock.write_text(json.dumps({"process": {**me, "started": started}, "run": "0", "since": "then"}))
        if free:
            with run_lock(tmp_path, "x", "1", "refuse"):
                pass
            continue
        with pytest.raises(Locked, match="run 0"), run_lock(tmp_path, "x", "1", "refuse"):
            pass


def test_of_many_that_wait_one_at_a_time_has_the_lock(tmp_path: Path) -> None:
    """Each removes the file when it ends, while others wait for it."""
    inside: list[int] = []

    def work(number: int) -> None:
        for _ in range(5):
            with run_lock(tmp_path, "x", str(number), "wait"):
                inside.append(number)
                assert inside == [number]
                time.sleep(0.002)
                inside.remove(number)

    with ThreadPoolExecutor(4) as pool:
        for ended in [pool.submit(work, number) for number in range(4)]:
            ended.result()
    assert list(tmp_path.iterdir()) == []


def test_a_wait_for_the_lock_can_be_interrupted(store: Store) -> None:
    config = ClusterConfig(store=store.root)
    before = signal.getsignal(signal.SIGINT)
    with run_lock(store.root / "locks", "x", "1", "refuse"):
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(Interrupted):
            run([store.task("kind", "a", jobs.square, {"x": 1})], config=config, label="x")
    assert signal.getsignal(signal.SIGINT) is before
    assert results(store.root) == {}


SCRIPT = """
import sys
from pathlib import Path
from acme_shared import ANSWER
from cluster import ClusterConfig, Store, run

def call(spec, folder):
    (folder / "answer").write_text(str(ANSWER))

if __name__ == "__main__":
    store = Store(Path(sys.argv[1]))
    run([store.task("kind", "name", call, {})], config=ClusterConfig(store=store.root)).raise_if_failed()
"""


@pytest.mark.parametrize("package", ["stages", ""])
def test_the_script_that_is_run_may_hold_the_calls(store: Store, tmp_path: Path, package: str) -> None:
    """As `python pipelines/eval.py` does: the key is that of the importable module, workers import it by name."""
    root = tmp_path / "with space"
    folder = root / package
    folder.mkdir(parents=True)
    if package:
        (folder / "__init__.py").write_text("")
    (folder / "eval.py").write_text(SCRIPT)
    (root / "acme_shared.py").write_text("ANSWER = 42")
    environment = {**os.environ, "PYTHONPATH": str(root)}
    for _ in range(2):
        subprocess.run([sys.executable, str(folder / "eval.py"), str(store.root)], check=True, env=environment)
    (out,) = store.published()
    assert (out / "answer").read_text() == "42"
    assert verify(out).about.call == ("stages.eval:call" if package else "eval:call")


def test_on_a_terminal_ctrl_c_stops_the_run_and_leaves_nothing(store: Store, tmp_path: Path) -> None:
    """A real terminal, whose Ctrl-C goes to its whole foreground process group."""
    script = Path(__file__).with_name("cluster_driver.py")
    arguments = [sys.executable, str(script), str(store.root), str(tmp_path / "calls"), "0.05", "60", "hang"]
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(sys.executable, arguments, {**os.environ, "TERM": "xterm", "COLUMNS": "100"})
    wait_for(lambda: len(ran(tmp_path)) > 4 and Path(f"{tmp_path}/calls.pids").exists())
    processes = descendants(pid)
    os.write(terminal, b"\x03")
    seen = b""
    while True:
        try:
            data = os.read(terminal, 1 << 16)
        except OSError:  # the other end is closed
            break
        seen += data
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130
    os.close(terminal)
    assert [one for one in processes if alive(one)] == []
    assert strays(store.root) == []
    text = seen.decode(errors="replace")  # Ctrl-C may cut a character
    assert "hangs" in text
    assert "/61" in text, "the live view counts"


def test_chaos_loses_nothing(start: Start, store: Store, tmp_path: Path) -> None:
    """200 tasks, a random worker SIGKILLed every 0.3 s, and once the driver itself.

    All results equal those of a calm run, none is published twice, no stray file and no process is left.
    """
    calm = Store(tmp_path / "calm")
    calls = {"calls": str(tmp_path / "calls"), "seconds": 0.05}
    tasks = [calm.task("square", f"square {x}", jobs.count_calls, {"x": x, **calls}) for x in range(200)]
    assert run(tasks, config=ClusterConfig(store=calm.root)).ok
    choose = random.Random(0)
    killed, drivers = 0, [start(0.05, 200, "chaos")]
    driver_dies = time.monotonic() + choose.uniform(2, 4)
    published: dict[str, set[int]] = {}
    while drivers[-1].poll() is None:
        time.sleep(0.3)
        for folder in (store.root / "square").glob("[!.]*"):
            published.setdefault(folder.name, set()).add(folder.stat().st_ino)
        workers = [pid for pid in descendants(drivers[-1].pid) if is_worker(pid)]
        if len(drivers) == 1 and time.monotonic() > driver_dies:
            kill(drivers[0].pid)
            drivers[0].wait()
            drivers.append(start(0.05, 200, "chaos"))
        elif workers and killed < 60:  # not to the end: the last task alone would meet every one of them
            kill(choose.choice(workers))
            killed += 1
    out, err = drivers[-1].communicate()
    assert drivers[-1].returncode == 0, err
    done, skipped = map(int, out.split())
    print(f"{killed} workers and {len(drivers) - 1} driver killed; {200 - done - skipped} of 200 results lost")
    assert (len(drivers), done + skipped) == (2, 200)
    assert done, "the driver was killed before the end"
    assert killed > 10
    assert all(len(numbers) == 1 for numbers in published.values()), "published twice"
    assert results(store.root) == results(calm.root)
    assert strays(store.root) == []
    assert descendants(os.getpid()) == []


class Elsewhere(Executor):
    """On an imagined cluster, where each look at it takes two minutes."""

    STEP = 120.0

    def memory_limit_gb(self, asked: object) -> None: ...
    def close(self) -> None: ...
    def _objection(self, asked: object) -> None: ...
    def _cancel_running(self, ids: set[str]) -> None: ...

    def __init__(self, clock: list[float], other: Workspace, beats_until: float) -> None:
        super().__init__()
        self.submitted: list[float] = []
        self._clock, self._other, self._until = clock, other, beats_until

    def _advance(self, timeout: float) -> None:
        self._clock[0] += self.STEP
        if self._clock[0] < self._until:
            self._other.beat()
        for queue in self._queues.values():
            while queue:
                job = queue.popleft()
                self.submitted.append(self._clock[0])
                self._events.append(perform(job, self._events.append))


def test_the_task_of_another_run_is_waited_for_and_begins_once_its_lease_is_over(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three days by a clock of our own: without a single submission, until the other run shows no more life."""
    task = store.task("square", "shared", jobs.square, {"x": 1})
    other = Workspace.claim(task.out, new_attempt(), lease=600.0)
    owner = read_owner(other.root)
    assert owner is not None
    other._owner = replace(owner, process=replace(owner.process, domain="another host"))
    assert other.beat()
    clock, days = [time.monotonic()], 3 * 86400.0
    executor = Elsewhere(clock, other, clock[0] + days)
    begun = clock[0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    report = run([task], executor, config=ClusterConfig(store=store.root))
    assert report.ok
    assert len(executor.submitted) == 2
    assert days + 600 - 1e-6 <= executor.submitted[1] - begun <= days + 600 + 3 * Elsewhere.STEP  # rounding
    assert not other.beat(), "it is fenced"
    assert strays(store.root) == []


def test_the_result_of_another_run_is_taken_without_a_submission(store: Store) -> None:
    task = store.task("square", "shared", jobs.square, {"x": 1})
    other = Workspace.claim(task.out, new_attempt())
    executor = Elsewhere([0.0], other, 0.0)

    def end() -> None:
        (other.folder / "result").write_text("theirs")
        publish(other, About(task.key, task.kind, task.call_name, task.spec, task.code))

    threading.Timer(2.0, end).start()
    report = run([task], executor, config=ClusterConfig(store=store.root))
    assert (len(report.skipped), len(executor.submitted)) == (1, 1)


def test_workers_outlive_the_thread_that_started_them(store: Store, config: ClusterConfig) -> None:
    executor = LocalExecutor(Context("threads", store.logs / "threads", config))
    job = job_of(store.task("square", "one", jobs.square, {"x": 1, "seconds": 1.0}))
    events: list[Event] = []
    executor.submit([job])

    def begin() -> None:
        while not events:
            events.extend(executor.poll(0.1))

    thread = threading.Thread(target=begin)
    thread.start()
    thread.join()
    try:
        while events[-1].kind != "ended":
            events += executor.poll(0.1)
    finally:
        executor.close()
    assert [event.kind for event in events] == ["started", "ended"]
    assert events[-1].cause == "done", events[-1]
