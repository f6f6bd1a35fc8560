"""One suite for all executors: the same tasks, accidents, results, retries and reports, on real servers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import executor_suite as suite
import pytest
from cluster_helpers import alive, results, strays

pytest_plugins = ["ray_cluster", "slurm_cluster"]
KINDS = ("local", "ray", "slurm")


@pytest.fixture(scope="module", params=KINDS)
def executor(request: pytest.FixtureRequest) -> tuple[str, Any]:
    kind: str = request.param
    return kind, None if kind == "local" else request.getfixturevalue(f"{kind}_server")


def environment(kind: str, server: Any) -> dict[str, str]:
    """Of a driver."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("CLUSTER_", "RAY_"))}
    if server is None:
        return {**inherited, "CLUSTER_EXECUTOR": kind, "CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b"}
    return {**inherited, **server.environment, "CLUSTER_EXECUTOR": kind}


def run_suite(kind: str, server: Any, base: Path) -> Path:
    """Run the suite, once; returns its folder."""
    done = base / f"suite-{kind}"
    if done.exists():
        return done
    # One path for all, since the tasks' specs, and so their keys, hold it.
    work = base / "suite"
    work.mkdir()
    driver = drive(kind, server, work)
    assert (work / "report.json").exists(), driver.stderr
    assert driver.returncode == 1, driver.stderr
    return work.rename(done)


def drive(kind: str, server: Any, work: Path) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, suite.__file__, str(work), *([str(server.profile)] if server else [])]
    return subprocess.run(
        arguments, env=environment(kind, server), capture_output=True, text=True, timeout=240, check=False
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("executors")


@pytest.fixture(scope="module")
def finished(executor: tuple[str, Any], base: Path) -> tuple[Path, dict[str, Any]]:
    """(folder, report) of the suite."""
    folder = run_suite(*executor, base)
    return folder, json.loads((folder / "report.json").read_text())


def test_all_but_one_of_24_end_well(finished: tuple[Path, dict[str, Any]]) -> None:
    _, report = finished
    counts = {kind: report[kind] for kind in ("done", "failed", "skipped", "cancelled")}
    assert counts == {"done": 23, "failed": 1, "skipped": 0, "cancelled": 0}
    assert report["outcomes"]["raises"]["cause"] == "exception"
    for part in ("1 of 24 tasks failed", "raises: exception after 1 attempt: ValueError: no good <[bold]>", "log: "):
        assert part in report["table"]


def test_attempts_end_by_the_same_causes_everywhere(finished: tuple[Path, dict[str, Any]]) -> None:
    _, report = finished
    expected = suite.HISTORIES | {f"square {x}": ["done"] for x in range(suite.FINE)}
    assert {name: outcome["history"] for name, outcome in report["outcomes"].items()} == expected


def test_results_are_byte_for_byte_those_of_the_local_executor(
    finished: tuple[Path, dict[str, Any]], base: Path
) -> None:
    folder, _ = finished
    assert strays(folder / "store") == []
    found = results(folder / "store")
    squares = {json.loads(data)["x"]: json.loads(data) for name, data in found.items() if name.endswith("result.json")}
    assert squares == {x: {"x": x, "square": x * x} for x in range(suite.FINE)}
    assert [data for name, data in found.items() if name.endswith("/gpus")] == [b"1"]
    assert [data for name, data in found.items() if name.endswith("/began")] == [b"at the checkpoint"]
    assert found == results(run_suite("local", None, base) / "store")


def test_failed_attempts_leave_their_output_and_no_process(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = finished
    (log,) = (folder / "store" / "logs").glob("*/raises-1.log")
    assert "about to fail" in log.read_text()
    assert "ValueError: no good" in log.read_text()
    assert not any(alive(int(pid)) for pid in (folder / "victim").read_text().split())


def test_what_was_done_is_not_done_again(executor: tuple[str, Any], finished: tuple[Path, dict[str, Any]]) -> None:
    kind, server = executor
    folder, _ = finished
    work = folder.rename(folder.with_name("suite"))
    try:
        calls = {path.name: path.stat().st_size for path in work.glob("calls*")}
        assert drive(kind, server, work).returncode == 1
        report = json.loads((work / "report.json").read_text())
        assert (report["done"], report["skipped"], report["failed"]) == (0, 23, 1)
        calls["calls raises"] += 1
        assert {path.name: path.stat().st_size for path in work.glob("calls*")} == calls
    finally:
        work.rename(folder)
