"""Published results are read once; what anybody touched since is read again."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import cluster_jobs as jobs
import pytest
from cluster_helpers import job_of

from cluster import Cause, CorruptResult, Store, drop, set_aside, verify
from cluster.store import verdicts
from cluster.worker.attempt import perform

SIZE = 8 * 2**20


def read_by(work: Callable[[], object]) -> int:
    """Bytes that this process reads meanwhile (`rchar`: all that read(2) gave it, from memory or disk)."""

    def count() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    before, nothing = count(), count()
    work()
    return count() - nothing - (nothing - before)


@pytest.fixture
def result(store: Store) -> Path:
    """A published result of 8 MB whose files were last written a while ago."""
    task = store.task("tokens", "big", jobs.big, {"bytes": SIZE})
    assert perform(job_of(task), lambda _: None).cause is Cause.DONE
    time.sleep(0.05)
    return task.out


def test_a_result_is_read_once(result: Path) -> None:
    assert read_by(lambda: verify(result, remembered=True)) >= SIZE
    assert read_by(lambda: verify(result, remembered=True)) < SIZE / 100
    assert read_by(lambda: verify(result)) >= SIZE


def flip(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(SIZE // 2)
        byte = file.read(1)
        file.seek(SIZE // 2)
        file.write(bytes([byte[0] ^ 4]))


def flip_under_the_old_times(path: Path) -> None:
    status = path.stat()
    flip(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def replace_under_the_old_times(path: Path) -> None:
    status, other = path.stat(), path.with_name("other")
    other.write_bytes(path.read_bytes())
    flip(other)
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.replace(path)


@pytest.mark.parametrize("damage", [flip, flip_under_the_old_times, replace_under_the_old_times])
def test_damage_since_is_found(result: Path, damage: Callable[[Path], None]) -> None:
    verify(result, remembered=True)
    before = (result / "data.bin").stat()
    damage(result / "data.bin")
    after = (result / "data.bin").stat()
    assert (after.st_size, after.st_mtime_ns == before.st_mtime_ns) == (before.st_size, damage is not flip)
    for _ in range(2):
        with pytest.raises(CorruptResult, match=r"data.bin has other content"):
            verify(result, remembered=True)


def test_a_missing_or_cut_file_is_found(result: Path) -> None:
    verify(result, remembered=True)
    os.truncate(result / "data.bin", SIZE - 1)
    with pytest.raises(CorruptResult, match="bytes, its manifest says"):
        verify(result, remembered=True)
    (result / "data.bin").unlink()
    with pytest.raises(CorruptResult, match="is missing"):
        verify(result, remembered=True)


def test_a_result_made_again_under_the_same_name_is_read_again(result: Path, store: Store) -> None:
    verify(result, remembered=True)
    set_aside(result)
    perform(job_of(store.task("tokens", "big", jobs.big, {"bytes": SIZE})), lambda _: None)
    flip(result / "data.bin")
    with pytest.raises(CorruptResult):
        verify(result, remembered=True)


def test_a_file_that_was_written_just_now_is_read_again(result: Path) -> None:
    """A second change in the same tick of the clock would not show."""
    os.utime(result / "data.bin")
    verify(result, remembered=True)
    assert verdicts.recall(result) == []
    assert read_by(lambda: verify(result, remembered=True)) >= SIZE


@pytest.mark.parametrize("text", ["", "{", "[]", '{"data.bin": 3}', '{"data.bin": [1, 2]}', "[[1]]"])
def test_verdicts_that_cannot_be_read_are_none(result: Path, text: str) -> None:
    verify(result, remembered=True)
    (path,) = (result.parents[1] / "verdicts").glob("*/*.json")
    path.write_text(text)
    assert read_by(lambda: verify(result, remembered=True)) >= SIZE
    assert read_by(lambda: verify(result, remembered=True)) < SIZE / 100


def test_a_store_that_cannot_be_written_to_remembers_nothing(result: Path) -> None:
    (result.parents[1] / "verdicts").write_text("in the way")
    for _ in range(2):
        assert read_by(lambda: verify(result, remembered=True)) >= SIZE


def test_verdicts_are_no_results_and_go_with_theirs(result: Path, store: Store) -> None:
    verify(result, remembered=True)
    assert [kind.name for kind in store.kinds()] == ["tokens"]
    verdicts.forget_absent(store.root)
    assert verdicts.recall(result)
    drop(result)
    verdicts.forget_absent(store.root)
    assert verdicts.recall(result) == []
