"""What a run of some tasks would do, and why. Nothing is run or written, and no file of a result is read."""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster import fingerprint as code_module
from cluster.driver.plan import check_tasks
from cluster.errors import BadTask, CorruptResult
from cluster.results import Store
from cluster.store import verdicts
from cluster.store.faults import GONE
from cluster.store.layout import CODE, new_attempt
from cluster.store.publish import About, Manifest, is_published
from cluster.task import Task, canonical, display, resolve_call

log = logging.getLogger(__name__)

NOTHING_LIKE_IT = "nothing like it is published"
UNKNOWN_CODE = "code (which module is not on record)"
SHOWN, LONGEST = 3, 30  # values or names of a group, characters of a value
_DIGEST = re.compile("[0-9a-f]{32}")
_CODE = ""  # the path of no entry


@dataclass
class Group:
    """Tasks that would run for one reason."""

    why: list[str]
    tasks: list[str]


@dataclass
class Kind:
    """What would become of the tasks of one kind."""

    kind: str
    published: int = 0
    changed: list[str] = field(default_factory=list)
    """Of those, files that were touched since they were found whole: a run reads them, and mends what is damaged."""
    run: list[Group] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        """The same for people."""
        yield f"{self.kind}: {self.published} published, {sum(len(group.tasks) for group in self.run)} would run"
        for group in self.run:
            yield f"  {len(group.tasks)} of them: {'; '.join(group.why)}"
            yield f"    {_some([display(task) for task in group.tasks])}"
        if self.changed:
            yield f"  read first, and made anew if damaged: {_some(self.changed)}"


def explain(
    tasks: Iterable[Task], store: Store, spec_of: Callable[[About], dict[str, Any]] = lambda about: about.spec
) -> list[Kind]:
    """Say what `run` would skip and what it would do, each with the reason.

    A task that is not published is compared with the nearest result of its kind and call: fewest differing entries.

    Args:
        tasks: as for `run`.
        store: that has their results, and the modules behind each digest of code.
        spec_of: spec of a published result as its task has it, where they differ.

    Raises:
        BadTask: as `run`.
    """
    kinds: dict[str, Kind] = {}
    missing: dict[tuple[Path, str], list[Task]] = {}
    damaged: dict[str, list[tuple[str, str]]] = {}
    for one in check_tasks(tasks):
        kind = kinds.setdefault(one.task.kind, Kind(one.task.kind))
        if not one.published:
            missing.setdefault((one.out.parent, one.task.call_name), []).append(one.task)
            continue
        fault, sure = fault_of(one.out)
        if sure:
            damaged.setdefault(kind.kind, []).append((one.task.name, fault))
            continue
        kind.published += 1
        kind.changed += [fault] if fault else []
    for name, faults in damaged.items():
        kinds[name].run.append(
            Group([f"damaged: {_some([fault for _, fault in faults])}"], [task for task, _ in faults])
        )
    for (folder, call), some in missing.items():
        there = [(spec_of(about), about.code) for about in _published(folder) if about.call == call]
        kinds[some[0].kind].run += _grouped(some, there, store)
    return list(kinds.values())


def fault_of(out: Path) -> tuple[str, bool]:
    """What speaks against a published result, by sizes and remembered verdicts; and whether it is surely damaged."""
    try:
        manifest = Manifest.read(out)
    except CorruptResult as error:
        return str(error), True
    known, changed = verdicts.recall(out), ""
    for file in manifest.files:
        path = f"{out}/{file.path}"
        try:
            found = os.lstat(path)
        except GONE:
            return f"{path} is missing", True
        if found.st_size != file.bytes:
            return f"{path} has {found.st_size} bytes, its manifest says {file.bytes}", True
        if file.path in known and known[file.path] != (verdicts.mark(found), file.sha256):
            changed = f"{path} was changed since it was found whole"
    return changed, False


def record_code(store: Store, tasks: Iterable[Task]) -> None:
    """Keep what is behind the digests of code of these tasks, for `explain` to compare a later one with."""
    for code, call in {task.code: task.call for task in tasks}.items():
        path = store.root / CODE / f"{code}.json"
        if code != code_module.fingerprint(call) or path.exists():
            continue
        fresh = path.with_name(f".{code}.{new_attempt()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh.write_text(json.dumps(code_module.parts(call), indent=1))
            fresh.replace(path)
        except OSError as error:  # a later plan cannot name the module then
            log.info("the modules behind %s are not on record: %s", code, error)


def tasks_of(name: str) -> list[Task]:
    """What the function `module:function`, which takes no arguments, returns.

    Raises:
        BadTask: there is no such function, it takes arguments, or it returns something else than tasks.
    """
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


def _grouped(tasks: Sequence[Task], there: Sequence[tuple[dict[str, Any], str]], store: Store) -> list[Group]:
    """Tasks of one call by what of them differs from the nearest result, of which `there` has the spec and the code."""
    if not there:
        return [Group([NOTHING_LIKE_IT], [task.name for task in tasks])]
    old = [_leaves(spec, "", {_CODE: code}) for spec, code in sorted(there, key=lambda one: canonical(one[0]))]
    new = [_leaves(task.spec, "", {_CODE: task.code}) for task in tasks]
    groups: dict[tuple[str, ...], tuple[dict[str, dict[str, None]], list[str]]] = {}
    for task, ours, nearest in zip(tasks, new, _nearest(old, new), strict=True):
        theirs = old[nearest]
        found: dict[str, dict[str, None]] = {}
        for path in sorted({**theirs, **ours}):
            if path == _CODE and theirs[path] != ours[path]:
                found.setdefault(_changed_code(store, theirs[path], task), {})
            elif theirs.get(path) != ours.get(path):
                values = found.setdefault(re.sub(r"\[\d+\]", "[]", path), {})
                values[f"{_short(theirs.get(path))} -> {_short(ours.get(path))}"] = None
        changes, names = groups.setdefault(tuple(found), (found, []))
        for path, values in found.items():
            changes[path] |= values
        names.append(task.name)
    return [
        Group([f"{path}: {_some(list(values))}" if values else path for path, values in changes.items()], names)
        for changes, names in groups.values()
    ]


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
    """Which modules and files of data changed between two digests of code."""

    def behind(code: str) -> dict[str, str] | None:
        if code == code_module.fingerprint(task.call):
            return code_module.parts(task.call)
        try:
            found: dict[str, str] = json.loads((store.root / CODE / f"{code}.json").read_bytes())
        except (OSError, ValueError):
            return None
        return found

    if not (_DIGEST.fullmatch(old) and _DIGEST.fullmatch(task.code)):
        return f"code: version {_short(old)} -> {_short(task.code)}"
    before, after = behind(old), behind(task.code)
    if before is None or after is None:
        return UNKNOWN_CODE
    said = [name for name in sorted(before.keys() & after.keys()) if before[name] != after[name]]
    said += [f"new {name}" for name in sorted(after.keys() - before.keys())]
    said += [f"gone {name}" for name in sorted(before.keys() - after.keys())]
    return f"code: {_some(said)}"


def _short(text: str | None) -> str:
    text = "nothing" if text is None else text.strip("'")
    return display(text if len(text) <= LONGEST else f"{text[:12]}...")


def _some(texts: Sequence[str]) -> str:
    rest = len(texts) - SHOWN
    return ", ".join(texts[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")
