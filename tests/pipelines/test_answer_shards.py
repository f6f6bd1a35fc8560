"""How a benchmark is cut into tasks, and what is known of speeds."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster import Cause, Manifest, Task
from cluster.driver.board import Outcome
from cluster.store.layout import MANIFEST
from cluster.store.publish import About
from pipelines.shards import ASSUMED, Published, Speeds, count_of


@pytest.mark.parametrize(
    ("questions", "speed", "count"),
    [
        (320, 2.0, 1), (3600, 2.0, 1), (3601, 2.0, 2), (214_354, 2.0, 64), (214_354, 20.0, 8), (3, 1e-9, 2),
        (10**9, 1e-9, 1024),
    ],
)  # fmt: skip
def test_tasks_take_half_an_hour_at_most(questions: int, speed: float, count: int) -> None:
    assert count_of(questions, speed, 30) == count


@pytest.fixture
def published(tmp_path: Path) -> Callable[..., Published]:
    """Answers of tasks, each (number, count), of two settings; those of the other one are cut into five."""

    def make(*tasks: tuple[int, int]) -> Published:
        for key, shard in [*((f"{count}-{number}", [number, count]) for number, count in tasks), ("other", [0, 5])]:
            (tmp_path / key).mkdir()
            about = About(key, "answers", "module.answers", {"shard": shard}, "code")
            (tmp_path / key / MANIFEST).write_text(Manifest(about, ()).to_text())
        (tmp_path / ".3-0.tmp-abc").mkdir()  # of an attempt
        return Published(tmp_path)

    return make


@pytest.mark.parametrize(
    ("tasks", "whole", "any_"),
    [
        ([], None, None),
        ([(0, 1)], 1, 1),
        ([(3, 4)], None, 4),  # the first one has failed
        ([(1, 3), (0, 7)], None, 3),
        ([(1, 2), (0, 3), (1, 3), (2, 3)], 3, 2),
    ],
)
def test_a_cut_is_gone_on_with_whichever_of_its_tasks_is_done(
    published: Callable[..., Published], tasks: list[tuple[int, int]], whole: int | None, any_: int | None
) -> None:
    there = published(*tasks)
    assert there.cut(lambda number, count: f"{count}-{number}", whole=True) == whole
    assert there.cut(lambda number, count: f"{count}-{number}", whole=False) == any_


def test_a_store_without_answers_has_no_cut(tmp_path: Path) -> None:
    assert Published(tmp_path / "answers").cut(lambda number, count: "", whole=False) is None


def test_answers_without_a_sound_manifest_are_no_cut(
    tmp_path: Path, published: Callable[..., Published], caplog: pytest.LogCaptureFixture
) -> None:
    there = published((0, 1))
    (tmp_path / "1-0" / MANIFEST).write_text("{")
    assert there.cut(lambda number, count: f"{count}-{number}", whole=False) is None
    assert f"{tmp_path / '1-0' / MANIFEST} is not a manifest" in caplog.text


def answers(spec: dict[str, Any], folder: Path) -> None:
    """What nobody calls here."""


@pytest.fixture
def done(tmp_path: Path) -> Outcome:
    spec = {"vlm": "tiny-llava", "dtype": "float32", "benchmark": "gqa"}
    task = Task("a", answers, spec, tmp_path / "answers/a")
    (tmp_path / "run").mkdir()
    line = {"key": task.key, "cause": "done", "seconds": 8.0}
    (tmp_path / "run/attempts.jsonl").write_text(json.dumps(line) + "\n")
    return Outcome(task, Cause.DONE, 1, tmp_path / "run/a-1.log")


def test_speeds_are_remembered_by_benchmark(tmp_path: Path, done: Outcome) -> None:
    speeds = Speeds(tmp_path, "local")
    assert speeds.of(done.task.spec) == ASSUMED
    speeds.note([done], {done.task.key: 320})
    again = Speeds(tmp_path, "local")
    assert again.of(done.task.spec) == 40.0
    assert again.of({**done.task.spec, "benchmark": "pope"}) == 40.0, "another benchmark of the same VLM"
    assert Speeds(tmp_path, "slurm").of(done.task.spec) == ASSUMED


@pytest.mark.parametrize("text", [None, "{", "[]", "{}"])
def test_a_run_does_not_end_for_want_of_an_estimate(
    tmp_path: Path, done: Outcome, text: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "run/attempts.jsonl"
    if text is None:
        path.unlink()
    else:
        path.write_text(text + "\n")
    with caplog.at_level(logging.WARNING):
        Speeds(tmp_path, "local").note([done], {done.task.key: 320})
    assert f"{path} cannot be read" in caplog.text
    assert Speeds(tmp_path, "local").of(done.task.spec) == ASSUMED
