"""Checks of a list of tasks before any work starts."""

from __future__ import annotations

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
    planned: list[Planned] = []
    by_out: dict[Path, Task] = {}
    parents: dict[Path, Path] = {}
    logs: set[str] = set()
    for task in tasks:
        if not isinstance(task, Task):
            raise BadTask(f"{task!r} is not a Task")
        check_out(task.out)
        if task.out.parent not in parents:
            parents[task.out.parent] = task.out.parent.resolve()
        out = parents[task.out.parent] / task.out.name
        if out in by_out:
            raise BadTask(f"tasks {by_out[out].name!r} and {task.name!r} both publish {out}: give each its own")
        by_out[out] = task
        planned.append(Planned(task, out, _log_name(task, logs), is_published(out)))
    _check_calls(planned)
    _check_nesting(by_out)
    for one in planned:
        if one.published:
            _check_same(one)
    return planned


def _log_name(task: Task, taken: set[str]) -> str:
    base = re.sub(r"[^A-Za-z0-9_.=+-]+", "_", task.name).lstrip(".")[:LONGEST_LOG_NAME] or "task"
    name, number = base, 1
    while name in taken:
        number += 1
        name = f"{base}-{task.key[:8]}" if number == 2 else f"{base}-{task.key[:8]}-{number}"
    taken.add(name)
    return name


def _check_calls(planned: list[Planned]) -> None:
    for call in {one.task.call for one in planned}:
        module = sys.modules.get(call.__module__)
        if module is not None and getattr(module, call.__qualname__, None) is not call:
            raise BadTask(f"{call.__module__}.{call.__qualname__} names something else than the call of the task")


def _check_nesting(by_out: dict[Path, Task]) -> None:
    folders = {out.parent for out in by_out}
    parents = {parent for folder in folders for parent in (folder, *folder.parents)}
    for out, task in by_out.items():
        if out in parents:
            raise BadTask(f"task {task.name!r} publishes {out}, inside which another task publishes: keep them apart")


def _check_same(one: Planned) -> None:
    if one.out.name == one.task.key:
        return  # its name says so
    key = Manifest.read(one.out).about.key
    if key != one.task.key:
        raise BadTask(
            f"task {one.task.name!r}: {one.out} holds the result {key} of another task, call, spec or code "
            f"(this one makes {one.task.key}): remove it, or publish elsewhere"
        )


def make_folders(planned: Iterable[Planned]) -> None:
    """Make the folders to publish in; `BadTask` names one that cannot be written."""
    for folder in sorted({one.out.parent for one in planned if not one.published}):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadTask(f"cannot make the folder {folder}: {error}") from error
        if not os.access(folder, os.W_OK | os.X_OK):
            raise BadTask(f"the folder {folder} cannot be written")
