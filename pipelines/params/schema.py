"""Checks a YAML file against frozen dataclasses and says everything that is wrong with it at once.

A field is made by `entry(default, check)`. A check takes the value from the file and returns what the program works
with, or raises `Wrong` with what would be right. `read` collects every problem with the path of its key, so that a
user mends a file once and not once a mistake.
"""

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, field, fields
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml

from ocvtp.errors import BadInput

Check = Callable[[Any], Any]
T = TypeVar("T")


class Wrong(Exception):
    """A value is not legal. The text says what would be; `at` is the place inside the value, such as `[2]`."""

    def __init__(self, text: str, at: str = "") -> None:
        super().__init__(text)
        self.text = text
        self.at = at


class Problems:
    """What is wrong with one file, in the order in which it was found."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.lines: list[str] = []

    def add(self, path: str, text: str) -> None:
        """Note that the entry at `path` is wrong."""
        self.lines.append(f"{path}: {text}")

    def raise_if_any(self) -> None:
        """Raise one `BadInput` that lists them all."""
        if not self.lines:
            return
        count = f"{len(self.lines)} entries are" if len(self.lines) > 1 else "an entry is"
        raise BadInput(f"{self.file}: {count} wrong\n" + "\n".join(f"  {line}" for line in self.lines))


def entry(default: Any, check: Check) -> Any:
    """A field of a dataclass that is read from the file."""
    mutable = isinstance(default, list | dict)
    factory = {"default_factory": lambda: default} if mutable else {"default": default}
    return field(metadata={"check": check}, **factory)


def nested(cls: type[T], reader: Callable[[Any, Problems, str], T] | None = None) -> dict[str, Any]:
    """Metadata of a field that is a mapping of its own, read as the dataclass `cls`, by `reader` if given."""
    return {"section": reader or partial(read, cls)}


def read(cls: type[T], data: Any, problems: Problems, path: str = "") -> T:
    """Build `cls` from a mapping. What is wrong goes to `problems`, and its field keeps the default."""
    if not isinstance(data, Mapping):
        problems.add(path or "(the whole file)", f"{show(data)} is not a mapping of keys to values")
        return cls()
    # A field without a check is not for the file to give.
    legal = {item.name: item for item in fields(cast(Any, cls)) if item.metadata}
    values: dict[str, Any] = {}
    for key, value in data.items():
        where = f"{path}.{key}" if path else str(key)
        if key not in legal:
            problems.add(where, f"unknown key{nearest(str(key), legal)}")
        elif nested := legal[key].metadata.get("section"):
            values[key] = nested(value, problems, where)
        else:
            try:
                values[key] = legal[key].metadata["check"](value)
            except Wrong as wrong:
                problems.add(where + wrong.at, wrong.text)
    for item in legal.values():
        if item.name not in values and "section" not in item.metadata:
            values[item.name] = item.metadata["check"](_default(item))
    return cls(**values)


def _default(item: Any) -> Any:
    return item.default if item.default is not MISSING else item.default_factory()


def nearest(word: str, legal: Iterable[str]) -> str:
    """`; did you mean ...? (legal: ...)` for a message."""
    names = [str(name) for name in legal]
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{hint} (legal: {', '.join(names)})"


def show(value: Any) -> str:
    """The value as a message shows it: short, strings in quotes."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


# --- Checks ----------------------------------------------------------------------------------------------------------


def whole(low: int, high: int | None = None) -> Check:
    """An integer from `low` to `high`, both included."""

    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise Wrong(f"{show(value)} is not a whole number")
        if value < low or (high is not None and value > high):
            raise Wrong(f"{value} is out of range: {_range(low, high)}")
        return value

    return check


def number(low: float, high: float | None = None, *, above: bool = False) -> Check:
    """A finite number from `low` (or above it) to `high`."""

    def check(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise Wrong(f"{show(value)} is not a number")
        if not math.isfinite(value):
            raise Wrong(f"{value} is not a finite number")
        if value < low or (above and value == low) or (high is not None and value > high):
            raise Wrong(f"{value} is out of range: {_range(low, high, above)}")
        return float(value)

    return check


def _range(low: float, high: float | None, above: bool = False) -> str:
    start = f"more than {low}" if above else f"at least {low}"
    return start if high is None else f"{start} and at most {high}"


def flag(value: Any) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise Wrong(f"{show(value)} is neither true nor false")
    return value


def text(value: Any) -> str:
    """A string that is not empty."""
    if not isinstance(value, str) or not value.strip():
        raise Wrong(f"{show(value)} is not a text")
    return value


def choice(*legal: str) -> Check:
    """One of the given words."""

    def check(value: Any) -> str:
        if value not in legal or not isinstance(value, str):
            raise Wrong(f"{show(value)} is not legal{nearest(str(value), legal)}")
        return value

    return check


def optional(inner: Check) -> Check:
    """What `inner` takes, or null."""
    return lambda value: None if value is None else inner(value)


def either(word: str, inner: Check) -> Check:
    """The word, or what `inner` takes."""

    def check(value: Any) -> Any:
        if value == word:
            return value
        try:
            return inner(value)
        except Wrong as wrong:
            raise Wrong(f"{wrong.text}, nor is it {word!r}", wrong.at) from None

    return check


def many(inner: Check) -> Check:
    """A list, not empty, without repeats, of what `inner` takes; a tuple comes out."""

    def check(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise Wrong(f"{show(value)} is not a list")
        if not value:
            raise Wrong("the list is empty: at least one value is needed")
        seen: list[Any] = []
        for index, item in enumerate(value):
            try:
                clean = inner(item)
            except Wrong as wrong:
                raise Wrong(wrong.text, f"[{index}]{wrong.at}") from None
            if clean in seen:
                raise Wrong(f"{show(item)} is given twice", f"[{index}]")
            seen.append(clean)
        return tuple(seen)

    return check


def axis(inner: Check) -> Check:
    """An axis of the grid: one value or a list of values; a tuple comes out."""
    several = many(inner)
    return lambda value: several(value) if isinstance(value, list) else (inner(value),)


# --- YAML ------------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a key given twice is an error and `1e-3` is a number, as DVC reads it."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping; a repeated key raises `BadInput` with its line."""
        seen: list[Any] = []
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise BadInput(f"line {key_node.start_mark.line + 1}: the key {key!r} is given twice")
            seen.append(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def load_yaml(path: Path) -> Any:
    """The content of a YAML file; `BadInput` names the file and the line of what cannot be read."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506 - a subclass of the safe loader
    except FileNotFoundError:
        raise BadInput(f"{path} does not exist") from None
    except (yaml.YAMLError, UnicodeDecodeError, BadInput) as error:
        raise BadInput(f"{path} cannot be read as YAML: {error}") from None
