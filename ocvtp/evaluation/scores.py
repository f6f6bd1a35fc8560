"""Scores, relative accuracy and their intervals, from the answers alone.

An answer is a line of samples.jsonl: `unit`, `answer`, `prediction`, `score` (0 to 1), `category`. Scores equal those
of lmms-eval. Intervals are percentile bootstraps (Efron 1979) over units of resampling: a question, or what may not be
torn apart, such as a pair of MME. What cannot be computed is None, never 0.

Letters: S runs (vanilla and the seeds of a method), U units, F terms of a score, R resamples.
"""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ocvtp.errors import BadInput
from ocvtp.evaluation.benchmarks import NATIVE, Benchmark, Protocol
from ocvtp.evaluation.benchmarks import benchmark as named

Samples = Sequence[Mapping[str, Any]]
Floats = NDArray[np.float64]
RESAMPLES = 2000
_CHUNK = 4_000_000
"""Drawn units held in memory at once."""


def score_of(samples: Samples, benchmark: str, protocol: Protocol = NATIVE) -> float | None:
    """The primary score, in the benchmark's scale; None without answers that count."""
    entry = named(benchmark, protocol)
    terms = _terms(samples, entry)
    return None if terms is None else _number(_score(terms.values_UF.sum(axis=0), entry))


def counted(samples: Samples, benchmark: str) -> int:
    """How many of the answers count in the primary score."""
    return len(_counting(samples, named(benchmark)))


def interval(
    samples: Samples, benchmark: str, protocol: Protocol = NATIVE, *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float] | None:
    """The 95 % interval of the primary score; None without answers that count."""
    entry = named(benchmark, protocol)
    terms = _terms(samples, entry)
    if terms is None:
        return None
    scores_RS = _resampled([terms], entry, resamples, seed)
    return _quantiles(scores_RS[:, 0])


