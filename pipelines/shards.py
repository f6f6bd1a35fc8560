"""Into how many tasks the questions of a benchmark are cut: by how fast they were answered here before."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cluster import Task
from cluster.driver.board import Outcome
from ocvtp.json_files import read_json
from pipelines.stage import outputs

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
            for line in (folder / "attempts.jsonl").read_text(encoding="utf-8").splitlines():
                note = json.loads(line)
                if note["cause"] == "done" and note["seconds"]:
                    seconds[note["key"]] = note["seconds"]
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
