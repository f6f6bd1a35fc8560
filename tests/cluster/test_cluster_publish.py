"""Publication: whole, verified and at most once, whatever instruction the attempt is stopped at."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cluster_jobs as jobs
import pytest
from cluster_helpers import WEIRD, forked, job_of, results, strays, tree

from cluster import Cause, CorruptResult, Store, StoreUnavailable, Task, drop, is_published, set_aside, verify
from cluster.protocol import Event
from cluster.store import layout
from cluster.store.layout import new_attempt
from cluster.store.lease import Watch, sweep
from cluster.store.publish import About
from cluster.store.publish import publish as publish_workspace
from cluster.store.workspace import Workspace
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


@pytest.mark.usefixtures("in_order")
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
        sweep(kind, Watch())
        assert tree(task.out) == tree(calm.out)
        assert strays(stopped().root) == []
        kills = number
    assert kills > 25


@pytest.mark.usefixtures("in_order")
def test_failing_at_every_step_it_leaves_nothing_and_says_why(tmp_path: Path) -> None:
    failures = 0

    def fail() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "the disk")

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
            assert os.strerror(errno.ENOSPC) in cause
            assert publish(task).cause is Cause.DONE
        if task.out.parent.exists():
            sweep(task.out.parent, Watch())
            assert strays(tmp_path / "stores" / str(failures)) == []
        failures = number
    assert failures > 25


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Back-off without the waiting."""
    monkeypatch.setattr(layout, "PAUSES", (0.0, 0.0, 0.0, 0.0))


@pytest.fixture
def in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """One fsync after the other, so that step N is the same in every run."""
    monkeypatch.setattr("cluster.store.publish.FSYNC_THREADS", 1)


@pytest.mark.usefixtures("impatient", "in_order")
@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_one_hiccup_at_any_step_ends_nothing(tmp_path: Path, code: int) -> None:
    """Each step fails once. A second fsync would hide what the first one lost, so that the attempt is made again."""
    hiccups, said, calm = 0, tmp_path / "said", square(Store(tmp_path / "calm"))
    publish(calm)

    def fail() -> None:
        raise OSError(code, os.strerror(code), "the disk")

    def work() -> None:
        task = square(Store(tmp_path / "stores" / str(hiccups)))
        first = publish(task)
        said.write_text(f"{first.cause} {first.detail}")
        if first.cause is not Cause.DONE and not is_published(task.out):
            assert publish(task).cause is Cause.DONE

    causes = []
    for number in at_every_step(tmp_path / "stores", fail, work):
        store = Store(tmp_path / "stores" / str(hiccups))
        causes.append(said.read_text())
        assert tree(square(store).out) == tree(calm.out)
        sweep(square(store).out.parent, Watch())
        assert strays(store.root) == []
        hiccups = number
    assert hiccups > 25
    assert sum(cause.startswith("exception OSError") for cause in causes) == 5, "the call's own files are the call's"
    # An fsync of each of three files, of their three folders and of the one that the result is published into.
    assert sum(cause.startswith("node StoreUnavailable") for cause in causes) == 7
    assert all(cause.startswith(("done", "node", "exception")) for cause in causes)
    assert any(cause.startswith("node StoreUnavailable: ") and "forced to disk" in cause for cause in causes)


@pytest.mark.parametrize(("action", "step"), [("stat", "claim"), ("rename", "publish"), ("fsync", "publish")])
@pytest.mark.usefixtures("impatient")
def test_a_store_that_keeps_failing_is_named_and_the_attempt_made_again(
    store: Store, monkeypatch: pytest.MonkeyPatch, action: str, step: str
) -> None:
    task, tries, really = square(store), [], getattr(os, action)

    def broken(place: Any, *rest: Any, **named: Any) -> Any:
        if isinstance(place, Path) and not place.is_relative_to(store.root):
            return really(place, *rest, **named)
        tries.append(place)
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with monkeypatch.context() as patch:
        patch.setattr(os, action, broken)
        ended = publish(task)
    assert ended.cause is Cause.NODE
    assert os.strerror(errno.ESTALE) in ended.detail
    assert len(tries) < 50
    assert publish(task).cause is Cause.DONE
    verify(task.out)


