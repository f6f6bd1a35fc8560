"""Before any work starts: checks of a list of tasks, and what a run of them would do, and why.

To explain runs and writes nothing, and reads no file of a result.
"""

import contextlib
import inspect
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster import fingerprint as code_module
from cluster.errors import BadTask, CorruptResult
from cluster.store import verdicts
from cluster.store.layout import CODE, GONE, check_out, is_published, replace_text
from cluster.store.publish import About, Manifest
from cluster.task import Store, Task, canonical, display, resolve_call

log = logging.getLogger(__name__)

LONGEST_LOG_NAME = 120
NOTHING_LIKE_IT = "nothing like it is published"
DAMAGED = "damaged"
UNKNOWN_CODE = "code (which module is not on record)"
SHOWN, LONGEST = 3, 30  # names or values in a list, characters of a value
_DIGEST = re.compile("[0-9a-f]{32}")
_CODE = ""  # the path of no entry


@dataclass(frozen=True)
class Planned:
    """A task that was checked."""

    task: Task
    out: Path  # absolute, without links in its parent
    log_name: str  # a file name for its logs, unique in the run
    published: bool


def check_tasks(tasks: Iterable[Task]) -> list[Planned]:
    """Check every task.

    `BadTask` names two with one `out`, an `out` inside another's or with the result of another task, and a call that
    workers would not find.
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
            raise BadTask(f"task {one.task.name!r} publishes {out}, inside which another one does: keep them apart")
        if one.published and out.name != one.task.key and (key := Manifest.read(out).about.key) != one.task.key:
            raise BadTask(
                f"task {one.task.name!r}: {out} holds the result {key} of another task, call, spec or code "
                f"(this one makes {one.task.key}): remove it, or publish elsewhere"
            )
    return list(planned.values())


def _log_name(task: Task, taken: set[str]) -> str:
    name = re.sub(r"[^A-Za-z0-9_.=+-]+", "_", task.name).lstrip(".")[:LONGEST_LOG_NAME] or "task"
    if name in taken:
        name = f"{name}-{task.key[:8]}-{len(taken)}"
    taken.add(name)
    return name


def make_folders(planned: Iterable[Planned]) -> None:
    """Make the folders to publish in; `BadTask` names one that cannot be written."""
    for folder in sorted({one.out.parent for one in planned if not one.published}):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError("no permission to write there")
        except OSError as error:
            raise BadTask(f"cannot publish in the folder {folder}: {error}") from error


@dataclass
class Kind:
    """What would become of the tasks of one kind."""

    kind: str
    published: int = 0
    run: dict[str, list[str]] = field(default_factory=dict)  # names of the tasks that would run, by reason
    faults: list[str] = field(default_factory=list)  # of results: damaged, or touched, so that a run reads them first

    def lines(self) -> Iterator[str]:
        """The same for people."""
        yield f"{self.kind}: {self.published} published, {sum(map(len, self.run.values()))} would run"
        for reason, tasks in self.run.items():
            yield f"  {len(tasks)} of them: {reason}"
            yield f"    {_some([display(task) for task in tasks])}"
        if self.faults:
            yield f"  {_some(self.faults)}"


def explain(
    tasks: Iterable[Task], store: Store, spec_of: Callable[[About], dict[str, Any]] = lambda about: about.spec
) -> list[Kind]:
    """Say what `run` would skip and what it would do, each with the reason.

    A task that is not published is compared with the nearest result of its kind and call: fewest differing entries.
    The store has these, and the modules behind each digest of code. `spec_of` gives the spec of a published result as
    its task has it, where they differ.
    """
    kinds: dict[str, Kind] = {}
    missing: dict[tuple[Path, str], list[Task]] = {}
    for one in check_tasks(tasks):
        kind = kinds.setdefault(one.task.kind, Kind(one.task.kind))
        fault, usable = fault_of(one.out) if one.published else ("", False)
        kind.faults += [fault] if fault else []
        kind.published += usable
        if fault and not usable:
            kind.run.setdefault(DAMAGED, []).append(one.task.name)
        elif not usable:
            missing.setdefault((one.out.parent, one.task.call_name), []).append(one.task)
    for (folder, call), some in missing.items():
        there = [(spec_of(about), about.code) for about in _published(folder) if about.call == call]
        for reason, names in _grouped(some, there, store).items():
            kinds[some[0].kind].run.setdefault(reason, []).extend(names)
    return list(kinds.values())


def fault_of(out: Path) -> tuple[str, bool]:
    """What sizes and remembered verdicts say against a published result, "" if nothing; and whether it may be whole."""
    try:
        for file in Manifest.read(out).files:
            path = f"{out}/{file.path}"
            found = os.lstat(path)
            if found.st_size != file.bytes:
                return f"{path} has {found.st_size} bytes, its manifest says {file.bytes}", False
        known = verdicts.recall(out)
        touched = bool(known) and known != verdicts.marks(out)
    except GONE as error:
        return f"{error.filename} is missing", False
    except CorruptResult as error:
        return str(error), False
    return f"{out} was touched since it was found whole: it is read first" if touched else "", True


def record_code(store: Store, tasks: Iterable[Task]) -> None:
    """Keep what is behind the digests of code of these tasks, for `explain` to compare a later one with."""
    for code, call in {task.code: task.call for task in tasks}.items():
        path = store.root / CODE / f"{code}.json"
        if code != code_module.fingerprint(call) or path.exists():
            continue
        try:
            path.parent.mkdir(exist_ok=True, parents=True)
            replace_text(path, json.dumps(code_module.parts(call), indent=1))
        except OSError as error:  # a later plan cannot name the module then
            log.info("the modules behind %s are not on record: %s", code, error)


def forget_code(store: Store, seconds: float) -> None:
    """Drop records of code that are so old, and that no published result refers to."""
    used = {about.code for folder in store.kinds() for about in _published(folder)}
    for path in (store.root / CODE).glob("*.json"):
        if path.stem not in used and time.time() - path.stat().st_mtime >= seconds:
            path.unlink(missing_ok=True)


def tasks_of(name: str) -> list[Task]:
    """What the function `module:function` returns; `BadTask` unless it takes no arguments and that is tasks."""
    if not all(name.partition(":")):
        raise BadTask(f"{name!r} is not MODULE:FUNCTION, such as experiment:tasks")
    function = resolve_call(name)
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise BadTask(f"{name} cannot be called without arguments: {error}") from error
    returned = function()
    tasks: list[Any] = list(returned) if isinstance(returned, Iterable) else [returned]
    if not all(isinstance(task, Task) for task in tasks):
        raise BadTask(f"{name} returned {display(repr(returned))[:80]}, not a list of tasks")
    return tasks


def _published(folder: Path) -> Iterator[About]:
    for entry in folder.iterdir() if folder.is_dir() else ():
        if not entry.name.startswith(".") and is_published(entry):
            with contextlib.suppress(CorruptResult):  # `verify` names it
                yield Manifest.read(entry).about


def _grouped(tasks: Sequence[Task], there: Sequence[tuple[dict[str, Any], str]], store: Store) -> dict[str, list[str]]:
    """Names by what differs from the nearest result, of tasks of one call; `there` has specs and codes of results."""
    if not there:
        return {NOTHING_LIKE_IT: [task.name for task in tasks]}
    old = [_leaves(spec, "", {_CODE: code}) for spec, code in sorted(there, key=lambda one: canonical(one[0]))]
    new = [_leaves(task.spec, "", {_CODE: task.code}) for task in tasks]
    groups: dict[tuple[str, ...], tuple[list[str], dict[str, dict[str, None]]]] = {}
    for task, ours, nearest in zip(tasks, new, _nearest(old, new), strict=True):
        theirs, changes = old[nearest], dict[str, dict[str, None]]()
        for path in sorted(path for path in {**theirs, **ours} if theirs.get(path) != ours.get(path)):
            if path == _CODE:
                changes[_changed_code(store, theirs[path], task)] = {}
            else:  # items of a list together
                values = changes.setdefault(re.sub(r"\[\d+\]", "[]", path), {})
                values[f"{_short(theirs.get(path))} -> {_short(ours.get(path))}"] = None
        names, values_of = groups.setdefault(tuple(changes), ([], changes))
        names.append(task.name)
        for path, values in changes.items():
            values_of[path].update(values)
    return {
        "; ".join(f"{path}: {_some([*values])}" if values else path for path, values in values_of.items()): names
        for names, values_of in groups.values()
    }


def _leaves(value: Any, path: str, found: dict[str, str]) -> dict[str, str]:
    """Add every entry of a spec, as text, by its dotted path."""
    if isinstance(value, dict) and value:
        for name, one in value.items():
            _leaves(one, f"{path}.{name}" if path else name, found)
    elif isinstance(value, list) and value:
        for index, one in enumerate(value):
            _leaves(one, f"{path}[{index}]", found)
    else:
        found[path] = repr(value)
    return found


def _nearest(old: Sequence[dict[str, str]], new: Sequence[dict[str, str]]) -> list[int]:
    """Of each of `new` the first of `old` with the fewest differing entries; of these, one whose code differs."""
    import numpy as np  # not above: only plans need it

    columns, weights = [], []
    for path in dict.fromkeys(path for leaves in (*old, *new) for path in leaves):
        numbers: dict[str | None, int] = {}
        column = [numbers.setdefault(leaves.get(path), len(numbers)) for leaves in (*old, *new)]
        if len(numbers) > 1:
            columns.append(column)
            weights.append(1 if path == _CODE else 2)
    table = np.array(columns, np.int32).reshape(len(columns), len(old) + len(new))
    published, weight = table[:, : len(old)], np.array(weights, np.int32)
    return [int((weight @ (published != table[:, [number]])).argmin()) for number in range(len(old), table.shape[1])]


def _changed_code(store: Store, old: str, task: Task) -> str:
    """Which modules and files of data changed since a digest of code."""
    if not (_DIGEST.fullmatch(old) and _DIGEST.fullmatch(task.code)):
        return f"code: version {_short(old)} -> {_short(task.code)}"
    try:
        before: dict[str, str] = json.loads((store.root / CODE / f"{old}.json").read_bytes())
    except (OSError, ValueError):
        return UNKNOWN_CODE
    after = code_module.parts(task.call)
    changed = sorted(name for name in before.keys() & after.keys() if before[name] != after[name])
    new, gone = sorted(after.keys() - before.keys()), sorted(before.keys() - after.keys())
    return f"code: {_some([*changed, *(f'new {name}' for name in new), *(f'gone {name}' for name in gone)])}"


def _short(text: str | None) -> str:
    text = "nothing" if text is None else text.strip("'")
    return display(text if len(text) <= LONGEST else f"{text[:12]}...")


def _some(texts: Sequence[str]) -> str:
    rest = len(texts) - SHOWN
    return ", ".join(texts[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")
