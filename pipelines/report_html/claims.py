"""What the paper claims, and what these results say of it: by budget, with paired intervals, in plain words.

A claim holds at a budget where the whole 95% interval of the difference is on its side, does not hold where it is on
the other, and cannot be told where it holds zero.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.report_html import names
from pipelines.report_html.data import AXES, Results, Row
from pipelines.report_html.headline import UNTRAINED
from pipelines.report_html.tables import PRUNED, base_rows, budgets, chosen_rows, reference

HOLDS, FAILS, OPEN = "holds", "does not hold", "cannot be told"
RIVALS, TRAINING, COVERAGE, REBUILDING, OTHER = "rivals", "training", "coverage", "rebuilding", "other"
LOSS, LAYER, TOP_K, OWN, FILL = "loss", "layer", "top_k", "train.on", "evaluate.options.oc-vtp.fill"
GAPS = "none"
"""Value of `FILL`: fewer tokens than the budget where slots pick the same one. The paper calls that unpadded."""
"""Keys of findings: the axis of a claim of the paper's own, or what it is about."""


@dataclass(frozen=True)
class Finding:
    """A claim, its verdict in two or three words, and the numbers behind it.

    `key` says what it is about, whatever its words: all findings about one claim of the paper share it, and no others
    have it.
    """

    key: str
    claim: str
    verdict: str
    evidence: str


def findings(results: Results, vlm: str) -> list[Finding]:
    """All claims that these results say something about."""
    rows = chosen_rows(results, vlm)
    ours = {row["share"]: row for row in rows if row["method"] == PRUNED}
    found = [
        *_rivals(ours, results.paper),
        *_training(rows, ours),
        *_ablations(results, vlm),
        *_rebuilding(results, vlm),
    ]
    return [finding for finding in found if finding is not None]


def _rivals(ours: Mapping[float, Row], paper: Row | None) -> Iterator[Finding]:
    """Tables 1 to 3: better than every other method at equal budget."""
    rivals = dict.fromkeys(name for row in ours.values() for name in row["against"] if name != UNTRAINED)
    compared = (paper or {}).get("methods", {})
    for rival in rivals:
        points = {_budget(row): row["against"].get(rival) for _, row in _falling(ours)}
        where = "paper, Tables 1 to 3" if rival in compared else "not compared in the paper"
        yield _finding(RIVALS, f"OC-VTP keeps more accuracy than {names.method(rival)} ({where})", points)


def _training(rows: Sequence[Row], ours: Mapping[float, Row]) -> Iterator[Finding]:
    """What the paper never asks: is it the training?"""
    points = {_budget(row): row["against"].get(UNTRAINED) for _, row in _falling(ours)}
    if not any(points.values()):
        return
    claim = "Training the pruner buys accuracy: trained against the same pruner with random weights"
    yield _finding(TRAINING, claim, points)
    untrained = {row["share"]: row for row in rows if row["method"] == UNTRAINED}
    for size, what in (("all", "objects"), ("small", "small objects")):
        pairs = [(row, untrained[share]) for share, row in _falling(ours) if share in untrained]
        known = [(a, b) for a, b in pairs if a["coverage"] and b["coverage"] and a["coverage"][size]["objects"]]
        if known:
            yield _covered(what, size, known)


def _covered(what: str, size: str, pairs: Sequence[tuple[Row, Row]]) -> Finding:
    verdicts, parts = [], []
    for trained, untrained in pairs:
        a, b = trained["coverage"][size], untrained["coverage"][size]
        apart = a["ci_low"] > b["ci_high"], a["ci_high"] < b["ci_low"]
        verdicts.append(HOLDS if apart[0] else FAILS if apart[1] else OPEN)
        parts.append(f"{_budget(trained)}: {_share(a)} trained, {_share(b)} untrained")
    claim = f"Training the pruner covers more {what} with kept tokens"
    return Finding(
        COVERAGE, claim, _together(verdicts), f"{'; '.join(parts)} (apart where the intervals do not overlap)."
    )


def _share(found: Row) -> str:
    return f"{100 * found['share']:.1f}% {names.interval(100 * found['ci_low'], 100 * found['ci_high'])}"