@pytest.mark.usefixtures("impatient")
def test_damage_and_a_file_system_that_fails_are_told_apart(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    task = square(store)
    publish(task)
    really = hashlib.file_digest
    hiccups = [errno.EIO, errno.ESTALE]

    def digest(*arguments: Any) -> Any:
        if hiccups:
            code = hiccups.pop()
            raise OSError(code, os.strerror(code))
        return really(*arguments)

    monkeypatch.setattr(hashlib, "file_digest", digest)
    verify(task.out)
    assert hiccups == []
    hiccups += [errno.EIO] * 99
    with pytest.raises(StoreUnavailable, match=r"failed 5 times: .*Input/output error"):
        verify(task.out)
    with pytest.raises(StoreUnavailable):
        set_aside(task.out)
    assert is_published(task.out), "nothing is moved on such grounds"


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


def test_a_link_to_a_folder_is_no_result_and_a_stray_one_is_named(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    ended = publish(store.task("links", "links", jobs.links, {"to": str(store.root)}))
    assert ended.cause is Cause.EXCEPTION
    assert "link, which is not a regular file" in ended.detail
    task = square(store)
    publish(task)
    (task.out / "deep" / "link").symlink_to(store.root)
    verify(task.out)
    assert "does not list: ['deep/link']" in caplog.text


@pytest.mark.parametrize(
    ("expected", "said"),
    [
        ({"a": "0" * 64}, "a for .* is ca978112[0-9a-f]{56}, but 0{64} in its manifest"),
        ({"b": "0" * 64}, "a for .* is ca978112[0-9a-f]{56}, but missing in its manifest"),
        ({}, "a for .* is ca978112[0-9a-f]{56}, but missing in its manifest"),
    ],
)
def test_what_is_not_expected_is_not_published(tmp_path: Path, expected: dict[str, str], said: str) -> None:
    out = tmp_path / "kind" / "key"
    right = hashlib.sha256(b"a").hexdigest()
    for wrong in (expected, {"a": right, "missing": right}):
        workspace = Workspace.claim(out, new_attempt())
        (workspace.folder / "a").write_bytes(b"a")
        with pytest.raises(
            CorruptResult, match=said if wrong is expected else "missing for .* is missing, but ca978112"
        ):
            publish_workspace(workspace, About("key", "kind", "m:f", {}, "c"), expected=wrong)
        workspace.discard()
    assert list(out.parent.iterdir()) == []


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
    with pytest.raises(CorruptResult, match=rf"{file} has other content"):
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
    with pytest.raises(CorruptResult, match="has 20 bytes, its manifest says 21"):
        verify(task.out)
    (task.out / "result.json").unlink()
    with pytest.raises(CorruptResult, match=r"result.json is missing"):
        verify(task.out)


def test_a_manifest_cannot_point_outside(store: Store) -> None:
    task = square(store)
    publish(task)
    manifest = json.loads((task.out / "manifest.json").read_text())
    manifest["files"][0]["path"] = "../../../etc/passwd"
    (task.out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CorruptResult, match="outside of the folder"):
        verify(task.out)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 99}'])
def test_a_broken_manifest_is_corrupt(store: Store, text: str) -> None:
    task = square(store)
    publish(task)
    (task.out / "manifest.json").write_text(text)
    with pytest.raises(CorruptResult, match=r"manifest.json is not a manifest"):
        verify(task.out)


def test_a_damaged_result_is_set_aside_and_made_again(store: Store) -> None:
    task = square(store)
    publish(task)
    before = tree(task.out)
    assert set_aside(task.out) is None
    assert tree(task.out) == before
    (task.out / "result.json").write_text("?")
    said = set_aside(task.out)
    (aside,) = task.out.parent.glob(".*.corrupt-*")
    assert str(said).endswith(f"its manifest says 21; moved to {aside}")
    assert not is_published(task.out)
    assert (aside / "result.json").read_text() == "?"
    assert publish(task).cause is Cause.DONE
    assert tree(task.out) == before
    assert "is not there" in str(set_aside(store.path("square", "nothing")))


@pytest.mark.parametrize("when", ["before it looks again", "before it renames", "twice before it renames"])
def test_of_two_that_set_a_damaged_result_aside_the_slower_leaves_the_fresh_one(
    store: Store, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """The other run sets it aside and publishes it anew in the instants that are worst."""
    task = square(store)
    publish(task)
    before = tree(task.out)
    (task.out / "result.json").write_text("?")

    def faster() -> None:
        monkeypatch.undo()
        assert set_aside(task.out) is not None
        assert publish(task).cause is Cause.DONE

    fresh: list[int] = []
    really_rename, really_lstat = os.rename, os.lstat

    def rename(source: Path, target: Path) -> None:
        faster()
        fresh.append(task.out.stat().st_ino)
        really_rename(source, target)
        if when.startswith("twice"):  # while ours holds the fresh one, a third run publishes another
            assert publish(task).cause is Cause.DONE
            fresh[0] = task.out.stat().st_ino

    def lstat(path: Path) -> os.stat_result:
        looks.append(path)
        if len(looks) == 2:
            faster()
            fresh.append(task.out.stat().st_ino)
        return really_lstat(path)

    looks: list[Path] = []
    monkeypatch.setattr(os, *(("lstat", lstat) if when.endswith("again") else ("rename", rename)))
    assert set_aside(task.out) is None, "what lies there now is sound"
    assert task.out.stat().st_ino == fresh[0]
    assert tree(task.out) == before
    assert len([path for path in task.out.parent.iterdir() if path != task.out]) == 1, "the damaged one"


def test_many_that_set_aside_and_make_anew_end_with_one_sound_result(store: Store) -> None:
    task = square(store)
    publish(task)
    before = tree(task.out)
    for _ in range(10):
        (task.out / "result.json").write_text("?")
        together = threading.Barrier(4)

        def look_and_make(together: threading.Barrier = together) -> None:
            together.wait()
            set_aside(task.out)
            publish(task)

        with ThreadPoolExecutor(4) as pool:
            for ended in [pool.submit(look_and_make) for _ in range(4)]:
                ended.result()
        if not is_published(task.out):  # all were busy with one another
            publish(task)
        assert tree(task.out) == before
    assert len(list(task.out.parent.glob(".*.corrupt-*"))) == 10


def test_dropping_goes_on_where_another_was_killed(store: Store) -> None:
    task = square(store)
    for _ in range(2):
        publish(task)
        publish(task)

        def work() -> None:
            shutil.rmtree = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
            drop(task.out)

        assert forked(work) == -signal.SIGKILL
        assert not is_published(task.out)
        assert len(list(task.out.parent.iterdir())) > 0
    publish(task)
    drop(task.out)
    drop(task.out)
    assert len(list(task.out.parent.iterdir())) == 2


def test_a_folder_that_is_no_result_is_moved_aside_not_lost(store: Store) -> None:
    task = square(store)
    task.out.mkdir(parents=True)
    (task.out / "notes.txt").write_text("mine")
    assert publish(task).cause is Cause.DONE
    verify(task.out)
    (aside,) = [path for path in task.out.parent.iterdir() if path.name.startswith(".")]
    assert (aside / "notes.txt").read_text() == "mine"
