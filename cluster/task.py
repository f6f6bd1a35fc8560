"""A task: a module-level function, the JSON that determines its result, and where it is published."""

from __future__ import annotations

import hashlib
import importlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster import fingerprint as code_module
from cluster.errors import BadTask

if TYPE_CHECKING:
    from cluster.store.lookup import Lookup

Call = Callable[..., object]
"""`call(spec, folder)`, or `call(spec, folder, inputs)` of a task with inputs."""


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
    if value is None or isinstance(value, str | bool | int):
        return
    if isinstance(value, float):
        if not math.isfinite(value):
            raise BadTask(f"{where} is {value}: JSON has no such number")
    elif isinstance(value, list):
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
        from cluster.store.lookup import lookup  # not above: workers have no use for it

        return lookup(self.out, self.key)


def resolve_call(name: str) -> Call:
    """The function that `module:function` names; `BadTask` if there is none that can be imported."""
    module, _, function = name.partition(":")
    try:
        call = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise BadTask(f"cannot import {name}: {error}") from error
    if not callable(call):
        raise BadTask(f"{name} is a {type(call).__name__}, not a function")
    return call  # type: ignore[no-any-return]


def display(name: str) -> str:
    """A task's name on one line."""
    return name if name.isprintable() else repr(name)[1:-1]
