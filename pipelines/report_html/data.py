"""Reads what the stages left on disk. Whatever is not there is None or empty; what is there but wrong is an
error.
"""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

from ocvtp.errors import BadInput, Corrupt
from ocvtp.json_files import read_json

AXES = ("layer", "loss", "slots", "top_k")
"""What tells apart pruners and their use within one method."""
_SUMMARY_KEYS = (
    "vlm", "method", "tokens", "share", "benchmarks", "average", "changes", "difference", "against", "coverage", *AXES
)  # fmt: skip
_SCORE_KEYS = ("vlm", "method", "benchmark", "seed", "score", "relative", "path", "changes", *AXES)
_COST_KEYS = ("vlm", "method", "tokens", "flops", "paper_flops", "paper_pruner_flops")

Row = dict[str, Any]


@dataclass(frozen=True)
class Pruner:
    """One trained pruner: its folder's name, what it is, its curves by column, and what `ablate` changed."""

    vlm: str
    name: str
    config: Row
    metrics: Row
    curves: Mapping[str, Sequence[float | None]]
    changes: Row = field(default_factory=dict)

    @property
    def group(self) -> str:
        """Its name without the seed: pruners of one group differ in nothing else."""
        return self.name.rsplit("-seed_", 1)[0]


@dataclass(frozen=True)
class Results:
    """Everything that the report shows."""

    root: Path
    scores: Sequence[Row]
    summary: Sequence[Row]
    measures: Sequence[Row] = ()
    efficiency: Row | None = None
    pruners: Sequence[Pruner] = ()
    sample: Row | None = None
    paper: Row | None = None
    _cache: dict[str, Any] = field(default_factory=dict, compare=False)

    @cached_property
    def vlms(self) -> list[str]:
        """VLMs in the order in which they were asked for."""
        return list(dict.fromkeys(row["vlm"] for row in self.summary))

    @cached_property
    def benchmarks(self) -> list[str]:
        """Benchmarks in the order in which they were asked for."""
        return list(dict.fromkeys(name for row in self.summary for name in row["benchmarks"]))

    def folder(self, row: Row) -> Path | None:
        """Where a row of the scores keeps its answers; None if that is not there."""
        path = row.get("path")
        if not path:
            return None
        for base in (self.root, self.root / "results"):
            place: Path = base / str(path)
            if place.exists():
                return place if place.is_dir() else place.parent
        return None

    def score_file(self, row: Row) -> Row:
        """`score.json` of a row of the scores; empty if it is not there."""
        folder = self.folder(row)
        if folder is None:
            return {}
        key = str(folder / "score.json")
        if key not in self._cache:
            self._cache[key] = _json(folder / "score.json", dict) or {}
        return dict(self._cache[key])

    def samples(self, row: Row) -> list[Row]:
        """The answers behind a row of the scores; empty if they are not there."""
        folder = self.folder(row)
        return [] if folder is None else list(_lines(folder / "samples.jsonl"))


def load(root: Path) -> Results:
    """Read the outputs of the stages under the root of the repository.

    Raises:
        BadInput: there are no scores at all, or a row lacks what it must have; file, row and key are named.
        Corrupt: a file is not the JSON or CSV that it should be.
    """
    scores = _json(root / "results" / "scores.json", list)
    summary = _json(root / "results" / "summary.json", list)
    if scores is None or summary is None:
        missing = "scores.json" if scores is None else "summary.json"
        raise BadInput(f"results/{missing} does not exist: run `python pipelines/eval.py` (or `dvc repro`) first")
    _require("results/scores.json", scores, _SCORE_KEYS)
    _require("results/summary.json", summary, _SUMMARY_KEYS)
    return Results(
        root=root,
        scores=scores,
        summary=summary,
        measures=_measures(root / "results" / "measures.json"),
        efficiency=_efficiency(root / "results" / "efficiency.json"),
        pruners=list(_pruners(root / "models")),
        sample=_json(root / "data" / "sample" / "sample.json", dict),
        paper=paper(),
    )


def paper() -> Row | None:
    """The paper's own numbers, as shipped with ocvtp."""
    source = files("ocvtp.evaluation").joinpath("paper.json")
    return json.loads(source.read_text(encoding="utf-8")) if source.is_file() else None


def _measures(path: Path) -> list[Row]:
    rows: list[Row] = _json(path, list) or []
    _require("results/measures.json", rows, ("vlm", "method", "tokens", "share", "changes", *AXES, "cover", "span_on"))
    return rows


def _efficiency(path: Path) -> Row | None:
    data = _json(path, (dict, list))
    if data is None:
        return None
    table: Row = data if isinstance(data, dict) else {"rows": data}
    _require("results/efficiency.json", table.get("rows", []), _COST_KEYS)
    return table


def _pruners(folder: Path) -> Iterator[Pruner]:
    index = _json(folder / "pruners.json", dict) or {}
    for place in sorted(folder.glob("*/*/config.json")):
        home = place.parent
        yield Pruner(
            vlm=home.parent.name,
            name=home.name,
            config=_json(place, dict) or {},
            metrics=_json(home / "metrics.json", dict) or {},
            curves=_csv(home / "curves.csv"),
            changes=index.get(f"{home.parent.name}/{home.name}", {}).get("changes", {}),
        )


def _json(path: Path, kind: type | tuple[type, ...]) -> Any:
    if not path.exists():
        return None
    data = read_json(path)
    if not isinstance(data, kind):
        raise Corrupt(f"{path} holds a {type(data).__name__} at its top, which is not what its stage writes")
    return data


def _lines(path: Path) -> Iterator[Row]:
    if not path.exists():
        return
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            yield json.loads(line)
        except ValueError as error:
            raise Corrupt(f"{path}, line {number} is not JSON: {error}") from error


def _csv(path: Path) -> dict[str, list[float | None]]:
    if not path.exists():
        return {}
    columns: dict[str, list[float | None]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for number, row in enumerate(csv.DictReader(file), start=2):
            for key, text in row.items():
                try:
                    columns.setdefault(key, []).append(float(text) if text else None)
                except (TypeError, ValueError) as error:
                    raise Corrupt(f"{path}, line {number}: {key} is {text!r}, which is not a number") from error
    return columns


def _require(file: str, rows: Sequence[Any], keys: Sequence[str]) -> None:
    for index, row in enumerate(rows):
        missing = [key for key in keys if not isinstance(row, dict) or key not in row]
        if missing:
            raise BadInput(f"{file}, row {index} has no {missing[0]!r}: each row needs {', '.join(keys)}")
