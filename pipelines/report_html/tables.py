"""Tables in the layouts of the paper, as plain data: how they look on a page is the templates' affair.

A cell has a line above (a score) and a line below (relative accuracy or an interval). The highest value of a
block and column is bold only where its 95% interval lies above the intervals of all others in the block.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.report_html import names
from pipelines.report_html.data import AXES, Results, Row

PAPERS_CHOICE: Mapping[str, Any] = {"layer": 9, "loss": "aw_mse", "top_k": 1}
"""Where the grid has several values on an axis, the main table shows the paper's choice."""
PRUNED = "oc-vtp"
COSTED = {"LLaVA-1.5": "llava-1.5-7b", "LLaVA-NeXT": "llava-next-7b"}
"""The VLMs whose cost the paper gives, Table 4 in FLOP and Figure 3 in milliseconds, by the names that it has there."""
BOLD_RULE = (
    "Bold: the best of a block and column, only where its 95% interval lies above those of all others in the block."
)


@dataclass(frozen=True)
class Cell:
    """Two lines of a table. `value` and its interval decide what is bold."""

    top: str
    bottom: str = ""
    value: float | None = None
    low: float | None = None
    high: float | None = None
    bold: bool = False


@dataclass(frozen=True)
class Line:
    """A row: a label and a cell for each column."""

    label: str
    cells: Sequence[Cell]


@dataclass(frozen=True)
class Block:
    """Rows under one heading; no heading if empty."""

    title: str
    lines: Sequence[Line]


@dataclass(frozen=True)
class Table:
    """A table with its caption; `note` says what it shows and how to read it."""

    name: str
    caption: str
    head: Sequence[str]
    blocks: Sequence[Block]
    note: str = ""


MISSING = Cell(names.DASH)


def reference(results: Results, vlm: str) -> dict[str, Any]:
    """The value of each axis that the main table shows: the paper's where it is in the grid, else the
    first.
    """
    chosen = {}
    for axis in AXES:
        seen = [row[axis] for row in base_rows(results, vlm) if row["method"] == PRUNED and row[axis] is not None]
        wanted = PAPERS_CHOICE.get(axis)
        chosen[axis] = wanted if wanted in seen else seen[0] if seen else None
    return chosen


def values(results: Results, vlm: str, axis: str) -> list[Any]:
    """The values of an axis that OC-VTP was run with, in order of appearance."""
    seen: list[Any] = []
    for row in results.summary:
        ours = row["vlm"] == vlm and row["method"] == PRUNED and len(row["changes"]) < 2
        if ours and row[axis] is not None and row[axis] not in seen:
            seen.append(row[axis])
    return seen


def base_rows(results: Results, vlm: str) -> list[Row]:
    """Summary rows of the grid itself, without those of `ablate`."""
    return [row for row in results.summary if row["vlm"] == vlm and not row["changes"]]


def chosen_rows(results: Results, vlm: str) -> list[Row]:
    """Summary rows of a VLM at the reference value of each axis that they have, or at the only one of their method."""
    rows, wanted = base_rows(results, vlm), reference(results, vlm)
    values = {(row["method"], axis): {str(one[axis]) for one in rows if one["method"] == row["method"]}
              for row in rows for axis in AXES}  # fmt: skip

    def chosen(row: Row, axis: str) -> bool:
        return row[axis] in (None, wanted[axis]) or len(values[row["method"], axis]) == 1

    return [row for row in rows if all(chosen(row, axis) for axis in AXES)]


def main_table(results: Results, vlm: str) -> Table:
    """Scores and relative accuracy of all methods and budgets: the layout of the paper's Table 1."""
    rows = chosen_rows(results, vlm)
    vanilla = [row for row in rows if row["method"] == "vanilla"]
    blocks = [
        Block(
            f"Vanilla, {names.budget(row['tokens'], 1.0, whole=True)}",
            [Line(names.method("vanilla"), score_cells(results, row, pruned=False))],
        )
        for row in vanilla[:1]
    ]
    for tokens, share in budgets(rows):
        block = [row for row in rows if row["method"] != "vanilla" and row["share"] == share]
        lines = [Line(names.method(row["method"]), score_cells(results, row)) for row in standing(block)]
        blocks.append(Block(f"Retain {names.budget(tokens, share)}", embolden(lines)))
    return Table(
        name=f"main-{vlm}",
        caption="Scores, and percent of vanilla’s",
        head=["Method", *map(names.benchmark, results.benchmarks), "Avg"],
        blocks=blocks,
        note="Under each score: percent of vanilla's. Avg: mean of these percents, where vanilla is better than "
        "chance, with its 95% interval from a "
        f"bootstrap over questions, paired with vanilla, seeds pooled. {BOLD_RULE}{setting_note(results, vlm)}",
    )


