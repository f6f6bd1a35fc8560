"""The benchmarks by name: what benchmarks.yaml says of them."""

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any, Literal, get_args

import yaml

from ocvtp.errors import BadInput

DATA_IN_SPECS = ("benchmarks.yaml",)
"""Keys hold what it says of one benchmark (`cluster.fingerprint`)."""
Protocol = Literal["native", "paper"]
NATIVE: Protocol = "native"
Rule = Literal["mean", "f1", "mean_f1", "pairs", "all_right"]
Scale = Literal["share", "percent", "points"]
_CIRCLE = 1_000_000
"""MMBench asks a question again, its options in another order, under an index larger by multiples of this."""


@dataclass(frozen=True)
class Benchmark:
    """One benchmark; benchmarks.yaml says what each entry means."""

    name: str
    label: str
    task: str
    yaml: str
    hub: str
    split: str
    primary: str
    rule: Rule
    scale: Scale
    answer: str
    columns: tuple[str, ...]
    questions: int
    protocol: Protocol = NATIVE
    config: str | None = None
    revision: str | None = None
    unit: tuple[str, ...] = ()
    category: str | None = None
    only: str | None = None
    """The category that the primary counts; None: all."""
    chance: float | None = None
    differs: str | None = None
    higher_is_better: bool = True
    config_overrides: Mapping[str, Any] = field(default_factory=dict)

    @property
    def asking(self) -> dict[str, Any]:
        """What of this determines which questions are asked, and how: not how answers are scored."""
        names = ("name", "protocol", "task", "yaml", "hub", "config", "revision", "split", "columns", "rule", "unit")
        overrides = {key: value for key, value in self.config_overrides.items() if key != "metric_list"}
        return {**{name: getattr(self, name) for name in names}, "config_overrides": overrides}

    @property
    def paired(self) -> bool:
        """Questions come in units that may not be torn apart."""
        return self.rule in ("pairs", "all_right")

    def means_something(self, score: float | None) -> bool:
        """Whether percentages of a score say something: not where it is no better than chance, or 0."""
        return score is not None and score > (self.chance or 0)

    def unit_of(self, doc: Mapping[str, Any], doc_id: int) -> int | str:
        """What may not be torn apart in resampling: the row itself, or the name of the group it belongs to."""
        if self.rule == "all_right":
            return int(doc["index"]) % _CIRCLE
        return "/".join(str(doc[column]) for column in self.unit) if self.unit else doc_id

    def answer_of(self, doc: Mapping[str, Any]) -> str:
        """The right answer: of several annotators' the most frequent, of an option its letter."""
        answer = doc[self.answer]
        if isinstance(answer, int):
            return chr(ord("A") + answer)
        if not isinstance(answer, list):
            return str(answer)
        given = [str(item["answer"]) if isinstance(item, Mapping) else str(item) for item in answer]
        return Counter(given).most_common(1)[0][0] if given else ""

    def category_of(self, doc: Mapping[str, Any]) -> str:
        """The benchmark's own category of a row; empty where it has none."""
        return str(doc.get(self.category) or "") if self.category else ""


@cache
def benchmarks(protocol: Protocol = NATIVE) -> Mapping[str, Benchmark]:
    """All benchmarks, in the order of the paper's tables, asked and scored by a protocol."""
    return {name: _read(name, entry, protocol) for name, entry in yaml.safe_load(_source()).items()}


def benchmark(name: str, protocol: Protocol = NATIVE) -> Benchmark:
    """A benchmark by name.

    Raises:
        BadInput: there is none of this name, or no such protocol; says which there are.
    """
    found = benchmarks(checked(protocol)).get(name)
    if found is None:
        raise BadInput(f"no benchmark {name!r}; there are: {', '.join(benchmarks())}")
    return found


def checked(protocol: str) -> Protocol:
    """A protocol by name; `BadInput` if there is none of it."""
    known: tuple[Protocol, ...] = get_args(Protocol)
    for one in known:
        if one == protocol:
            return one
    raise BadInput(f"no protocol {protocol!r}; there are: {', '.join(known)}")


def fingerprint() -> str:
    """A digest of the catalogue, for keys of results that depend on it."""
    return hashlib.sha256(_source()).hexdigest()


def _source() -> bytes:
    return files("ocvtp.evaluation").joinpath("benchmarks.yaml").read_bytes()


def _read(name: str, entry: dict[str, Any], protocol: Protocol) -> Benchmark:
    changes = entry.pop("paper", {})
    if protocol != NATIVE:
        overrides = {**entry.get("config_overrides", {}), **changes.get("config_overrides", {})}
        entry = {**entry, **changes, "config_overrides": overrides}
    lists = {key: tuple(value) for key, value in entry.items() if key in ("columns", "unit")}
    return Benchmark(name=name, protocol=protocol, **{**entry, **lists})
