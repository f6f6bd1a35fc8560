"""Publication: whole, verified and at most once, whatever instruction the attempt is stopped at."""

from __future__ import annotations

import errno
import hashlib
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
from cluster_publishing import publish, silent, square

from cluster import Cause, CorruptResult, Store, Task, is_published, verify
from cluster.store.layout import new_attempt
from cluster.store.lease import Watch, sweep
from cluster.store.publish import About
from cluster.store.publish import publish as publish_workspace
from cluster.store.workspace import Workspace
from cluster.worker.attempt import perform

# What the kernel is asked to do to files, as far as Python tells (fsync is added by hand).
STEPS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "os.link", "os.fsync"}


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
