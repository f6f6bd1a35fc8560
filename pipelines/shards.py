"""Into how many tasks the questions of a benchmark are cut: by how fast they were answered here before."""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cluster import Task
from cluster.driver.board import Outcome
from cluster.store.layout import ATTEMPTS
from ocvtp.json_files import read_json
from pipelines.stage import outputs

log = logging.getLogger(__name__)
ASSUMED = 2.0
"""Questions a second, until some were answered."""
MOST = 1024
"""Tasks of one benchmark and setting."""


def count_of(questions: int, speed: float, minutes: float) -> int:
    """Tasks of at most so many minutes each: 1, 2, 4, ..., so that a speed that is a little other changes nothing."""
    tasks = 1
    while 2 * tasks <= min(MOST, questions) and questions / tasks > 60 * minutes * speed:
        tasks *= 2
    return tasks


def begun(questions: int, is_there: Callable[[int, int], bool]) -> int | None:
    """Of how many tasks a cut is of which any task is done, so that it can be gone on with; None if there is none.

    Args:
        questions: to be cut.
        is_there: of so many tasks, whether the one with this number is done.
    """
    sizes = (2**power for power in range(MOST.bit_length()) if 2**power <= questions)
    return next((size for size in sizes if any(is_there(size, number) for number in range(size))), None)


def _seconds(attempts: Path) -> Iterator[tuple[str, float]]:
    """Key and seconds of each task that ended well."""
    for line in attempts.read_text(encoding="utf-8").splitlines():
        note = json.loads(line)
        if note["cause"] == "done" and note["seconds"]:
            yield note["key"], note["seconds"]


class Speeds:
    """Questions a second that VLMs answered here, by VLM, type of numbers, executor and benchmark; in a file."""

    def __init__(self, logs: Path, executor: str) -> None:
        self.path, self.executor = logs / "speeds.json", executor
        self._known: dict[str, float] = read_json(self.path) if self.path.is_file() else {}

    def of(self, spec: Mapping[str, Any]) -> float:
        """Of answers to be given: measured on the same benchmark, else on another, else assumed."""
        start = self._name(spec, "")
        others = [speed for name, speed in self._known.items() if name.startswith(start)]
        return self._known.get(self._name(spec, spec["benchmark"]), min(others, default=ASSUMED))

    def note(self, done: Iterable[Outcome], questions: Mapping[str, int]) -> None:
        """Note how long tasks took.

        Args:
            done: that ended well in one run, at the first attempt.
            questions: of each task, by key.
        """
        seconds: dict[str, float] = {}
        for folder in {one.log.parent for one in done if one.log is not None}:
            try:
                seconds |= dict(_seconds(folder / ATTEMPTS))
            except (OSError, ValueError, KeyError, TypeError) as error:  # a run does not end for want of an estimate
                log.warning("%s cannot be read, so that nothing is known of speeds: %r", folder / ATTEMPTS, error)
        tasks: dict[str, Task] = {one.task.key: one.task for one in done if one.attempts == 1}
        totals: dict[str, list[float]] = {}
        for key in tasks.keys() & seconds.keys() & questions.keys():
            total = totals.setdefault(self._name(tasks[key].spec, tasks[key].spec["benchmark"]), [0.0, 0.0])
            total[0] += questions[key]
            total[1] += seconds[key]
        if totals:
            self._known |= {name: round(asked / taken, 3) for name, (asked, taken) in totals.items()}
            outputs.write_json(self.path, dict(sorted(self._known.items())))

    def _name(self, spec: Mapping[str, Any], benchmark: str) -> str:
        return f"{self.executor} {spec['vlm']} {spec['dtype']} {benchmark}"
