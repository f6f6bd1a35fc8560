"""Publication: whole, verified and at most once, whatever instruction the attempt is stopped at."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cluster_jobs as jobs
import pytest
from cluster_helpers import WEIRD, forked, job_of, results, strays, tree

from cluster import Cause, Corrupt, Store, Task, adopt, is_published, quarantine, verify
from cluster.protocol import Event
from cluster.store.lease import Watch
from cluster.store.leftovers import sweep
from cluster.worker.attempt import perform

# What the kernel is asked to do to files, as far as Python tells (fsync is added by hand).
STEPS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "os.link", "os.fsync"}


def silent(event: Event) -> None:
    """Nobody listens."""


def at_every_step(root: Path, act: Callable[[], None], work: Callable[[], object]) -> Iterator[int]:
    """Run `work` in a fork with `act` before its 1st, 2nd, ... step below `root`, until it ends before the step."""
    number, exit_code = 0, 1
    while exit_code != 0:
        number += 1

        def child(stop: int = number) -> None:
            seen = 0

            def count(event: str, arguments: tuple[Any, ...]) -> None:
                nonlocal seen
                below = any(str(root) in os.fsdecode(a) for a in arguments if isinstance(a, str | bytes | os.PathLike))
                if event == "os.fsync" or (event in STEPS and below):
                    seen += 1
                    if seen == stop:
                        act()

            real = os.fsync

            def fsync(handle: int) -> None:
                count("os.fsync", ())
                real(handle)

            os.fsync = fsync
            sys.addaudithook(count)
            work()
            os._exit(0 if seen < stop else 7)

        exit_code = forked(child)
        yield number


def square(store: Store, x: int = 3) -> Task:
    return store.task("square", f"square {x}", jobs.square, {"x": x})


def publish(task: Task) -> Event:
    return perform(job_of(task), silent)


def test_the_result_is_the_files_and_a_manifest_that_is_a_function_of_the_task(store: Store, tmp_path: Path) -> None:
    task, again = square(store), square(Store(tmp_path / "elsewhere"))
    assert (publish(task).cause, publish(again).cause) == (Cause.DONE, Cause.DONE)
    assert tree(task.out) == tree(again.out)
    assert set(tree(task.out)) == {"result.json", "deep/er/data.bin", "manifest.json"}
    manifest = json.loads((task.out / "manifest.json").read_text())
    assert manifest["key"] == task.out.name == task.key
    assert manifest["spec"] == {"x": 3}
    assert manifest["call"] == "cluster_jobs:square"
    assert {file["path"]: file["bytes"] for file in manifest["files"]} == {"deep/er/data.bin": 1000, "result.json": 21}
    assert strays(store.root) == []


def test_killed_at_every_step_it_is_published_whole_or_not_at_all(store: Store, tmp_path: Path) -> None:
    calm = square(Store(tmp_path / "calm"))
    publish(calm)
    kills = 0

    def stopped() -> Store:
        return Store(tmp_path / "stores" / str(kills))

    for number in at_every_step(
        tmp_path / "stores", lambda: os.kill(os.getpid(), signal.SIGKILL), lambda: publish(square(stopped()))
    ):
        task = square(stopped())
        if is_published(task.out):
            verify(task.out)
        kind = task.out.parent
        left = [path for path in kind.iterdir() if path != task.out] if kind.exists() else []
        assert len(left) <= 1, "one temporary folder at most"
        ended = publish(task)
        assert ended.cause in (Cause.DONE, Cause.BUSY), ended.detail  # busy: it was published before the end
        sweep(kind, Watch(), published={task.out.name})
        assert tree(task.out) == tree(calm.out)
        assert strays(stopped().root) == []
        kills = number
    assert kills > 25


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_failing_at_every_step_it_leaves_nothing_and_says_why(tmp_path: Path, code: int) -> None:
    failures = 0

    def fail() -> None:
        raise OSError(code, os.strerror(code), "the disk")

    said = tmp_path / "said"

    def work() -> None:
        event = publish(square(Store(tmp_path / "stores" / str(failures))))
        said.write_text(f"{event.cause} {event.detail}")

    for number in at_every_step(tmp_path / "stores", fail, work):
        task = square(Store(tmp_path / "stores" / str(failures)))
        cause = said.read_text()
        if is_published(task.out):
            verify(task.out)
        elif task.out.parent.exists():
            assert os.strerror(code) in cause
            assert publish(task).cause is Cause.DONE
        if task.out.parent.exists():
            sweep(task.out.parent, Watch(), published={task.out.name})
            assert strays(tmp_path / "stores" / str(failures)) == []
        failures = number
    assert failures > 25


def test_nothing_written_is_an_error(store: Store) -> None:
    task = store.task("empty", "empty", jobs.empty, {})
    ended = publish(task)
    assert ended.cause is Cause.EXCEPTION
    assert "wrote no file" in ended.detail
    assert results(store.root) == {}


def test_a_link_is_no_result(store: Store) -> None:
    ended = publish(store.task("links", "links", jobs.links, {}))
    assert ended.cause is Cause.EXCEPTION
    assert "link, which is not a regular file" in ended.detail


@pytest.mark.parametrize("name", WEIRD)
def test_any_path_will_do(tmp_path: Path, name: str) -> None:
    task = Task(name, jobs.square, {"x": 2}, tmp_path / name / "store" / name)
    assert perform(job_of(task), silent).cause is Cause.DONE
    assert verify(task.out).about.kind == "store"
    assert [path.name for path in task.out.parent.iterdir()] == [name]


@pytest.mark.parametrize("file", ["result.json", "deep/er/data.bin"])
def test_one_flipped_bit_is_found(store: Store, file: str) -> None:
    task = square(store)
    publish(task)
    data = bytearray((task.out / file).read_bytes())
    data[len(data) // 2] ^= 4
    (task.out / file).write_bytes(data)
    with pytest.raises(Corrupt, match=rf"{file} has other content"):
        verify(task.out)


def test_missing_and_cut_files_are_found_and_strays_are_not_results(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    task = square(store)
    publish(task)
    (task.out / "stray").write_text("?")
    verify(task.out)
    assert "stray" in caplog.text
    (task.out / "result.json").write_bytes((task.out / "result.json").read_bytes()[:-1])
    with pytest.raises(Corrupt, match="has 20 bytes, its manifest says 21"):
        verify(task.out)
    (task.out / "result.json").unlink()
    with pytest.raises(Corrupt, match=r"result.json is missing"):
        verify(task.out)


def test_a_manifest_cannot_point_outside(store: Store) -> None:
    task = square(store)
    publish(task)
    manifest = json.loads((task.out / "manifest.json").read_text())
    manifest["files"][0]["path"] = "../../../etc/passwd"
    (task.out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(Corrupt, match="outside of the folder"):
        verify(task.out)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 99}'])
def test_a_broken_manifest_is_corrupt(store: Store, text: str) -> None:
    task = square(store)
    publish(task)
    (task.out / "manifest.json").write_text(text)
    with pytest.raises(Corrupt, match=r"manifest.json is not a manifest"):
        verify(task.out)


def test_a_quarantined_result_is_made_again(store: Store) -> None:
    task = square(store)
    publish(task)
    before = tree(task.out)
    aside = quarantine(task.out)
    assert not is_published(task.out)
    assert publish(task).cause is Cause.DONE
    assert tree(task.out) == before == tree(aside)


def test_a_folder_that_is_no_result_is_moved_aside_not_lost(store: Store) -> None:
    task = square(store)
    task.out.mkdir(parents=True)
    (task.out / "notes.txt").write_text("mine")
    assert publish(task).cause is Cause.DONE
    verify(task.out)
    (aside,) = [path for path in task.out.parent.iterdir() if path.name.startswith(".")]
    assert (aside / "notes.txt").read_text() == "mine"


def test_adopting_shares_the_bytes_and_outlives_the_source(store: Store, tmp_path: Path) -> None:
    task = square(store)
    publish(task)
    out = store.path("layer", "abc")
    adopt(task.out / "deep", out)
    assert (out / "er" / "data.bin").stat().st_ino == (task.out / "deep" / "er" / "data.bin").stat().st_ino
    before = tree(out)
    adopt(task.out / "deep", out)
    quarantine(task.out)
    assert tree(out) == before
    manifest = verify(out)
    assert (manifest.about.part, manifest.about.spec, manifest.about.key) == ("deep", {"x": 3}, "abc")
    assert [path for path in out.parent.iterdir() if path != out] == []


def test_adopting_a_corrupt_file_fails_and_leaves_nothing(store: Store) -> None:
    task = square(store)
    publish(task)
    (task.out / "deep" / "er" / "data.bin").write_bytes(b"?" * 1000)
    out = store.path("layer", "abc")
    with pytest.raises(Corrupt, match=r"er/data.bin"):
        adopt(task.out / "deep", out)
    assert list(out.parent.iterdir()) == []
