"""How a benchmark is cut into tasks, and what is known of speeds."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from cluster import Cause, Task
from cluster.driver.board import Outcome
from pipelines.shards import ASSUMED, Speeds, begun, count_of


@pytest.mark.parametrize(
    ("questions", "speed", "count"),
    [
        (320, 2.0, 1), (3600, 2.0, 1), (3601, 2.0, 2), (214_354, 2.0, 64), (214_354, 20.0, 8), (3, 1e-9, 2),
        (10**9, 1e-9, 1024),
    ],
)  # fmt: skip
def test_tasks_take_half_an_hour_at_most(questions: int, speed: float, count: int) -> None:
    assert count_of(questions, speed, 30) == count


def test_a_cut_is_gone_on_with_whichever_of_its_tasks_is_done() -> None:
    assert begun(320, lambda size, number: False) is None
    assert begun(320, lambda size, number: (size, number) == (1, 0)) == 1
    assert begun(320, lambda size, number: (size, number) == (4, 3)) == 4, "the first one has failed"
    assert begun(3, lambda size, number: size == 4) is None, "more tasks than questions"


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
