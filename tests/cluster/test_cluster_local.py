"""The local executor with real processes: what kills a task, what is tried again, and what is left behind."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import cluster_jobs as jobs
import pytest
from cluster_helpers import WEIRD, alive, descendants, is_worker, results, strays

import cluster
from cluster import Cause, ClusterConfig, Report, Resources, Store, Task, TasksFailed, run, verify
from cluster.local import executor as local


@pytest.fixture(autouse=True)
def no_process_is_left() -> Any:
    yield
    left = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in descendants(os.getpid())]
    assert [line for line in left if b"resource_tracker" not in line] == []


def outcome(report: Report) -> cluster.Outcome:
    (one,) = report.done + report.failed
    return one


def one(store: Store, call: Any, tmp_path: Path, resources: Resources | None = None, **spec: Any) -> Task:
    spec = {"calls": str(tmp_path / "calls"), **spec}
    return store.task("kind", call.__name__, call, spec, resources=resources)


def calls(tmp_path: Path) -> int:
    return (tmp_path / "calls").stat().st_size


def test_results_are_published_and_never_made_again(store: Store, config: ClusterConfig, tmp_path: Path) -> None:
    tasks = [
        store.task("square", f"square {x}", jobs.count_calls, {"x": x, "calls": str(tmp_path / "calls")})
        for x in range(20)
    ]
    first = run(tasks[:15], config=config)
    assert (len(first.done), len(first.skipped), first.ok) == (15, 0, True)
    before = {name: path.stat().st_mtime_ns for name in results(store.root) if (path := store.root / name)}
    second = run(tasks, config=config)
    assert (len(second.done), len(second.skipped)) == (5, 15)
    assert sorted((tmp_path / "calls").read_text().split(), key=int) == [str(x) for x in range(20)]
    assert all((store.root / name).stat().st_mtime_ns == was for name, was in before.items())
    for x, task in enumerate(tasks):
        verify(task.out)
        assert json.loads((task.out / "result.json").read_text())["square"] == x * x
    assert strays(store.root) == []


def test_a_killed_worker_is_tried_again(store: Store, config: ClusterConfig, tmp_path: Path) -> None:
    report = run([one(store, jobs.killed, tmp_path, times=2)], config=config)
    assert outcome(report).history == (Cause.CRASHED, Cause.CRASHED, Cause.DONE)
    assert (outcome(report).task.out / "half").read_text() == "whole"
    assert strays(store.root) == []


def test_but_not_for_ever(store: Store, config: ClusterConfig, tmp_path: Path) -> None:
    report = run([one(store, jobs.killed, tmp_path, times=99)], config=config)
    assert outcome(report).history == (Cause.CRASHED,) * 3
    assert "signal 9" in outcome(report).detail
    assert calls(tmp_path) == 3
    assert results(store.root) == {}


def test_an_exception_is_never_tried_again_and_others_go_on(
    store: Store, config: ClusterConfig, tmp_path: Path
) -> None:
    fine = [store.task("kind", f"square {x}", jobs.square, {"x": x}) for x in range(5)]
    report = run([one(store, jobs.raises, tmp_path), *fine], config=config)
    assert [(o.cause, o.attempts) for o in report.failed] == [(Cause.EXCEPTION, 1)]
    assert len(report.done) == 5
    assert calls(tmp_path) == 1
    with pytest.raises(TasksFailed) as failure:
        report.raise_if_failed()
    text = str(failure.value)
    log = report.failed[0].log
    assert log is not None
    assert log.name == "raises-1.log"
    assert "about to fail" in log.read_text()
    for part in ("1 of 6 tasks failed", "raises: exception after 1 attempt: ValueError: no good <[bold]>", str(log)):
        assert part in text
    assert strays(store.root) == []


def test_a_full_disk_is_no_reason_to_try_again(store: Store, config: ClusterConfig, tmp_path: Path) -> None:
    report = run([one(store, jobs.full_disk, tmp_path)], config=config)
    assert outcome(report).history == (Cause.EXCEPTION,)
    assert "No space left on device" in outcome(report).detail
    assert results(store.root) == {}


def test_leaving_python_is_an_exception(store: Store, config: ClusterConfig, tmp_path: Path) -> None:
    report = run([one(store, jobs.leaves, tmp_path)], config=config)
    assert outcome(report).history == (Cause.EXCEPTION,)
    assert "SystemExit: 3" in outcome(report).detail


def test_a_task_without_progress_times_out_once_with_its_children(
    store: Store, config: ClusterConfig, tmp_path: Path
) -> None:
    task = one(store, jobs.hangs, tmp_path, Resources(minutes=0.8 / 60), pids=str(tmp_path / "pids"))
    report = run([task], config=config)
    assert outcome(report).history == (Cause.TIMEOUT,)
    assert not any(alive(int(pid)) for pid in (tmp_path / "pids").read_text().split())
    assert results(store.root) == {}


def test_one_that_progressed_goes_on_where_it_was(store: Store, config: ClusterConfig, tmp_path: Path) -> None:
    limit = Resources(minutes=0.8 / 60)
    report = run([one(store, jobs.resumes, tmp_path, limit, die_after=[3, 7], how="hang")], config=config)
    assert outcome(report).history == (Cause.TIMEOUT, Cause.TIMEOUT, Cause.DONE)
    steps = json.loads((outcome(report).task.out / "steps.json").read_text())
    assert [step for step, _ in steps] == list(range(10))
    assert [attempt for _, attempt in steps] == [1] * 4 + [2] * 4 + [3] * 2
    assert strays(store.root) == []


def test_a_killed_one_goes_on_where_it_was_also_in_the_next_run(
    store: Store, config: ClusterConfig, tmp_path: Path
) -> None:
    task = one(store, jobs.resumes, tmp_path, die_after=[1, 4, 6], how="kill")
    assert outcome(run([task], config=config)).history == (Cause.CRASHED,) * 3
    assert outcome(run([task], config=config)).history == (Cause.DONE,)
    steps = json.loads((task.out / "steps.json").read_text())
    assert [attempt for _, attempt in steps] == [1, 1, 2, 2, 2, 3, 3, 4, 4, 4]
    assert strays(store.root) == []


def test_too_much_memory_is_tried_once_more_with_twice_as_much(
    store: Store, config: ClusterConfig, tmp_path: Path
) -> None:
    task = one(store, jobs.eats, tmp_path, Resources(memory_gb=0.15), megabytes=200, seconds=1.2)
    report = run([task], config=config)
    assert outcome(report).history == (Cause.OOM, Cause.DONE)
    assert calls(tmp_path) == 2


def test_and_then_no_more(store: Store, config: ClusterConfig, tmp_path: Path) -> None:
    task = one(store, jobs.eats, tmp_path, Resources(memory_gb=0.05), megabytes=200)
    report = run([task], config=config)
    assert outcome(report).history == (Cause.OOM, Cause.OOM)
    assert "0.1 were asked for" in outcome(report).detail
    assert results(store.root) == {}


def test_a_kill_by_the_kernel_for_lack_of_memory_is_told_from_a_crash(
    store: Store, config: ClusterConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel says so only by its counter, which we make count here: filling a machine is not for tests."""
    seen = iter(range(1000))
    monkeypatch.setattr(local, "oom_kills", lambda: next(seen))
    report = run([one(store, jobs.killed, tmp_path, times=1)], config=config)
    assert outcome(report).history == (Cause.OOM, Cause.DONE)


