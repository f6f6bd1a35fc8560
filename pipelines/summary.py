"""Tables of scores, from the answers of every setting."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ocvtp.evaluation.listing import SCORE, read_samples
from ocvtp.evaluation.scores import Average, interval, relative_average
from pipelines.grid import Cell
from pipelines.params.model import SAMPLED
from pipelines.standings import BASELINE, hard, ranks

Row = dict[str, Any]
OURS = "oc-vtp"


@dataclass(frozen=True)
class Result:
    """One setting on one benchmark: its score.json and its answers; `path` is where rows say that they are."""

    setting: Cell
    benchmark: str
    score: Row
    samples: Sequence[Mapping[str, Any]]
    path: str

    @classmethod
    def read(cls, setting: Cell, benchmark: str, folder: Path, path: str) -> "Result":
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

    def average(self, group: Sequence[Result], benchmarks: Sequence[str], resamples: int) -> Average:
        """Relative accuracy of results that differ in seed and benchmark alone."""
        vanilla = self.vanilla.get(group[0].setting.vlm, {})
        runs = {name: [result.samples for result in group if result.benchmark == name] for name in benchmarks}
        whole = {name: vanilla[name].samples if name in vanilla else () for name in benchmarks}
        return relative_average(whole, runs, group[0].score["protocol"], resamples=resamples)

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
        protocol = score["protocol"]
        low, high = interval(result.samples, result.benchmark, protocol, resamples=resamples) or (None, None)
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
            "object_coverage": score.get("object_coverage"),
            "metrics": score["metrics"],
            "path": result.path,
        })  # fmt: skip
    return rows


def summary_rows(results: Sequence[Result], benchmarks: Sequence[str], resamples: int) -> list[Row]:
    """One row for each setting with its seeds pooled: relative accuracy with paired intervals, and its average.

    A benchmark without results has a row of None, and so has then the average. `kept` is the mean of the tokens kept of
    an image, over the benchmarks. `difference` is, for a row of `ablate`, the points to the same setting of the grid,
    and for a pruner trained on a benchmark's own images those on that one; `against` has for OC-VTP the points to each
    other method at the same budget; both are {points, ci_low, ci_high}, paired by question. `coverage` is of objects,
    see `_coverage`; `rank` and `hard` are of `pipelines.standings`.
    """
    grid = _Grid(results)
    groups = [(group[0].setting, group) for group in grid.groups.values()]
    averages = [(setting, grid.average(group, benchmarks, resamples)) for setting, group in groups]
    rows, standing = [], ranks(averages)
    for place, ((setting, group), (_, average)) in enumerate(zip(groups, averages, strict=True)):
        found = average.to_dict()
        if setting.keep is None:  # 100 by definition
            for row in (*found["benchmarks"].values(), found["average"]):
                row |= {"ci_low": None, "ci_high": None}
        seeds = sorted({result.setting.seed for result in group if result.setting.seed is not None})
        rows.append({
            **setting.axes,
            "seeds": seeds,
            **found,
            "kept": float(np.mean([result.score["tokens_kept"]["mean"] for result in group])),
            "difference": _difference(setting, average, averages, grid, resamples),
            "against": _against(setting, average, averages),
            "coverage": _coverage(group, resamples),
            "rank": standing.get(place),
            "hard": _hard(setting, group, grid, resamples),
        })  # fmt: skip
    return rows


def _hard(setting: Cell, group: Sequence[Result], grid: _Grid, resamples: int) -> Row | None:
    """What the setting answers of what downsampling to its budget does not, see `pipelines.standings.hard`."""
    if setting.keep is None:
        return None

    def by_benchmark(results: Sequence[Result]) -> dict[str, list[Sequence[Mapping[str, Any]]]]:
        found: dict[str, list[Sequence[Mapping[str, Any]]]] = {}
        for result in results:
            found.setdefault(result.benchmark, []).append(result.samples)
        return found

    base = [
        result
        for result in grid.results
        if result.setting.method == BASELINE
        and (result.setting.vlm, result.setting.keep, result.setting.changes) == (setting.vlm, setting.keep, ())
    ]
    vanilla = {name: result.samples for name, result in grid.vanilla.get(setting.vlm, {}).items()}
    return hard(by_benchmark(group), by_benchmark(base), vanilla, resamples)


def _difference(
    setting: Cell, average: Average, averages: Sequence[tuple[Cell, Average]], grid: _Grid, resamples: int
) -> Row | None:
    """Points of a setting of `ablate` to the one of the grid that differs in nothing else."""
    if not setting.changes:
        return None
    changed = {path for path, _ in setting.changes}
    for other, theirs in averages:
        same = all(
            other.axes[name] == value for name, value in setting.axes.items() if name not in changed | {"changes"}
        )
        if not other.changes and same:
            if setting.pruner is None or setting.pruner.on == SAMPLED:
                return average.minus(theirs)
            mine, base = (grid.groups[json.dumps(one.axes)] for one in (setting, other))
            own = [setting.pruner.on]
            return grid.average(mine, own, resamples).minus(grid.average(base, own, resamples))
    return None


def _against(setting: Cell, average: Average, averages: Sequence[tuple[Cell, Average]]) -> Row:
    """Points of OC-VTP, also as `ablate` changes it, to each other method of the grid at its own budget.

    Where the grid has a method on several layers or with several top_k, to the one that shares them.
    """
    if setting.method != OURS:
        return {}
    rivals: dict[str, list[tuple[Cell, Average]]] = {}
    for other, theirs in averages:
        if (other.vlm, other.keep, other.changes) == (setting.vlm, setting.keep, ()) and other.method != OURS:
            rivals.setdefault(other.method, []).append((other, theirs))
    found: Row = {}
    for method, some in rivals.items():
        for other, theirs in some:
            alike = all(getattr(other, axis) in (None, getattr(setting, axis)) for axis in ("layer", "top_k"))
            if alike or len(some) == 1:
                found[method] = average.minus(theirs)
    return found


def _coverage(group: Sequence[Result], resamples: int) -> Row | None:
    """Objects with a kept token on their mask, of `all` and of `small` ones: {share, ci_low, ci_high, objects}.

    Mean over seeds, and each image counts once however many questions are about it; the interval is a bootstrap over
    images. None where there are no masks.
    """
    images: dict[str, dict[int | None, Sequence[int]]] = {}
    for result in group:
        for sample in result.samples:
            if "objects" in sample:
                images.setdefault(sample["image"], {})[result.setting.seed] = sample["objects"]
    if not images:
        return None
    sums_I4 = np.array([np.mean(list(seeds.values()), axis=0) for seeds in images.values()])
    drawn_R4 = _draws(len(sums_I4), resamples) @ sums_I4
    found = {}
    for name, column in (("all", 0), ("small", 2)):
        total = sums_I4[:, column].sum()
        shares_R = drawn_R4[:, column + 1] / np.maximum(drawn_R4[:, column], 1)
        low, high = np.quantile(shares_R, [0.025, 0.975])
        found[name] = {
            "share": float(sums_I4[:, column + 1].sum() / total) if total else None,
            "ci_low": float(low) if total else None,
            "ci_high": float(high) if total else None,
            "objects": int(total),
        }
    return found


@lru_cache(maxsize=2)
def _draws(images: int, resamples: int) -> NDArray[np.float64]:
    """How often each image is drawn, [R, I]."""
    counts_RI = np.random.default_rng(0).multinomial(images, [1 / images] * images, size=resamples)
    return counts_RI.astype(np.float64)


def metrics(summary: Sequence[Row]) -> Row:
    """VLM -> method -> budget -> average and benchmarks, in percent of vanilla, whose own scores stand as they are.

    `coverage` is of objects, in percent; `kept` stands where OC-VTP keeps fewer tokens than asked. The other axes are
    in the path only where the grid has several values of them, so that experiments with another loss or layer have the
    same paths and can be compared; rows of `ablate` say what they change.
    """
    grid = [row for row in summary if not row["changes"]]
    several = [
        axis
        for axis in ("layer", "loss", "slots", "top_k")
        if len({json.dumps(row[axis]) for row in grid if row[axis] is not None}) > 1
    ]
    found: Row = {}
    for row in summary:
        parts = {axis: row[axis] for axis in several if row[axis] is not None}
        parts |= {path.rsplit(".", 1)[-1]: value for path, value in row["changes"].items()}
        name = "-".join([row["method"], *(f"{axis}_{_word(value)}" for axis, value in parts.items())])
        place = found.setdefault(row["vlm"], {}).setdefault(name, {})
        kind = "relative"
        if row["keep"] is None:
            kind = "score"
        else:
            place = place.setdefault(_word(row["tokens"] or row["keep"]), {})
            place["average"] = row["average"]["relative"]
            if row["method"] == OURS and row["tokens"] and round(row["kept"], 1) < row["tokens"]:
                place["kept"] = row["kept"]
            if row["coverage"]:
                place["coverage"] = {
                    size: 100 * one["share"] for size, one in row["coverage"].items() if one["objects"]
                }
        place |= {benchmark: values[kind] for benchmark, values in row["benchmarks"].items()}
    cleaned: Row = _without_none(found)
    return cleaned


def _word(value: Any) -> str:
    """In a path of DVC's metrics, in which a dot separates."""
    text = "_".join(map(str, value)) if isinstance(value, list) else str(value)
    return text.replace(".", "_").replace("%", "pct")


def _without_none(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    cleaned = {key: _without_none(item) for key, item in value.items()}
    return {key: item for key, item in cleaned.items() if item is not None}
