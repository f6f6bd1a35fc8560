"""Damaged results: found, told apart from a file system that fails, set aside and made again."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from cluster_helpers import forked, tree
from cluster_publishing import publish, square

from cluster import Cause, CorruptResult, Store, StoreUnavailable, drop, is_published, set_aside, verify


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
