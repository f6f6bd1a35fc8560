"""Into how many tasks the questions of a benchmark are cut: by how fast they were answered here before."""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from cluster import CorruptResult, Manifest, Task, is_published
from cluster.driver.board import Outcome
from cluster.store.layout import ATTEMPTS
from ocvtp.json_files import read_json
from pipelines.params.model import MOST_SHARDS
from pipelines.stage import outputs

log = logging.getLogger(__name__)
ASSUMED = 2.0
"""Questions a second, until some were answered."""


def count_of(questions: int, speed: float, minutes: float) -> int:
    """Tasks of at most so many minutes each: 1, 2, 4, ..., so that a speed that is a little other changes nothing."""
    tasks = 1
    while 2 * tasks <= min(MOST_SHARDS, questions) and questions / tasks > 60 * minutes * speed:
        tasks *= 2
    return tasks


class Published:
    """Answers that a store has, and into how many tasks their questions were cut.

    Args:
        folder: of the store, with a result for each task.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def cut(self, key_of: Callable[[int, int], str], *, whole: bool) -> int | None:
        """Of how many tasks the smallest cut is of which all tasks are there, or any; None if there is none.

        Args:
            key_of: of a task, by its number and by how many there are.
            whole: all of them are there; else any, so that it can be gone on with.
        """
        enough = all if whole else any
        for count in self._cuts:
            if enough(key_of(number, count) in self._keys for number in range(count)):
                return count
        return None

    @cached_property
    def _keys(self) -> frozenset[str]:
        there = self._folder.iterdir() if self._folder.is_dir() else ()
        return frozenset(path.name for path in there if not path.name.startswith(".") and is_published(path))

    @cached_property
    def _cuts(self) -> list[int]:
        found = set()
        for key in self._keys:
            try:
                found.add(int(Manifest.read(self._folder / key).about.spec["shard"][1]))
            except CorruptResult as error:  # it is answered anew
                log.warning("%s", error)
        return sorted(found)


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