def coverage_table(results: Results, vlm: str) -> Table | None:
    """Objects with a kept token on their mask; None where there are no masks."""
    rows = [row for row in chosen_rows(results, vlm) if row["coverage"] and row["method"] != "vanilla"]
    if not rows:
        return None
    blocks = []
    for tokens, share in budgets(rows):
        block = standing([row for row in rows if row["share"] == share])
        lines = [
            Line(names.method(row["method"]), [covered_cell(row, size) for size in ("all", "small")]) for row in block
        ]
        blocks.append(Block(f"Retain {names.budget(tokens, share)}", embolden(lines)))
    found = rows[0]["coverage"]
    return Table(
        name=f"coverage-{vlm}",
        caption="Objects with a kept token on their mask",
        head=["Method", f"All {found['all']['objects']} objects", f"{found['small']['objects']} small ones"],
        blocks=blocks,
        note="An object is small if it covers less than two tokens. 95% intervals from a bootstrap over images, seeds "
        f"pooled. {BOLD_RULE}{setting_note(results, vlm)}",
    )


# --- Pieces ---------------------------------------------------------------------------------------------------------


def covered_cell(row: Row | None, size: str) -> Cell:
    """Share of objects of a size, `all` or `small`, with a kept token; a dash without masks."""
    found = ((row or {}).get("coverage") or {}).get(size) or {}
    if found.get("share") is None:
        return MISSING
    value, low, high = (100 * found[key] for key in ("share", "ci_low", "ci_high"))
    return Cell(names.percent(value), names.interval(low, high), value, low, high)


def budgets(rows: Iterable[Row]) -> list[tuple[float | None, float]]:
    """(tokens, share) of all budgets, the largest first."""
    found = {row["share"]: row["tokens"] for row in rows if row["method"] != "vanilla"}
    return [(found[share], share) for share in sorted(found, reverse=True)]


def standing(rows: Sequence[Row]) -> list[Row]:
    """Rivals in the order in which they were asked for, then ours, as in the paper."""
    return [row for row in rows if not row["method"].startswith(PRUNED)] + sorted(
        (row for row in rows if row["method"].startswith(PRUNED)), key=lambda row: -len(row["method"])
    )


def score_cells(results: Results, row: Row, *, pruned: bool = True) -> list[Cell]:
    """A cell for each benchmark, and the average."""
    cells = []
    for name in results.benchmarks:
        found = row["benchmarks"].get(name)
        if not found or found.get("score") is None:
            cells.append(Cell(names.DASH, names.DASH))
            continue
        relative = found.get("relative") if pruned else 100.0
        cells.append(
            Cell(
                score_text(results, name, found["score"]),
                "100%" if not pruned else names.percent(relative),
                relative,
                found.get("ci_low"),
                found.get("ci_high"),
            )
        )
    if not pruned:
        return [*cells, Cell("100%")]
    return [*cells, average_cell(row)]


def average_cell(row: Row | None) -> Cell:
    """Average relative accuracy with its interval; a dash without one."""
    average = (row or {}).get("average") or {}
    value, low, high = (average.get(key) for key in ("relative", "ci_low", "ci_high"))
    if value is None:
        return MISSING
    return Cell(names.percent(value), names.interval(low, high), value, low, high)


def score_text(results: Results, benchmark: str, score: float) -> str:
    """A score as the paper prints it: shares in percent with one digit, sums of points without."""
    points = max(
        (row["score"] for row in results.scores if row["benchmark"] == benchmark and row["score"] is not None),
        default=score,
    )
    if points <= 1 and score <= 1:
        return f"{100 * score:.1f}"
    return f"{score:.1f}" if points <= 100 else f"{score:.0f}"


def embolden(lines: Sequence[Line]) -> list[Line]:
    """The lines with the best of each column in bold, where it is best beyond doubt."""
    if len(lines) < 2:
        return list(lines)
    columns = [best_across(column) for column in zip(*(line.cells for line in lines), strict=True)]
    return [Line(line.label, [column[index] for column in columns]) for index, line in enumerate(lines)]


def best_across(cells: Sequence[Cell]) -> list[Cell]:
    """The cells with the best in bold, where it is best beyond doubt."""
    known = [cell for cell in cells if cell.value is not None]
    if len(known) < 2:
        return list(cells)
    best = max(known, key=lambda cell: cell.value or 0.0)
    others = [cell for cell in known if cell is not best]
    clear = best.low is not None and all(cell.high is not None and cell.high < best.low for cell in others)
    return [Cell(c.top, c.bottom, c.value, c.low, c.high, bold=clear and c is best) for c in cells]


def setting_note(results: Results, vlm: str, but: str = "") -> str:
    """What the fixed axes are, where the grid has several values on any of them."""
    if all(len(values(results, vlm, axis)) < 2 for axis in AXES):
        return ""
    wanted = reference(results, vlm)
    shown = [f"{axis} {names.plain(wanted[axis])}" for axis in AXES if axis != but and wanted[axis] is not None]
    return f" OC-VTP here: {'; '.join(shown)}."
