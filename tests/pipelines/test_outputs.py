"""Outputs are exact: nothing of an earlier grid, nothing half, nothing that differs from its checksum."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster import CorruptResult, Store, run
from pipelines.stage import outputs
from pipelines.tasks.scenes import scenes


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_what_an_earlier_grid_left_is_gone(tmp_path: Path) -> None:
    target = tmp_path / "data" / "tokens"
    for wanted in (["a", "b/c"], ["b/c", "d"]):
        with outputs.folder(target) as fresh:
            for name in wanted:
                outputs.write_text(fresh / name, name)
        assert names(target) == wanted
    assert [path.name for path in target.parent.iterdir()] == ["tokens"]


def test_an_error_leaves_the_old_output_as_it_was(tmp_path: Path) -> None:
    target = tmp_path / "results"
    with outputs.folder(target) as fresh:
        outputs.write_text(fresh / "old", "old")

    def fail() -> None:
        with outputs.folder(target) as fresh:
            outputs.write_text(fresh / "new", "new")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert names(tmp_path) == ["results/old"]


def test_what_a_killed_stage_left_is_swept(tmp_path: Path) -> None:
    (tmp_path / ".results.fresh-0badcafe").mkdir()
    (tmp_path / ".results.fresh-0badcafe" / "half").touch()
    with outputs.folder(tmp_path / "results") as fresh:
        outputs.write_text(fresh / "whole", "")
    assert names(tmp_path) == ["results/whole"]


STEPS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "ctypes.dlopen"}


def killed(work: Callable[[], None]) -> None:
    """Run `work` in a fork that is to be killed."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("one_step", [True, False])
def test_killed_at_every_step_it_leaves_the_old_output_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_step: bool
) -> None:
    """Also where two names cannot be swapped in one step."""
    if not one_step:
        monkeypatch.setattr(outputs, "_exchange", lambda one, other: False)
    steps = 0
    for stop in range(1, 100):
        target = tmp_path / str(stop) / "results"
        with outputs.folder(target) as fresh:
            outputs.write_text(fresh / "old", "old")

        def work(target: Path = target, stop: int = stop) -> None:
            seen = 0

            def count(event: str, arguments: tuple[object, ...]) -> None:
                nonlocal seen
                if event in STEPS:
                    seen += 1
                    if seen == stop:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(count)
            with outputs.folder(target) as fresh:
                outputs.write_text(fresh / "new", "new")
            os.kill(os.getpid(), signal.SIGKILL)

        killed(work)
        if one_step:
            assert names(target) in (["old"], ["new"]), "no instant without an output"
        with contextlib.suppress(ZeroDivisionError), outputs.folder(target):
            assert names(target) in (["old"], ["new"])
            raise ZeroDivisionError
        assert names(target.parent) in (["results/old"], ["results/new"])
        assert [path.name for path in target.parent.iterdir()] == ["results"]
        steps = stop
        if names(target) == ["new"] and stop > 12:
            break
    assert 10 < steps < 99


def test_of_two_writers_one_waits_for_the_other(tmp_path: Path) -> None:
    """And a reader always finds a whole output."""
    target, ended = tmp_path / "results", threading.Event()

    def write(text: str) -> None:
        for _ in range(15):
            with outputs.folder(target) as fresh:
                for name in "abc":
                    outputs.write_text(fresh / name, text)
                    time.sleep(0.001)
                assert names(fresh) == ["a", "b", "c"]

    def read() -> int:
        looks = 0
        while not ended.is_set():
            assert target.is_dir()
            looks += 1
        return looks

    write("before")
    with ThreadPoolExecutor(3) as pool:
        reader = pool.submit(read)
        for writer in [pool.submit(write, text) for text in ("one", "other")]:
            writer.result()
        ended.set()
        assert reader.result() > 100
    assert len({(target / name).read_text() for name in "abc"}) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["results"]


def test_the_folder_of_a_living_writer_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "results"
    script = (
        "import sys, pathlib\nfrom pipelines.stage import outputs\n"
        "with outputs.folder(pathlib.Path(sys.argv[1])) as fresh:\n"
        "    print('at work', flush=True); input(); (fresh / 'first').write_text('')\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", script, str(target)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "at work\n"
    threading.Timer(0.5, lambda: other.communicate("\n")).start()
    with outputs.folder(target) as fresh:
        assert names(target) == ["first"], "it has ended"
        outputs.write_text(fresh / "second", "")
    assert other.wait() == 0
    assert names(tmp_path) == ["results/second"]


def test_equal_data_is_equal_text_and_not_a_number_is_refused(tmp_path: Path) -> None:
    outputs.write_json(tmp_path / "a.json", {"x": [1, 2.5, "é"]})
    outputs.write_json(tmp_path / "b.json", {"x": [1, 2.5, "é"]})
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    with pytest.raises(ValueError, match="JSON"):
        outputs.write_json(tmp_path / "a.json", float("nan"))
    assert "é" in (tmp_path / "a.json").read_text(encoding="utf-8")


@pytest.fixture
def published(tmp_path: Path) -> Path:
    task = Store(tmp_path / "store").task("scenes", "four", scenes, {"seed": 0, "first": 0, "count": 4, "style": {}})
    from cluster import ClusterConfig

    run([task], config=ClusterConfig(store=tmp_path / "store", workers=1)).raise_if_failed()
    return task.out


def test_a_published_result_is_copied_as_it_is_or_not_at_all(published: Path, tmp_path: Path) -> None:
    manifest = outputs.copy_published(published, tmp_path / "copy", leave=("instances.json",))
    assert names(tmp_path / "copy") == [f"images/train-{index:06d}.jpg" for index in range(4)]
    sums = {file.path: file.sha256 for file in manifest.files if file.path != "instances.json"}
    assert outputs.checksums(tmp_path / "copy") == sums
    victim = published / "images" / "train-000002.jpg"
    data = bytearray(victim.read_bytes())
    data[100] ^= 1
    victim.write_bytes(bytes(data))
    with pytest.raises(CorruptResult, match=r"train-000002\.jpg has other content"):
        outputs.copy_published(published, tmp_path / "second")
    victim.unlink()
    with pytest.raises(CorruptResult, match=r"train-000002\.jpg is missing"):
        outputs.copy_published(published, tmp_path / "third")
