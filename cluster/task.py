"""Tasks, each a module-level function and the JSON that determines its result, and the store they publish to."""

import hashlib
import importlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from cluster import fingerprint as code_module
from cluster.errors import BadTask
from cluster.store.layout import ATTEMPTS, CODE, LOCKS, LOGS, VERDICTS, is_published, temporaries
from cluster.store.lease import read_owner

_OWN = (LOGS, LOCKS, VERDICTS, CODE)
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")

Call = Callable[..., object]  # `call(spec, folder)`, or `call(spec, folder, inputs)` of a task with inputs
Status = Literal["published", "running", "failed", "missing"]
"""Running: an attempt holds its lease, on whatever machine; failed: the last attempt did not publish."""


@dataclass(frozen=True)
class Resources:
    """What one attempt may use: cores (also its thread count), whole GPUs, host memory and wall time."""

    cpus: int = 1
    gpus: int = 0
    memory_gb: float = 2.0
    minutes: float = 60.0

    def __post_init__(self) -> None:
        for name, least in (("cpus", 1), ("gpus", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise BadTask(f"resources.{name} is {value!r}: a whole number, at least {least}")
        for name in ("memory_gb", "minutes"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise BadTask(f"resources.{name} is {value!r}: a number greater than zero")


def check_json(value: object, where: str = "spec") -> None:
    """Raise `BadTask`, which names the first offending entry, unless `value` is the same after a trip through JSON."""
    if isinstance(value, float) and not math.isfinite(value):
        raise BadTask(f"{where} is {value}: JSON has no such number")
    if value is None or isinstance(value, str | bool | int | float):
        return
    if isinstance(value, list):
        for index, item in enumerate(value):
            check_json(item, f"{where}[{index}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise BadTask(f"{where} has the key {key!r} of type {type(key).__name__}: use strings")
            check_json(item, f"{where}.{key}")
    else:
        hint = {"tuple": "a list", "PosixPath": "a string", "set": "a sorted list"}.get(type(value).__name__)
        raise BadTask(f"{where} is a {type(value).__name__}, not JSON: use {hint or 'plain numbers and strings'}")


def canonical(value: object) -> str:
    """One JSON text for equal values: keys sorted, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def task_key(call: str, spec: Mapping[str, Any], code: str) -> str:
    """Name of a result (24 hex digits): a function of all that determines it."""
    text = canonical({"call": call, "spec": dict(spec), "code": code})
    return hashlib.sha256(text.encode()).hexdigest()[:24]


@dataclass(frozen=True)
class Lookup:
    """What is known of a task: its result, and the attempts that every run of its store has noted."""

    status: Status
    folder: Path  # of the result, once it is published
    attempts: tuple[dict[str, Any], ...]  # that ended, oldest first: time, attempt, cause, detail, node, ...
    log: Path | None  # of the last attempt that ended


@dataclass(frozen=True)
class Task:
    """One unit of work: `call(spec, folder)` writes its result into `folder`, then published as `out`.

    `spec` is JSON and holds all that determines the result, the checksums of its inputs too. `inputs`, JSON too, says
    where these lie: handed to the call after the folder if there are any, in neither key nor manifest. What the call
    puts under `folder/"resume"` is handed to the next attempt if this one dies, and never published. `kind`, `code`
    and `key` are computed where they are left empty; `Store.task` fills them, and `out`, in.
    """

    name: str
    call: Call
    spec: dict[str, Any]
    out: Path
    resources: Resources = field(default_factory=Resources)
    kind: str = ""
    code: str = ""
    key: str = ""
    inputs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.name:
            raise BadTask("a task needs a name that people recognise in progress and logs")
        if not isinstance(self.spec, dict):
            raise BadTask(f"task {self.name!r}: spec is a {type(self.spec).__name__}, not a dict")
        try:
            check_json(self.spec)
            check_json(self.inputs, "inputs")
            call = self.call_name
            object.__setattr__(self, "out", Path(self.out))
            object.__setattr__(self, "kind", self.kind or self.out.parent.name)
            object.__setattr__(self, "code", self.code or code_module.fingerprint(self.call))
            object.__setattr__(self, "key", self.key or task_key(call, self.spec, self.code))
        except BadTask as error:
            raise BadTask(f"task {self.name!r}: {error}") from error

    @property
    def call_name(self) -> str:
        """`module:function` of the call."""
        return code_module.call_name(self.call)

    def lookup(self) -> Lookup:
        """What became of it: status, folder of the result, attempts and the last log."""
        out, found = self.out, []
        for path in sorted((out.parent.parent / LOGS).glob(f"*/{ATTEMPTS}")):
            lines = [line for line in path.read_text().splitlines() if self.key in line and line.endswith("}")]  # whole
            found += [(note, path.parent / note.get("log", "")) for note in map(json.loads, lines)]
        found = sorted((one for one in found if one[0]["key"] == self.key), key=lambda one: one[0]["time"])
        owners = filter(None, (read_owner(root) for root, _, _ in temporaries(out.parent, out.name)))
        status: Status = "failed" if found else "missing"
        if is_published(out):
            status = "published"
        elif any(owner.alive() is not False for owner in owners):
            status = "running"
        logs = [log for _, log in found if log.is_file()]
        return Lookup(status, out, tuple(note for note, _ in found), logs[-1] if logs else None)


@dataclass(frozen=True)
class Store:
    """A folder of published results, typically on a file system that all machines share.

    <root>/<kind>/<key>/       a result and its manifest.json
    <root>/logs/<run>/         logs of a run and of its attempts
    <root>/locks/<label>.json  owners of the runs at work
    <root>/verdicts/           which results were read and found whole
    <root>/code/<digest>.json  modules and files of data behind a digest of code
    """

    root: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", Path(self.root).absolute())

    def path(self, kind: str, key: str) -> Path:
        """Where the result `key` of this kind is, or would be, published."""
        for name, value in (("kind", kind), ("key", key)):
            if not _NAME.fullmatch(value):
                raise BadTask(f"{name} {value!r}: use letters, digits, `_`, `-` and `.`, not at the start")
        if kind in _OWN:
            raise BadTask(f"kind {kind!r} is a folder of the store itself: use another name")
        return self.root / kind / key

    def task(
        self,
        kind: str,
        name: str,
        call: Call,
        spec: dict[str, Any],
        *,
        resources: Resources | None = None,
        code: str = "",
    ) -> Task:
        """A `Task` whose result lies in this store, in the folder `kind`, under a key of its call, spec and code.

        `code` may be a declared version, instead of the fingerprint of the source.
        """
        task = Task(name, call, spec, self.root, resources or Resources(), kind, code)
        return replace(task, out=self.path(kind, task.key))

    def published(self) -> Iterator[Path]:
        """Every published folder, by kind and key."""
        for kind in self.kinds():
            yield from (path for path in sorted(kind.iterdir()) if path.name[0] != "." and is_published(path))

    def kinds(self) -> list[Path]:
        """The folders that hold results."""
        folders = self.root.iterdir() if self.root.is_dir() else ()
        return sorted(path for path in folders if path.is_dir() and path.name not in _OWN)

    @property
    def logs(self) -> Path:
        """Folder of the logs of all runs."""
        return self.root / LOGS


def resolve_call(name: str) -> Call:
    """The function that `module:function` names; `BadTask` if there is none that can be imported."""
    module, _, function = name.partition(":")
    try:
        call = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise BadTask(f"cannot import {name}: {error}") from error
    if not callable(call):
        raise BadTask(f"{name} is a {type(call).__name__}, not a function")
    return call  # type: ignore[no-any-return]


def display(name: str) -> str:
    """A task's name on one line."""
    return name if name.isprintable() else repr(name)[1:-1]
