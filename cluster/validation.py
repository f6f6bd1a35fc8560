"""Settings: read strictly, checked by pydantic, and all that is wrong with them said at once.

Workers do not import this module: pydantic takes longer to import than a short task to run.
"""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from cluster.errors import BadConfig


class Section(BaseModel):
    """A mapping of a file: no key that it does not know, no value of another type, such as "2" for 2."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


S = TypeVar("S", bound=Section)
Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class Problems:
    """What is wrong with settings, in the order in which it was found."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.lines: list[str] = []

    def add(self, path: str, text: str) -> None:
        """Note that the entry at `path` is wrong."""
        self.lines.append(f"{path or '(all of it)'}: {text}")

    def take(self, error: ValidationError, model: type[Section], data: object, above: str = "") -> None:
        """Note what pydantic found in `data`, which lies at the path `above`."""
        found: dict[str, list[str]] = {}
        for one in error.errors(include_url=False):
            path = above
            for _, step in walk(one["loc"], data):
                path += f"[{step}]" if isinstance(step, int) else f".{step}" if path else str(step)
            found.setdefault(path, []).append(_text(one, model))
        for path, texts in found.items():  # several: none of the types that a value may have fits
            others = [text.partition(" should be ")[2] or text for text in texts[1:]]
            self.add(path, ", or ".join([texts[0], *others]))

    def raise_as(self, error: type[Exception]) -> None:
        """Raise one error that lists them all, if there are any."""
        if self.lines:
            count = f"{len(self.lines)} entries are" if len(self.lines) > 1 else "an entry is"
            raise error(f"{self.where}: {count} wrong\n" + "\n".join(f"  {line}" for line in self.lines))


def settle(model: type[S], data: object, where: str, above: str = "") -> S:
    """Make a section of `data`; `BadConfig` lists all that is wrong with it."""
    data = {} if data is None else data
    try:
        return model.model_validate(data)
    except ValidationError as error:
        problems = Problems(where)
        problems.take(error, model, data, above)
        problems.raise_as(BadConfig)
        raise


def nearest(word: object, legal: Iterable[str]) -> str:
    """`; did you mean ...? (legal: ...)` for a message."""
    names = list(legal)
    return f"{_hint(word, names)} (legal: {', '.join(names)})"


def _hint(word: object, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(word), names, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def show(value: object) -> str:
    """The value as a message shows it: short, strings in quotes."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def walk(loc: Sequence[int | str], data: Any) -> Iterator[tuple[Any, int | str]]:
    """The steps of a place that are in the data, with what each is a step into; pydantic's own are left out."""
    for step in loc:
        if (isinstance(data, Mapping) and step in data) or (isinstance(data, list) and step in range(len(data))):
            yield data, step
            data = data[step]  # type: ignore[index]


def _text(one: Any, model: type[Section]) -> str:
    """What pydantic says, with the value that it speaks of and, for a wrong word, the nearest right one."""
    value, loc = one["input"], one["loc"]
    match one["type"]:
        case "extra_forbidden":
            return f"unknown key{nearest(loc[-1], _fields(model, loc[:-1]))}"
        case "missing":
            return f"{loc[-1]} is missing"
        case "value_error":
            return str(one["ctx"]["error"])
        case "model_type" | "dict_type":
            return f"{show(value)} is not a mapping of keys to values"
        case "tuple_type" | "list_type":
            return f"{show(value)} is not a list"
        case "literal_error":
            legal = re.findall("'([^']*)'", one["ctx"]["expected"])
            return f"{show(value)} should be {one['ctx']['expected']}{_hint(value, legal)}"
    return re.sub(r"^\w+ (?=should|is)", lambda _: f"{show(value)} ", one["msg"])


def _fields(model: type[Section], loc: Sequence[int | str]) -> Iterable[str]:
    """The legal keys of the section at a place."""
    for step in (step for step in loc if isinstance(step, str)):  # a number is a place in a list of sections
        annotation = model.model_fields[step].annotation
        kinds = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type)]
        model = next(kind for kind in kinds if issubclass(kind, Section))
    return model.model_fields


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a key given twice is an error, `1e-3` a number and `on` or `no` a text, as DVC reads it."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping; a repeated key raises `ValueError` with its line."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for place, (key, (key_node, _)) in enumerate(zip(keys, node.value, strict=True)):
            if key in keys[:place]:
                raise ValueError(f"line {key_node.start_mark.line + 1}: the key {key!r} is given twice")
        return super().construct_mapping(node, deep)


_SCIENTIFIC = re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _SCIENTIFIC, list("-+.0123456789"))
for _c in "oOyYnN":
    _Loader.yaml_implicit_resolvers[_c] = [r for r in _Loader.yaml_implicit_resolvers[_c] if not r[0].endswith("bool")]


def load_yaml(path: Path) -> Any:
    """The content of a YAML file; `BadConfig` names the file and the line of what cannot be read."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506 - a subclass of the safe loader
    except FileNotFoundError:
        raise BadConfig(f"{path} does not exist") from None
    except (yaml.YAMLError, OSError, ValueError) as error:
        raise BadConfig(f"{path} cannot be read as YAML: {error}") from None
