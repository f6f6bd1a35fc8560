"""Results in a second place: fetched instead of made, uploaded once made, and never taken unseen."""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from pathlib import Path

import cluster_jobs as jobs
import fsspec
import pytest
from cluster_helpers import results, strays

from cluster import ClusterConfig, Report, Store, Task, run, verify
from cluster.errors import Interrupted, NotAvailable


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"{request.param}://{tmp_path}/remote"


def tasks(store: Store, tmp_path: Path, count: int = 4) -> list[Task]:
    spec = {"calls": str(tmp_path / "calls")}
    return [store.task("square", f"{x}", jobs.count_calls, {"x": x, **spec}) for x in range(count)]


def go(store: Store, tmp_path: Path, url: str, count: int = 4) -> Report:
    return run(tasks(store, tmp_path, count), config=ClusterConfig(store=store.root, workers=2, remote=url))


def calls(tmp_path: Path) -> int:
    return len((tmp_path / "calls").read_text().split())


def test_what_was_made_once_is_fetched_elsewhere(store: Store, tmp_path: Path, url: str) -> None:
    assert len(go(store, tmp_path, url).done) == 4
    other = Store(tmp_path / "other")
    report = go(other, tmp_path, url, 6)
    assert (len(report.skipped), len(report.done), calls(tmp_path)) == (4, 2, 6)
    assert results(store.root).items() <= results(other.root).items()
    assert strays(other.root) == []
    assert len(go(store, tmp_path, url, 6).skipped) == 6
    assert results(store.root) == results(other.root)
    assert calls(tmp_path) == 6


def test_what_was_published_without_it_is_uploaded_by_the_next_run(store: Store, tmp_path: Path, url: str) -> None:
    run(tasks(store, tmp_path), config=ClusterConfig(store=store.root))
    assert len(go(store, tmp_path, url).skipped) == 4
    assert len(go(Store(tmp_path / "other"), tmp_path, url).skipped) == 4
    assert calls(tmp_path) == 4


@pytest.mark.parametrize("damage", ["bytes", "gone", "manifest", "foreign", "outside"])
def test_damage_is_not_taken_over(
    store: Store, tmp_path: Path, url: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    go(store, tmp_path, url)
    system, root = fsspec.core.url_to_fs(url)
    first, second = sorted(task.key for task in tasks(store, tmp_path))[:2]
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
    with caplog.at_level(logging.WARNING):
        report = go(other, tmp_path, url)
    assert (len(report.skipped), len(report.done)) == (3, 1)
    assert f"square/{first} is not taken from {url}" in caplog.text
    assert results(other.root) == results(store.root)
    assert strays(other.root) == []


def test_uploads_that_fail_fail_no_run(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    url = f"file://{tmp_path}/remote"

    def full(*_: object, **__: object) -> None:
        raise OSError("bucket is full")

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(fsspec.get_filesystem_class("file"), "put_file", full)
        assert len(go(store, tmp_path, url).done) == 4
    assert "4 results were not uploaded" in caplog.text
    assert "bucket is full" in caplog.text
    for folder in store.published():
        verify(folder)
    go(store, tmp_path, url)
    assert len(go(Store(tmp_path / "other"), tmp_path, url).skipped) == 4


def test_ctrl_c_ends_fetching(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"file://{tmp_path}/remote"
    go(store, tmp_path, url, 40)
    system = fsspec.get_filesystem_class("file")
    fetched: list[str] = []
    really = system.get_file

    def slow(self: object, source: str, *rest: object, **named: object) -> None:
        fetched.append(source)
        time.sleep(0.2)
        if len(fetched) >= 3:
            os.kill(os.getpid(), signal.SIGINT)
        really(self, source, *rest, **named)

    monkeypatch.setattr(system, "get_file", slow)
    other = Store(tmp_path / "other")
    with pytest.raises(Interrupted):
        go(other, tmp_path, url, 40)
    assert len({name for name in fetched if name.endswith(".json")}) < 40
    assert strays(other.root) == []


def test_a_place_that_cannot_be_reached_is_named_before_any_work(store: Store, tmp_path: Path) -> None:
    with pytest.raises(NotAvailable, match=r"cluster\.remote nosuch://bucket/here: Protocol not known"):
        go(store, tmp_path, "nosuch://bucket/here")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotAvailable, match="cannot be read"):
        go(store, tmp_path, f"file://{tmp_path}/file")
    assert not (tmp_path / "calls").exists()
