"""Checks of a list of tasks before any work starts."""

import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import BadTask
from cluster.store.layout import check_out
from cluster.store.publish import Manifest, is_published
from cluster.task import Task

LONGEST_LOG_NAME = 120


@dataclass(frozen=True)
class Planned:
    """A task that was checked."""

    task: Task
    out: Path  # absolute, without links in its parent
    log_name: str  # a file name for its logs, unique in the run
    published: bool


def check_tasks(tasks: Iterable[Task]) -> list[Planned]:
    """Check every task.

    Raises:
        BadTask: two tasks with one `out`, one inside another's, a call that workers would not find, or an `out` that
            holds the result of another task.
    """
    planned: dict[Path, Planned] = {}
    parents: dict[Path, Path] = {}
    logs: set[str] = set()
    for task in tasks:
        if not isinstance(task, Task):
            raise BadTask(f"{task!r} is not a Task")
        check_out(task.out)
        if (parent := task.out.parent) not in parents:
            parents[parent] = parent.resolve()
        out = parents[parent] / task.out.name
        if out in planned:
            both = f"{planned[out].task.name!r} and {task.name!r}"
            raise BadTask(f"tasks {both} both publish {out}: give each its own")
        planned[out] = Planned(task, out, _log_name(task, logs), is_published(out))
    for call in {one.task.call for one in planned.values()}:
        module = sys.modules.get(call.__module__)
        if module is not None and getattr(module, call.__qualname__, None) is not call:
            raise BadTask(f"{call.__module__}.{call.__qualname__} names something else than the call of the task")
    around = {folder for parent in parents.values() for folder in (parent, *parent.parents)}
    for out, one in planned.items():
        if out in around:
            raise BadTask(
                f"task {one.task.name!r} publishes {out}, inside which another task publishes: keep them apart"
            )
        if one.published and out.name != one.task.key and (key := Manifest.read(out).about.key) != one.task.key:
            raise BadTask(
                f"task {one.task.name!r}: {out} holds the result {key} of another task, call, spec or code "
                f"(this one makes {one.task.key}): remove it, or publish elsewhere"
            )
    return list(planned.values())


def _log_name(task: Task, taken: set[str]) -> str:
    base = name = re.sub(r"[^A-Za-z0-9_.=+-]+", "_", task.name).lstrip(".")[:LONGEST_LOG_NAME] or "task"
    number = 1
    while name in taken:
        number += 1
        name = f"{base}-{task.key[:8]}" if number == 2 else f"{base}-{task.key[:8]}-{number}"
    taken.add(name)
    return name


def make_folders(planned: Iterable[Planned]) -> None:
    """Make the folders to publish in; `BadTask` names one that cannot be written."""
    for folder in sorted({one.out.parent for one in planned if not one.published}):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadTask(f"cannot make the folder {folder}: {error}") from error
        if not os.access(folder, os.W_OK | os.X_OK):
            raise BadTask(f"the folder {folder} cannot be written")
