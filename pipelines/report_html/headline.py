"""What the numbers say, in plain sentences: does OC-VTP beat random at the smallest budget?"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pipelines.report_html import names
from pipelines.report_html.data import Results, Row
from pipelines.report_html.tables import PRUNED, chosen_rows

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
    rows = [row for row in chosen_rows(results, vlm) if _average(row) is not None]
    pairs = _pairs(rows, "random")
    if not pairs:
        claim = f"{vlm}: OC-VTP and random were not both evaluated at one budget, so they cannot be compared."
        return Headline(vlm, "unknown", claim)
    ours, random = pairs[-1]
    whole = next((row["tokens"] for row in rows if row["method"] == "vanilla"), None)
    verdict, claim = _claim(vlm, ours, random, whole)
    details = [_evidence(results, ours, random)]
    details += [_other_budget(a, b) for a, b in reversed(pairs[:-1])]
    untrained = _pairs(rows, f"{PRUNED}-untrained")
    if untrained:
        details.append(_training(*untrained[-1]))
    return Headline(vlm, verdict, claim, details)


def _claim(vlm: str, ours: Row, random: Row, whole: float | None) -> tuple[Verdict, str]:
    share = f"{100 * ours['share']:.1f}%"
    where = (
        f"With {ours['tokens']:g} of {vlm}’s {whole:g} vision tokens ({share})"
        if (whole and ours["tokens"] is not None)
        else f"With {share} of {vlm}’s vision tokens"
    )
    points = f"{abs(_gap(ours, random)):.1f} points"
    order = compare(ours, random)
    if order == "above":
        return "yes", f"{where}, OC-VTP beats random by {points}; the 95% intervals do not overlap."
    if order == "below":
        return "no", f"{where}, OC-VTP loses to random by {points}; the 95% intervals do not overlap."
    if order == "unknown":
        return "unknown", f"{where}, OC-VTP and random are {points} apart; without intervals that proves nothing."
    ahead = "ahead of" if _gap(ours, random) >= 0 else "behind"
    return "open", f"{where}, OC-VTP is {points} {ahead} random, but the 95% intervals overlap: not settled."


def compare(a: Row, b: Row) -> Literal["above", "below", "overlap", "unknown"]:
    """Whether the interval of `a` lies above or below that of `b`."""
    ends = [row["average"].get(key) for row in (a, b) for key in ("ci_low", "ci_high")]
    if any(end is None for end in ends):
        return "unknown"
    a_low, a_high, b_low, b_high = ends
    return "above" if a_low > b_high else "below" if a_high < b_low else "overlap"


def difference(a: Row, b: Row) -> tuple[float, float, float] | None:
    """Points between two averages, with an interval that takes them as independent: wider than a paired
    one.
    """
    if compare(a, b) == "unknown":
        return None
    gap = _gap(a, b)
    (a_mid, a_low, a_high), (b_mid, b_low, b_high) = (
        [row["average"][key] for key in ("relative", "ci_low", "ci_high")] for row in (a, b)
    )
    return gap, gap - math.hypot(a_mid - a_low, b_high - b_mid), gap + math.hypot(a_high - a_mid, b_mid - b_low)


def _evidence(results: Results, ours: Row, random: Row) -> str:
    text = f"OC-VTP keeps {_written(ours)} of vanilla's average accuracy, random {_written(random)}"
    apart = difference(ours, random)
    if apart:
        text += f"; the difference is {apart[0]:+.1f} points {names.interval(apart[1], apart[2])} "
        text += "(taking the two as independent, which makes it rather too wide)"
    asked = [found.get("n") or 0 for found in ours["benchmarks"].values() if found]
    seeds = len(ours.get("seeds") or [])
    return f"{text}. {_count(len(asked), 'benchmark')}, {sum(asked)} questions, {_count(seeds, 'seed')}."


def _other_budget(ours: Row, other: Row) -> str:
    words = {
        "above": "the intervals do not overlap",
        "below": "the intervals do not overlap",
        "overlap": "the intervals overlap",
        "unknown": "there are no intervals",
    }
    return (
        f"With {names.budget(ours['tokens'], ours['share']).replace(' Tokens', ' tokens')}: OC-VTP {_written(ours)}, "
        f"random {_written(other)}; {words[compare(ours, other)]}."
    )


def _training(ours: Row, untrained: Row) -> str:
    order = compare(ours, untrained)
    text = f"What training buys at this budget: {_gap(ours, untrained):+.1f} points over the same pruner with random "
    return text + (
        "weights, with intervals that do not overlap."
        if order in ("above", "below")
        else "weights; the intervals overlap."
        if order == "overlap"
        else "weights."
    )


def _pairs(rows: Sequence[Row], rival: str) -> list[tuple[Row, Row]]:
    """(OC-VTP, rival) at every budget that both have, the largest first."""
    ours = {row["share"]: row for row in rows if row["method"] == PRUNED}
    theirs = {row["share"]: row for row in rows if row["method"] == rival}
    return [(ours[share], theirs[share]) for share in sorted(ours, reverse=True) if share in theirs]


def _average(row: Row) -> float | None:
    value: float | None = (row.get("average") or {}).get("relative")
    return value


def _gap(a: Row, b: Row) -> float:
    return float(a["average"]["relative"]) - float(b["average"]["relative"])


def _written(row: Row) -> str:
    average = row["average"]
    return (
        f"{names.percent(average['relative'])} {names.interval(average.get('ci_low'), average.get('ci_high'))}".strip()
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
