"""The benchmarks by name: what benchmarks.yaml says of them."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any, Literal

import yaml

from ocvtp.errors import BadInput

DATA_IN_SPECS = ("benchmarks.yaml",)
"""Keys hold what it says of one benchmark (`cluster.fingerprint`)."""
Rule = Literal["mean", "f1", "pairs", "all_right"]
Scale = Literal["share", "percent", "points"]


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
    config: str | None = None
    revision: str | None = None
    unit: tuple[str, ...] = ()
    category: str | None = None
    only: str | None = None
    """The category that the primary counts; None: all."""
    chance: float | None = None
    higher_is_better: bool = True
    config_overrides: Mapping[str, Any] = field(default_factory=dict)

    @property
    def paired(self) -> bool:
        """Questions come in units that may not be torn apart."""
        return self.rule in ("pairs", "all_right")


@cache
def benchmarks() -> Mapping[str, Benchmark]:
    """All benchmarks, in the order of the paper's tables."""
    return {name: _read(name, entry) for name, entry in yaml.safe_load(_source()).items()}


def benchmark(name: str) -> Benchmark:
    """A benchmark by name.

    Raises:
        BadInput: there is none of this name; says which there are.
    """
    found = benchmarks().get(name)
    if found is None:
        raise BadInput(f"no benchmark {name!r}; there are: {', '.join(benchmarks())}")
    return found


def fingerprint() -> str:
    """A digest of the catalogue, for keys of results that depend on it."""
    return hashlib.sha256(_source()).hexdigest()


def _source() -> bytes:
    return files("ocvtp.evaluation").joinpath("benchmarks.yaml").read_bytes()


def _read(name: str, entry: dict[str, Any]) -> Benchmark:
    lists = {key: tuple(value) for key, value in entry.items() if key in ("columns", "unit")}
    return Benchmark(name=name, **{**entry, **lists})