def test_workers_that_do_not_come_up_end_the_run_with_their_log(
    store: Store, config: ClusterConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "START_FAILURES", 2)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    report = run([one(store, jobs.raises, tmp_path)], config=config)
    (failed,) = report.failed
    assert failed.cause is Cause.CRASHED
    assert "workers do not come up, see" in failed.detail
    log = Path(failed.detail.rpartition("see ")[2])
    assert "No module named 'cluster'" in log.read_text()


def test_memory_left_by_one_task_does_not_count_against_the_next(store: Store) -> None:
    config = ClusterConfig(store=store.root, workers=1)
    sizes = [(300, 1.0), (1, 0.4), (1, 0.4)]
    tasks = [
        store.task("hoard", f"{n}", jobs.hoards, {"n": n, "megabytes": mb}, resources=Resources(memory_gb=gb))
        for n, (mb, gb) in enumerate(sizes)
    ]
    report = run(tasks, config=config)
    assert {o.history for o in report.done} == {(Cause.DONE,)}
    pids = [(task.out / "pid").read_text() for task in tasks]
    assert pids[0] != pids[1] == pids[2]


def test_a_memory_error_counts_as_too_much_memory(store: Store, config: ClusterConfig, tmp_path: Path) -> None:
    report = run([one(store, jobs.memory_error, tmp_path)], config=config)
    assert outcome(report).history == (Cause.OOM, Cause.DONE)


def test_killed_right_after_publication_counts_as_done(store: Store, config: ClusterConfig, tmp_path: Path) -> None:
    spec = {"calls": str(tmp_path / "calls"), "out": "there"}
    task = Task("late", jobs.publishes_then_dies, spec, store.root / "kind" / "there")
    report = run([task], config=config)
    assert outcome(report).history == (Cause.DONE,)
    assert calls(tmp_path) == 1
    assert strays(store.root) == []


