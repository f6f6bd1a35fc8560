"""Results in a second place: `python -m cluster push` and `pull`, and nothing taken unseen."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cluster_jobs as jobs
import fsspec
import pytest
from cluster_helpers import results, strays, wait_for

from cluster import ClusterConfig, Store, is_published, run, verify
from cluster.__main__ import main


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"{request.param}://{tmp_path}/remote"


@pytest.fixture
def full(store: Store) -> Store:
    tasks = [store.task("square", f"{x}", jobs.square, {"x": x}) for x in range(4)]
    assert run([*tasks, store.task("one", "1", jobs.square, {"x": 1})], config=ClusterConfig(store=store.root)).ok
    return store


@pytest.fixture
def go(capsys: pytest.CaptureFixture[str]) -> Any:
    """A command with --json; its exit code and what it printed."""

    def do(command: str, store: Store, url: str, *names: str) -> tuple[int, dict[str, Any]]:
        code = main([command, "--store", str(store.root), "--remote", url, "--json", *names])
        return code, json.loads(capsys.readouterr().out)

    return do


def test_what_was_pushed_is_pulled_elsewhere_and_needs_no_making(
    full: Store, tmp_path: Path, url: str, go: Any
) -> None:
    code, said = go("push", full, url)
    assert (code, len(said["pushed"]), said["before"]) == (0, 5, 0)
    assert go("push", full, url) == (0, {"pushed": [], "failed": {}, "before": 5})
    other = Store(tmp_path / "other")
    key = next(folder.name for folder in full.published() if folder.parent.name == "square")
    assert go("pull", other, url, "one")[1]["pulled"] == [f"one/{next((full.root / 'one').iterdir()).name}"]
    assert go("pull", other, url, f"square/{key}")[1]["pulled"] == [f"square/{key}"]
    code, said = go("pull", other, url)
    assert (code, len(said["pulled"]), said["before"]) == (0, 3, 2)
    assert results(other.root) == results(full.root)
    assert strays(other.root) == []
    tasks = [other.task("square", f"{x}", jobs.square, {"x": x}) for x in range(4)]
    assert len(run(tasks, config=ClusterConfig(store=other.root)).skipped) == 4


@pytest.mark.parametrize("damage", ["bytes", "gone", "manifest", "foreign", "outside"])
def test_damage_is_not_taken_over(full: Store, tmp_path: Path, url: str, go: Any, damage: str) -> None:
    go("push", full, url)
    system, root = fsspec.core.url_to_fs(url)
    first, second = sorted(path.name for path in (full.root / "square").iterdir())[:2]
    manifest = json.loads(system.cat_file(f"{root}/square/{first}.json"))
    if damage == "bytes":
        system.pipe_file(f"{root}/square/{first}/result.json", b"{}")
    elif damage == "gone":
        system.rm_file(f"{root}/square/{first}/deep/er/data.bin")
    elif damage == "manifest":
        system.pipe_file(f"{root}/square/{first}.json", b"[]")
    elif damage == "foreign":
        system.pipe_file(f"{root}/square/{first}.json", system.cat_file(f"{root}/square/{second}.json"))
    else:
        manifest["files"][0]["path"] = "../../evil"
        system.pipe_file(f"{root}/square/{first}.json", json.dumps(manifest).encode())
    other = Store(tmp_path / "other")
    code, said = go("pull", other, url)
    assert (code, len(said["pulled"]), list(said["failed"])) == (1, 4, [f"square/{first}"])
    assert strays(other.root) == []
    assert not is_published(other.path("square", first))


def test_pushes_that_fail_are_named_and_made_up_for(
    full: Store, tmp_path: Path, go: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"file://{tmp_path}/remote"

    def full_bucket(*_: object, **__: object) -> None:
        raise OSError("bucket is full")

    with monkeypatch.context() as patch:
        patch.setattr(fsspec.get_filesystem_class("file"), "put_file", full_bucket)
        code, said = go("push", full, url)
    assert (code, said["pushed"], set(said["failed"].values())) == (1, [], {"OSError: bucket is full"})
    for folder in full.published():
        verify(folder)
    assert len(go("push", full, url)[1]["pushed"]) == 5
    assert len(go("pull", Store(tmp_path / "other"), url)[1]["pulled"]) == 5


HANGS = """
import signal, sys, time
import fsspec
from cluster.__main__ import main

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, where a shell started the tests in the background

def hang(self, source, target, *rest, **named):
    open(sys.argv[1], "a").close()
    time.sleep(600)

for name in ("put_file", "get_file"):
    setattr(fsspec.get_filesystem_class("file"), name, hang)
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("command", ["push", "pull"])
def test_ctrl_c_ends_a_transfer_that_hangs_at_once(full: Store, tmp_path: Path, go: Any, command: str) -> None:
    url = f"file://{tmp_path}/remote"
    store = full
    if command == "pull":
        go("push", full, url)
        store = Store(tmp_path / "other")
    arguments = [command, "--store", str(store.root), "--remote", url]
    hangs = tmp_path / "hangs"
    driver = subprocess.Popen([sys.executable, "-c", HANGS, str(hangs), *arguments])
    wait_for(hangs.exists)
    began = time.monotonic()
    os.kill(driver.pid, signal.SIGINT)
    assert driver.wait(timeout=30) == 130
    assert time.monotonic() - began < 3
    assert all(is_published(folder) for folder in full.published())
    assert main([*arguments, "--json"]) == 0
    if command == "pull":
        assert results(store.root) == results(full.root)


def test_a_place_that_cannot_be_reached_is_named(
    full: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for url, names, said in (
        ("nosuch://bucket/here", [], "the remote nosuch://bucket/here cannot be used: Protocol not known"),
        (f"file://{tmp_path}/file", [], "push"),
        (f"file://{tmp_path}/remote", ["nothing"], "there is no result nothing"),
    ):
        code = main(["push", "--store", str(full.root), "--remote", url, *names])
        heard = capsys.readouterr()
        assert code == (1 if said == "push" else 2), heard
        assert said in (heard.out if code == 1 else heard.err)