def _ablations(results: Results, vlm: str) -> Iterator[Finding]:
    """Tables 5 to 7, where `ablate` has tried the other value: is the grid's own value the better one?"""
    base = next((row for row in base_rows(results, vlm) if row["method"] == PRUNED), None)
    wanted = reference(results, vlm)
    rows = [
        row
        for row in results.summary
        if row["vlm"] == vlm and row["method"] == PRUNED and len(row["changes"]) == 1 and _plain(row)
        if all(row[axis] == wanted[axis] for axis in AXES if axis not in row["changes"])
    ]
    changes = {next(iter(row["changes"].items())) for row in rows}
    for path, value in sorted(changes, key=_order):
        tried = {row["share"]: row for row in rows if row["changes"] == {path: value}}
        if path == OWN:
            text = (
                f"On {names.benchmark(str(value))} a pruner trained on its own images keeps more than one trained once"
            )
            yield _finding(
                OWN, f"{text} (paper, Tables 1 to 3)", {_budget(r): r["difference"] for _, r in _falling(tried)}
            )
            continue
        if (path, value) == (FILL, GAPS):
            less = {f"{_budget(r)}, {r['kept']:.1f} without": _reversed(r["difference"]) for _, r in _falling(tried)}
            yield _finding(
                FILL, "Filling up to the budget keeps more accuracy than gaps (paper, Table 1, unpadded)", less
            )
            continue
        points = {_budget(row): _reversed(row["difference"]) for _, row in _falling(tried)}
        claim = _CLAIMS.get((path, value)) if base is not None and base.get(path) == _PAPERS.get(path) else None
        if claim is None:
            own = "what the grid has" if base is None or path not in base else names.plain(base[path])
            yield _finding(OTHER, f"{path}: {own} is better than {names.plain(value)}", points)
        else:
            yield _finding(path, claim, points)


_PAPERS: Mapping[str, Any] = {LOSS: "aw_mse", LAYER: 9, TOP_K: 1}
_CLAIMS: Mapping[tuple[str, Any], str] = {
    (LOSS, "mse"): "AW-MSE trains a better pruner than MSE (paper, Table 7)",
    (LAYER, 10): "Layer 9 is a better place to look than layer 10 (paper, Table 6, by 0.0 to 0.9 points)",
    (LAYER, -2): "Layer 9 is a better place to look than layer -2 (paper, Table 6)",
    **{(TOP_K, k): f"One token a slot is better than {k} (paper, Table 5)" for k in (2, 3, 6)},
}


def _order(change: tuple[str, Any]) -> tuple[str, float, str]:
    path, value = change
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return path, value if number else 0, str(value)


def _plain(row: Row) -> bool:
    """Whether the value that was tried can be a key."""
    return all(isinstance(value, str | int | float | None) for value in row["changes"].values())


def _rebuilding(results: Results, vlm: str) -> Iterator[Finding]:
    """Section 3.2: the kept tokens are those from which the others can best be rebuilt."""
    ratios = []
    for pruner in results.pruners:
        kept, random = (pruner.metrics.get(key) for key in ("span_error", "random_span_error"))
        if pruner.vlm == vlm and not pruner.changes and kept and random:
            ratios.append(kept / random)
    if ratios:
        verdict = HOLDS if max(ratios) < 1 else FAILS if min(ratios) > 1 else OPEN
        text = f"{min(ratios):.3f} to {max(ratios):.3f}" if len(ratios) > 1 else f"{ratios[0]:.3f}"
        yield Finding(
            REBUILDING,
            "Least squares rebuild all tokens better from the kept ones than from random ones (paper, Section 3.2)",
            verdict,
            f"unexplained variance relative to random tokens, over {len(ratios)} trained pruners: {text}.",
        )


def _finding(key: str, claim: str, points: Mapping[str, Row | None]) -> Finding:
    known = {budget: found for budget, found in points.items() if found}
    if not known:
        return Finding(key, claim, OPEN, "no results to compare.")
    verdicts = [HOLDS if one["ci_low"] > 0 else FAILS if one["ci_high"] < 0 else OPEN for one in known.values()]
    text = "; ".join(
        f"{budget}: {one['points']:+.1f} points {names.interval(one['ci_low'], one['ci_high'])}"
        for budget, one in known.items()
    )
    return Finding(key, claim, _together(verdicts), f"{text}.")


def _together(verdicts: Sequence[str]) -> str:
    """One verdict of those at all budgets."""
    if len(set(verdicts)) == 1:
        return verdicts[0]
    counts = [(word, verdicts.count(word)) for word in (HOLDS, FAILS, OPEN)]
    return ", ".join(f"{word} at {count} of {len(verdicts)} budgets" for word, count in counts if count)


def _falling(rows: Mapping[float, Row]) -> list[tuple[float, Row]]:
    return [(share, rows[share]) for _, share in budgets(rows.values())]


def _budget(row: Row) -> str:
    return names.budget(row["tokens"], row["share"]).replace(" Tokens", " tokens")


def _reversed(found: Row | None) -> Row | None:
    """Points of the grid's value over the other one."""
    if found is None:
        return None
    return {"points": -found["points"], "ci_low": -found["ci_high"], "ci_high": -found["ci_low"]}