def relative(
    vanilla: Samples,
    runs: Sequence[Samples],
    benchmark: str,
    protocol: Protocol = NATIVE,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """One benchmark's `score` and `relative` (100 score / vanilla's), mean over runs, and the interval of the latter.

    Args:
        vanilla: answers of the unpruned model.
        runs: answers of each seed of one method, to the same questions.
        benchmark: name.
        protocol: by which the score is made.
        resamples: R.
        seed: of the resampling.

    Raises:
        BadInput: the questions differ between vanilla and a run.
    """
    row, _ = _relative(vanilla, runs, named(benchmark, protocol), resamples, seed)
    return row


@dataclass(frozen=True)
class Average:
    """Relative accuracy of one method on some benchmarks, and its mean over them.

    Attributes:
        rows: benchmark -> {score, relative, ci_low, ci_high (of relative), n}.
        relative: the mean over those benchmarks on which the unpruned model is better than chance; None where any of
            these has no relative accuracy: a mean over fewer would not compare with others.
        draws_R: the mean in each resample.
    """

    rows: Mapping[str, dict[str, Any]]
    relative: float | None
    draws_R: Floats | None

    def to_dict(self) -> dict[str, Any]:
        """`benchmarks`: the rows, and `average`: {relative, ci_low, ci_high}, the interval being that of 95 %."""
        low, high = (None, None) if self.draws_R is None else _quantiles(self.draws_R) or (None, None)
        return {
            "benchmarks": dict(self.rows),
            "average": {"relative": self.relative, "ci_low": low, "ci_high": high},
        }

    def minus(self, other: "Average") -> dict[str, float] | None:
        """Points between two means of the same questions, {points, ci_low, ci_high}; None where either has none.

        Both were resampled with the same draws, so that the interval is a paired one.
        """
        if self.relative is None or other.relative is None or self.draws_R is None or other.draws_R is None:
            return None
        ends = _quantiles(self.draws_R - other.draws_R)
        if ends is None:
            return None
        return {"points": self.relative - other.relative, "ci_low": ends[0], "ci_high": ends[1]}


def relative_average(
    vanilla: Mapping[str, Samples],
    runs: Mapping[str, Sequence[Samples]],
    protocol: Protocol = NATIVE,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Average:
    """Relative accuracy on each benchmark, and its mean over those on which the unpruned model is better than chance.

    In each resample the same questions are drawn for vanilla and for every run, so that only what pruning changes
    varies. Benchmarks are resampled independently of each other.

    Args:
        vanilla: benchmark -> answers of the unpruned model.
        runs: benchmark -> answers of each seed of one method.
        protocol: by which the scores are made.
        resamples: R.
        seed: of the resampling.
    """
    rows: dict[str, dict[str, Any]] = {}
    values: list[float | None] = []
    draws: list[Floats] = []
    for name in dict.fromkeys((*vanilla, *runs)):
        entry = named(name, protocol)
        rows[name], draws_R = _relative(vanilla.get(name, ()), runs.get(name, ()), entry, resamples, seed)
        if vanilla.get(name) and not entry.means_something(score_of(vanilla[name], name, protocol)):
            continue
        values.append(rows[name]["relative"])
        if draws_R is not None:
            draws.append(draws_R)
    if not values or None in values:
        return Average(rows, None, None)
    return Average(rows, float(np.mean(np.array(values, dtype=np.float64))), np.mean(draws, axis=0))


def _relative(
    vanilla: Samples, runs: Sequence[Samples], benchmark: Benchmark, resamples: int, seed: int
) -> tuple[dict[str, Any], Floats | None]:
    """The row of one benchmark, and relative accuracy in each resample."""
    row: dict[str, Any] = {"score": None, "relative": None, "ci_low": None, "ci_high": None, "n": 0}
    found = [terms for terms in (_terms(run, benchmark) for run in runs) if terms is not None]
    if not found:
        return row, None
    scores = [float(_score(terms.values_UF.sum(axis=0), benchmark)) for terms in found]
    row |= {"score": _number(np.mean(scores)), "n": len(_counting(next(run for run in runs if run), benchmark))}
    base = _terms(vanilla, benchmark)
    if base is None:
        return row, None
    whole = float(_score(base.values_UF.sum(axis=0), benchmark))
    if not whole > 0:
        return row, None
    aligned = [base, *(terms.aligned(base, benchmark) for terms in found)]
    scores_RS = _resampled(aligned, benchmark, resamples, seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        draws_R: Floats = 100 * scores_RS[:, 1:].mean(axis=1) / scores_RS[:, 0]
    low, high = _quantiles(draws_R) or (None, None)
    row |= {"relative": _number(100 * np.mean(scores) / whole), "ci_low": low, "ci_high": high}
    return row, draws_R


# --- Terms: sums over units from which a score follows ---------------------------------------------------------------


@dataclass(frozen=True)
class _Terms:
    """What each unit adds to a score. Units are drawn again within their stratum only."""

    units: tuple[str, ...]
    values_UF: Floats
    strata: tuple[str, ...]

    def aligned(self, other: "_Terms", benchmark: Benchmark) -> "_Terms":
        """The same terms in the order of the other's units."""
        if self.units == other.units and self.strata == other.strata:
            return self
        if sorted(zip(self.units, self.strata, strict=True)) != sorted(zip(other.units, other.strata, strict=True)):
            strange = sorted(set(self.units) ^ set(other.units))[:3]
            raise BadInput(
                f"{benchmark.name}: {len(self.units)} units of a run, {len(other.units)} of vanilla, and they are not "
                f"the same ({', '.join(strange) or 'other categories'}): evaluate both on the same questions"
            )
        place = {unit: index for index, unit in enumerate(self.units)}
        order = [place[unit] for unit in other.units]
        return _Terms(other.units, self.values_UF[order], other.strata)


def _terms(samples: Samples, benchmark: Benchmark) -> _Terms | None:
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for sample in _counting(samples, benchmark):
        groups.setdefault(str(sample["unit"]), []).append(sample)
    if not groups:
        return None
    if benchmark.rule == "pairs":
        return _pairs(groups, benchmark)
    if benchmark.rule == "mean_f1":
        return _confusions(groups)
    value = {"mean": _right, "all_right": _all_right, "f1": _confusion}[benchmark.rule]
    values_UF = np.array([value(group) for group in groups.values()], dtype=np.float64)
    return _Terms(tuple(groups), values_UF, ("",) * len(groups))


def _counting(samples: Samples, benchmark: Benchmark) -> list[Mapping[str, Any]]:
    return [sample for sample in samples if benchmark.only is None or sample["category"] == benchmark.only]


def _right(group: Samples) -> tuple[float, ...]:
    return sum(sample["score"] for sample in group), float(len(group))


def _all_right(group: Samples) -> tuple[float, ...]:
    return min(sample["score"] for sample in group), 1.0


def _confusion(group: Samples) -> tuple[float, ...]:
    """True positives, false positives, false negatives; as in lmms-eval, only a "no" is a false negative."""
    pairs = [(str(s["answer"]).lower().strip(), str(s["prediction"]).lower().strip()) for s in group]
    return tuple(float(pairs.count(which)) for which in (("yes", "yes"), ("no", "yes"), ("yes", "no")))


def _confusions(groups: Mapping[str, Samples]) -> _Terms:
    """Of each category what `_confusion` counts: a score is a mean of F1 over categories."""
    strata = tuple(str(group[0]["category"]) for group in groups.values())
    categories = sorted(set(strata))
    values_UF = np.zeros((len(groups), 3 * len(categories)))
    for row, (stratum, group) in enumerate(zip(strata, groups.values(), strict=True)):
        column = 3 * categories.index(stratum)
        values_UF[row, column : column + 3] = _confusion(group)
    return _Terms(tuple(groups), values_UF, strata)


def _pairs(groups: Mapping[str, Samples], benchmark: Benchmark) -> _Terms:
    """Of each category the points of its pairs, and their number: a score is a sum of means over categories."""
    strata = tuple(str(group[0]["category"]) for group in groups.values())
    categories = sorted(set(strata))
    values_UF = np.zeros((len(groups), 2 * len(categories)))
    for row, (unit, group) in enumerate(groups.items()):
        if len(group) != 2:
            raise BadInput(f"{benchmark.name}: unit {unit} has {len(group)} answers; questions come in pairs")
        column = 2 * categories.index(strata[row])
        right = sum(sample["score"] for sample in group)
        values_UF[row, column : column + 2] = 50.0 * right + 100.0 * (right == 2), 1.0
    return _Terms(tuple(groups), values_UF, strata)


def _score(sums_F: Floats, benchmark: Benchmark) -> Any:
    """The score that sums over units give; NaN where it is undefined. Leading axes of `sums_F` are kept."""
    with np.errstate(divide="ignore", invalid="ignore"):
        if benchmark.rule in ("f1", "mean_f1"):  # of all answers, or of each category
            right, false_yes, false_no = (sums_F[..., part::3] for part in range(3))
            return np.where(right > 0, 2 * right / (2 * right + false_yes + false_no), 0.0).mean(axis=-1)
        means = sums_F[..., 0::2] / sums_F[..., 1::2]
    return means.sum(axis=-1) * (100.0 if benchmark.scale == "percent" else 1.0)


# --- Resampling ------------------------------------------------------------------------------------------------------


def _resampled(runs: Sequence[_Terms], benchmark: Benchmark, resamples: int, seed: int) -> Floats:
    """Scores of each run [R, S], the same units drawn for all of them."""
    terms_UX = np.concatenate([terms.values_UF for terms in runs], axis=1)
    strata = runs[0].strata
    small = resamples * len(strata) <= _CHUNK
    draws = (
        _kept_draws(strata, resamples, seed, benchmark.name)
        if small
        else _draws(strata, resamples, seed, benchmark.name)
    )
    parts = [counts_RU @ terms_UX for counts_RU in draws]
    sums_RSF = np.concatenate(parts).reshape(resamples, len(runs), -1)
    scores: Floats = _score(sums_RSF, benchmark)
    return scores


@lru_cache(maxsize=10)
def _kept_draws(strata: Sequence[str], resamples: int, seed: int, name: str) -> list[Floats]:
    """As `_draws`, for the next setting that was asked the same questions."""
    return list(_draws(strata, resamples, seed, name))


def _draws(strata: Sequence[str], resamples: int, seed: int, name: str) -> Iterator[Floats]:
    """How often each unit is drawn, [R, U] in chunks of R: as many units of each stratum as it has.

    The draws of a benchmark depend on its name and the seed, not on which others are resampled beside it.
    """
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    units = len(strata)
    names = np.array(strata)
    members = [np.flatnonzero(names == name) for name in dict.fromkeys(strata)]
    step = max(1, _CHUNK // units)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        drawn = [group[rng.integers(len(group), size=(rows, len(group)))] for group in members]
        flat = np.concatenate(drawn, axis=1) + units * np.arange(rows)[:, None]
        yield np.bincount(flat.ravel(), minlength=rows * units).reshape(rows, units).astype(np.float64)


def _quantiles(draws_R: Floats) -> tuple[float, float] | None:
    """2.5 % and 97.5 %; None where any resample is undefined."""
    if not np.isfinite(draws_R).all():
        return None
    low, high = np.quantile(draws_R, [0.025, 0.975])
    return float(low), float(high)


def _number(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None
