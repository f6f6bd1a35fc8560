"""Tables of scores, from the answers of every setting."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ocvtp.evaluation.files import SCORE, read_samples
from ocvtp.evaluation.scores import interval, relative_average
from pipelines.grid import Setting

Row = dict[str, Any]
Axes = tuple[str, str]


@dataclass(frozen=True)
class Result:
    """One setting on one benchmark: its score.json and its answers; `path` is where rows say that they are."""

    setting: Setting
    benchmark: str
    score: Row
    samples: Sequence[Mapping[str, Any]]
    path: str

    @classmethod
    def read(cls, setting: Setting, benchmark: str, folder: Path, path: str) -> "Result":
        """From a folder of the output."""
        return cls(setting, benchmark, json.loads((folder / SCORE).read_bytes()), read_samples(folder), path)

    def relative_to(self, vanilla: "Result | None") -> float | None:
        """Score in percent of vanilla's; None without one, or where it is 0."""
        if vanilla is None or self.score["score"] is None or not vanilla.score["score"]:
            return None
        return 100 * float(self.score["score"]) / float(vanilla.score["score"])


class _Grid:
    """Results by VLM, setting without seed, and benchmark."""

    def __init__(self, results: Sequence[Result]) -> None:
        self.results = results

    @cached_property
    def vanilla(self) -> dict[str, dict[str, Result]]:
        """VLM -> benchmark -> result of the unpruned model."""
        found: dict[str, dict[str, Result]] = {}
        for result in self.results:
            if result.setting.keep is None:
                found.setdefault(result.setting.vlm, {})[result.benchmark] = result
        return found

    @cached_property
    def groups(self) -> dict[str, list[Result]]:
        """Results that differ in seed and benchmark alone, in the order of the grid."""
        found: dict[str, list[Result]] = {}
        for result in self.results:
            found.setdefault(json.dumps(result.setting.axes), []).append(result)
        return found


def score_rows(results: Sequence[Result], resamples: int) -> list[Row]:
    """One row for each setting, seed and benchmark; `relative` is in percent, the interval is that of the score."""
    vanilla = _Grid(results).vanilla
    rows = []
    for result in results:
        score, setting = result.score, result.setting
        low, high = interval(result.samples, result.benchmark, resamples=resamples) or (None, None)
        rows.append({
            **setting.axes,
            "benchmark": result.benchmark,
            "seed": setting.seed,
            "score": score["score"],
            "relative": result.relative_to(vanilla.get(setting.vlm, {}).get(result.benchmark)),
            "ci_low": low,
            "ci_high": high,
            "n": score["n"],
            "kept_mean": score["tokens_kept"]["mean"],
            "fingerprint": score["setting"].get("fingerprint"),
            "metrics": score["metrics"],
            "path": result.path,
        })  # fmt: skip
    return rows


def summary_rows(results: Sequence[Result], benchmarks: Sequence[str], resamples: int) -> list[Row]:
    """One row for each setting with its seeds pooled: relative accuracy with paired intervals, and its average.

    A benchmark without results has a row of None, and so has then the average.
    """
    grid = _Grid(results)
    rows = []
    for group in grid.groups.values():
        setting = group[0].setting
        vanilla = {name: result.samples for name, result in grid.vanilla.get(setting.vlm, {}).items()}
        runs = {name: [result.samples for result in group if result.benchmark == name] for name in benchmarks}
        found = relative_average({name: vanilla.get(name, ()) for name in benchmarks}, runs, resamples=resamples)
        if setting.keep is None:  # 100 by definition
            for row in (*found["benchmarks"].values(), found["average"]):
                row |= {"ci_low": None, "ci_high": None}
        seeds = sorted({result.setting.seed for result in group if result.setting.seed is not None})
        rows.append({**setting.axes, "seeds": seeds, **found})
    return rows


def metrics(summary: Sequence[Row]) -> Row:
    """VLM -> method -> budget -> average and benchmarks, in percent of vanilla, whose own scores stand as they are.

    The other axes are in the path only where the grid has several values of them, so that experiments with another
    loss or layer have the same paths and can be compared.
    """
    several = {
        axis: len({json.dumps(row[axis]) for row in summary if row[axis] is not None}) > 1
        for axis in ("layer", "loss", "slots", "top_k")
    }
    found: Row = {}
    for row in summary:
        name = "-".join(
            [row["method"], *(f"{axis}_{_word(row[axis])}" for axis in several if _has(several, row, axis))]
        )
        place = found.setdefault(row["vlm"], {}).setdefault(name, {})
        kind = "relative"
        if row["keep"] is None:
            kind = "score"
        else:
            place = place.setdefault(_word(row["tokens"] or row["keep"]), {})
            place["average"] = row["average"]["relative"]
        place |= {benchmark: values[kind] for benchmark, values in row["benchmarks"].items()}
    cleaned: Row = _without_none(found)
    return cleaned


def _has(several: Mapping[str, bool], row: Row, axis: str) -> bool:
    return several[axis] and row[axis] is not None


def _word(value: Any) -> str:
    """In a path of DVC's metrics, in which a dot separates."""
    text = "_".join(map(str, value)) if isinstance(value, list) else str(value)
    return text.replace(".", "_").replace("%", "pct")


def _without_none(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    cleaned = {key: _without_none(item) for key, item in value.items()}
    return {key: item for key, item in cleaned.items() if item is not None}
