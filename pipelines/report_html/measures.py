"""What methods keep, measured without a language model, and how well that tells which method answers well."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from scipy.stats import spearmanr

from pipelines.report_html import names
from pipelines.report_html.data import AXES, Results, Row
from pipelines.report_html.tables import MISSING, Block, Cell, Line, Table, budgets, chosen_rows

MEASURES: Mapping[str, str] = {
    "cover": "objects covered",
    "small": "small objects covered",
    "span_on": "unexplained variance",
    "span": "the same, reference layer",
    "near": "distance to the nearest kept",
}
"""Of `results/measures.json`: the first two are better the higher, the others the lower."""
FEWEST = 4
"""Settings below which ranks say nothing."""


def measures_tables(results: Results, vlm: str) -> list[Table]:
    """The measures of the grid's methods, and their rank correlation with accuracy; empty without measures."""
    known = {_key(row): row for row in results.measures if row["vlm"] == vlm}
    if not known:
        return []
    return [_measures(results, vlm, known), _correlation(results, vlm, known)]


def _key(row: Row) -> str:
    return json.dumps([row[name] for name in ("method", "tokens", "share", *AXES, "changes")])


def _measures(results: Results, vlm: str, known: Mapping[str, Row]) -> Table:
    rows = [row for row in chosen_rows(results, vlm) if row["method"] != "vanilla"]
    blocks = []
    for tokens, share in budgets(rows):
        lines = [
            Line(names.method(row["method"]), [_number(known[_key(row)][name]) for name in MEASURES])
            for row in rows
            if row["share"] == share and _key(row) in known
        ]
        if lines:
            blocks.append(Block(f"Retain {names.budget(tokens, share)}", lines))
    return Table(
        name=f"measures-{vlm}",
        caption="What is kept, without asking a question",
        head=["Method", *MEASURES.values()],
        blocks=blocks,
        note="Shares of objects with a kept token on them; share of the variance of all tokens that least squares "
        "from the kept ones leave unexplained, in the layer that goes to the LLM and in the reference layer; mean "
        "cosine distance of a token to the nearest kept one. Means over seeds. Methods that choose before the LLM and "
        "read no prompt.",
    )


def _number(value: float | None) -> Cell:
    return MISSING if value is None else Cell(f"{value:.3f}", value=value)


def _correlation(results: Results, vlm: str, known: Mapping[str, Row]) -> Table:
    rows = [
        row
        for row in results.summary
        if row["vlm"] == vlm and _key(row) in known and row["average"]["relative"] is not None
    ]
    shown = budgets(rows)
    lines = []
    for name, title in MEASURES.items():
        groups = [rows, *([row for row in rows if row["share"] == share] for _, share in shown)]
        lines.append(Line(title, [_rank_correlation(some, name, known) for some in groups]))
    return Table(
        name=f"correlation-{vlm}",
        caption="Rank correlation with accuracy",
        head=["Measure", "All settings", *(names.budget(tokens, share) for tokens, share in shown)],
        blocks=[Block("", lines)],
        note="Spearman's rank correlation of a measure with the average relative accuracy, over all settings measured, "
        "and over those of each budget; the number of settings below. Near 1 for what is covered, or near -1 for the "
        "errors: the measure alone would have found the better methods.",
    )


def _rank_correlation(rows: Sequence[Row], name: str, known: Mapping[str, Any]) -> Cell:
    pairs = [(known[_key(row)][name], row["average"]["relative"]) for row in rows]
    pairs = [(measured, accuracy) for measured, accuracy in pairs if measured is not None]
    if len(pairs) < FEWEST:
        return MISSING
    found = float(spearmanr(*zip(*pairs, strict=True)).statistic)
    return MISSING if math.isnan(found) else Cell(f"{found:+.2f}", f"{len(pairs)}", found)
