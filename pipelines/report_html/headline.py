"""What the numbers say, in plain sentences: does OC-VTP beat random at the smallest budget?"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pipelines.report_html import names
from pipelines.report_html.data import Results, Row
from pipelines.report_html.tables import PRUNED, chosen_rows

RIVAL, UNTRAINED = "random", f"{PRUNED}-untrained"
Verdict = Literal["yes", "no", "open", "unknown"]


@dataclass(frozen=True)
class Headline:
    """The answer for one VLM: a verdict, a sentence that gives it and sentences that support it."""

    vlm: str
    verdict: Verdict
    claim: str
    details: Sequence[str] = ()


def headline(results: Results, vlm: str) -> Headline:
    """Compare OC-VTP with random at the smallest budget that both have."""
    ours = [row for row in chosen_rows(results, vlm) if row["method"] == PRUNED and _paired(row, RIVAL)]
    ours.sort(key=lambda row: -row["share"])
    if not ours:
        claim = f"{vlm}: OC-VTP and random were not both evaluated at one budget, so they cannot be compared."
        return Headline(vlm, "unknown", claim)
    rows = chosen_rows(results, vlm)
    whole = next((row["tokens"] for row in rows if row["method"] == "vanilla"), None)
    verdict, claim = _claim(vlm, ours[-1], whole)
    details = [_evidence(rows, ours[-1]), *(_other_budget(row) for row in reversed(ours[:-1]))]
    if _paired(ours[-1], UNTRAINED):
        details.append(_training(ours[-1]))
    return Headline(vlm, verdict, claim, details)


def _claim(vlm: str, ours: Row, whole: float | None) -> tuple[Verdict, str]:
    share = f"{100 * ours['share']:.1f}%"
    where = (
        f"With {ours['tokens']:g} of {vlm}’s {whole:g} vision tokens ({share})"
        if (whole and ours["tokens"] is not None)
        else f"With {share} of {vlm}’s vision tokens"
    )
    found = ours["against"][RIVAL]
    points = f"{abs(found['points']):.1f} points"
    if found["ci_low"] > 0:
        return "yes", f"{where}, OC-VTP beats random by {points} {_interval(found)}."
    if found["ci_high"] < 0:
        return "no", f"{where}, OC-VTP loses to random by {points} {_interval(found)}."
    ahead = "ahead of" if found["points"] >= 0 else "behind"
    return "open", f"{where}, OC-VTP is {points} {ahead} random {_interval(found)}: not settled."


def _evidence(rows: Sequence[Row], ours: Row) -> str:
    asked = [found.get("n") or 0 for found in ours["benchmarks"].values() if found]
    random = next(row for row in rows if row["method"] == RIVAL and row["share"] == ours["share"])
    return (
        f"OC-VTP keeps {_written(ours)} of vanilla's average accuracy, random {_written(random)}. "
        f"{_count(len(asked), 'benchmark')}, {sum(asked)} questions, {_count(len(ours.get('seeds') or []), 'seed')}; "
        "intervals are 95% bootstraps over questions, those of differences paired by question."
    )


def _other_budget(ours: Row) -> str:
    budget = names.budget(ours["tokens"], ours["share"]).replace(" Tokens", " tokens")
    return f"With {budget}: OC-VTP {_written(ours)}, {_points(ours['against'][RIVAL])} against random."


def _training(ours: Row) -> str:
    found = ours["against"][UNTRAINED]
    verdict = (
        "training helps" if found["ci_low"] > 0 else "training harms" if found["ci_high"] < 0 else "it cannot be told"
    )
    return f"What training buys at this budget, over the same pruner with random weights: {_points(found)}; {verdict}."


def _paired(row: Row, rival: str) -> Row | None:
    found: Row | None = row["against"].get(rival)
    return found


def _points(found: Row) -> str:
    return f"{found['points']:+.1f} points {_interval(found)}"


def _interval(found: Row) -> str:
    return names.interval(found["ci_low"], found["ci_high"])


def _written(row: Row) -> str:
    average = row["average"]
    return (
        f"{names.percent(average['relative'])} {names.interval(average.get('ci_low'), average.get('ci_high'))}".strip()
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