def test_fail_fast_gives_up_what_waits_and_stops_what_runs(store: Store, config: ClusterConfig, tmp_path: Path) -> None:
    long = store.task("kind", "long", jobs.square, {"x": 1, "seconds": 60})
    many = [store.task("kind", f"square {x}", jobs.square, {"x": x, "seconds": 60}) for x in range(2, 9)]
    started = time.monotonic()
    report = run([long, one(store, jobs.raises, tmp_path), *many], config=config, fail_fast=True)
    assert time.monotonic() - started < 20
    assert [o.task.name for o in report.failed] == ["raises"]
    assert len(report.cancelled) == 8
    assert not report.ok
    assert "8 were given up" in report.table()
    assert results(store.root) == {}


def test_the_log_of_an_attempt_has_all_it_said(
    store: Store, config: ClusterConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    report = run([store.task("kind", "talks/loud", jobs.talks, {})], config=config, label="talk")
    log = outcome(report).log
    assert log is not None
    assert log.name == "talks_loud-1.log"
    for text in ("on stdout", "on stderr", "INFO talks: on logging", "from a child"):
        assert text in log.read_text()
    said = capfd.readouterr()
    assert said.out == ""
    assert "talk: 1 tasks, 0 published before" in said.err
    assert "on stdout" not in said.err


def test_a_worker_serves_many_tasks_with_the_threads_they_ask_for(
    store: Store, config: ClusterConfig, tmp_path: Path
) -> None:
    tasks = [
        store.task("env", f"{cpus} {n}", jobs.environment, {"n": n, "c": cpus}, resources=Resources(cpus=cpus))
        for cpus in (1, 2, 16)
        for n in range(6)
    ]
    run(tasks, config=config).raise_if_failed()
    found = [json.loads((task.out / "environment.json").read_text()) for task in tasks]
    threads = [int(one["OMP_NUM_THREADS"]) for one in found]
    assert threads == [int(one["MKL_NUM_THREADS"]) for one in found] == [1] * 6 + [2] * 6 + [16] * 6
    assert len({one["pid"] for one in found}) <= 4, "at most two workers with one thread, one with each other count"
    assert {one["CUDA_VISIBLE_DEVICES"] for one in found} == {""}


def test_each_gpu_goes_to_one_task_at_a_time(
    store: Store, config: ClusterConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b,GPU-c")
    config = ClusterConfig(store=store.root, workers=8)
    asked = [1, 2, 1, 3, 1, 1, 2, 1]
    tasks = [
        store.task("g", f"{n}", jobs.environment, {"n": n, "seconds": 0.15}, resources=Resources(gpus=gpus))
        for n, gpus in enumerate(asked)
    ]
    run(tasks, config=config).raise_if_failed()
    spans = []
    for gpus, task in zip(asked, tasks, strict=True):
        found = json.loads((task.out / "environment.json").read_text())
        names = found["CUDA_VISIBLE_DEVICES"].split(",")
        assert len(names) == len(set(names) & {"GPU-a", "GPU-b", "GPU-c"}) == gpus
        spans += [(name, found["from"], found["to"], found["pid"]) for name in names]
    for name, start, end, pid in spans:
        for other, other_start, other_end, other_pid in spans:
            if name == other and pid != other_pid:
                assert end <= other_start or other_end <= start, "two tasks on one GPU"
    beside = [(a, b) for a in spans for b in spans if a[0] != b[0] and a[3] != b[3] and a[1] < b[1] < a[2]]
    assert beside, "GPUs are used beside each other"


def test_changed_source_is_not_published_under_the_old_key(store: Store, config: ClusterConfig) -> None:
    stale = store.task("kind", "stale", jobs.square, {"x": 1}, code="0" * 32)
    report = run([stale], config=config)
    assert outcome(report).cause is Cause.EXCEPTION
    assert "changed since the task was planned" in outcome(report).detail
    assert run([store.task("kind", "declared", jobs.square, {"x": 1}, code="version 1")], config=config).ok


@pytest.mark.parametrize("name", WEIRD[1:])
def test_any_name_and_any_folder(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    store = Store(Path(name))
    report = run([store.task("kind", name, jobs.square, {"x": 1})], config=ClusterConfig(store=Path(name)), label=name)
    assert report.ok
    assert strays(tmp_path / name / name) == []


def test_an_executor_of_the_caller_keeps_its_workers(store: Store, config: ClusterConfig) -> None:
    from cluster.local.executor import LocalExecutor
    from cluster.protocol import Context

    executor = LocalExecutor(Context("mine", store.logs / "mine", config))
    try:
        for x in (1, 2):
            assert run([store.task("e", f"{x}", jobs.environment, {"x": x})], executor, config=config).ok
        assert len([pid for pid in descendants(os.getpid()) if is_worker(pid)]) == 1
    finally:
        executor.close()
