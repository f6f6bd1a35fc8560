"""Tables of what `ablate` or a grid of several values tried: Tables 5 to 7 of the paper, and each other entry."""

from collections.abc import Callable, Iterator
from typing import Any

from pipelines.report_html import names
from pipelines.report_html.claims import OWN
from pipelines.report_html.data import AXES, Results, Row
from pipelines.report_html.tables import (
    BOLD_RULE,
    MISSING,
    PRUNED,
    Block,
    Cell,
    Line,
    Table,
    average_cell,
    base_rows,
    best_across,
    budgets,
    covered_cell,
    embolden,
    reference,
    score_cells,
    setting_note,
    values,
)


def ablations(results: Results, vlm: str) -> list[Table]:
    """The ablation tables for which the grid has several values."""
    tables = [make(results, vlm) for make in (top_k_table, layer_table, loss_table, slots_table)]
    together = _together_table(results, vlm)
    return [*(table for table in (*tables, together) if table is not None), *_changed_tables(results, vlm)]


def top_k_table(results: Results, vlm: str) -> Table | None:
    """Slots and tokens a slot at equal budget: the layout of Table 5. None unless the grid has several
    top-k.
    """
    rows = _ablated(results, vlm, "top_k")
    if rows is None:
        return None
    blocks = []
    for tokens, share in budgets(rows):
        block = sorted((row for row in rows if row["share"] == share), key=lambda row: -row["top_k"])
        lines = [Line(_slots_label(row), score_cells(results, row)) for row in block]
        blocks.append(Block(f"Retain {names.budget(tokens, share)}", embolden(lines)))
    return Table(
        name=f"top-k-{vlm}",
        caption=f"Fewer slots that keep more tokens each ({vlm})",
        head=["Slots, top-k", *map(names.benchmark, results.benchmarks), "Avg"],
        blocks=blocks,
        note=f"OC-VTP at equal budget. {BOLD_RULE}{setting_note(results, vlm, but='top_k')}",
    )


def layer_table(results: Results, vlm: str) -> Table | None:
    """The layer that the slots look at: the layout of Table 6."""
    return _by_axis(results, vlm, "layer", "Where the pruner looks", lambda value: f"Layer {value}")


def loss_table(results: Results, vlm: str) -> Table | None:
    """The loss of training: the layout of Table 7."""
    return _by_axis(
        results, vlm, "loss", "The loss that trains the pruner", lambda value: names.LOSSES.get(value, value)
    )


def slots_table(results: Results, vlm: str) -> Table | None:
    """The slot counts drawn in training."""
    return _by_axis(results, vlm, "slots", "Slot counts drawn in training", names.plain)


def _by_axis(results: Results, vlm: str, axis: str, caption: str, label: Callable[[Any], str]) -> Table | None:
    """Averages: a row for each budget, a column for each value."""
    rows = _ablated(results, vlm, axis)
    if rows is None:
        return None
    columns = values(results, vlm, axis)
    lines = []
    for tokens, share in budgets(rows):
        found = {str(row[axis]): row for row in rows if row["share"] == share}
        cells = [average_cell(found.get(str(value))) for value in columns]
        lines.append(Line(names.budget(tokens, share), best_across(cells)))
    return Table(
        name=f"{axis}-{vlm}",
        caption=f"{caption} ({vlm})",
        head=["Tokens", *map(label, columns)],
        blocks=[Block("", lines)],
        note="Average relative accuracy of OC-VTP with its 95% interval. Bold: the best of a row, only where its "
        f"interval lies above the others.{setting_note(results, vlm, but=axis)}",
    )


def _changed_tables(results: Results, vlm: str) -> Iterator[Table]:
    """Of each entry that `ablate` changed and that is no axis: averages, and the share of objects covered."""
    wanted = reference(results, vlm)
    rows = [
        row
        for row in results.summary
        if row["vlm"] == vlm and row["method"].startswith(PRUNED) and all(row[a] in (None, wanted[a]) for a in AXES)
    ]
    # Pruners trained on a benchmark's own images are tried on that one alone: they have no average.
    tried = [row for row in rows if len(row["changes"]) == 1 and not set(row["changes"]) & {*AXES, OWN}]
    for path, method in dict.fromkeys((next(iter(row["changes"])), row["method"]) for row in tried):
        some = [row for row in tried if path in row["changes"] and row["method"] == method]
        options = sorted({row["changes"][path] for row in some}, key=lambda value: (isinstance(value, str), value))
        base = [row for row in rows if not row["changes"] and row["method"] == method]
        lines = []
        for tokens, share in budgets([*base, *some]):
            found = {row["changes"].get(path): row for row in (*base, *some) if row["share"] == share}
            cells = [average_cell(found.get(value)) for value in (None, *options)]
            lines.append(Line(names.budget(tokens, share), best_across(cells)))
            if any(row.get("kept") and tokens and round(row["kept"], 1) != tokens for row in found.values()):
                cells = [_kept_cell(found.get(value)) for value in (None, *options)]
                lines.append(Line("tokens really kept", cells))
            cells = [covered_cell(found.get(value), "all") for value in (None, *options)]
            if any(cell.value is not None for cell in cells):
                lines.append(Line("objects covered", best_across(cells)))
        yield Table(
            name=f"{path.replace('.', '-')}-{method}-{vlm}",
            caption=f"{path} ({names.method(method)}, {vlm})",
            head=["Tokens", "as in the grid", *map(names.plain, options)],
            blocks=[Block("", lines)],
            note="Average relative accuracy with its 95% interval; below it how many tokens were kept, where that is "
            "less than asked, and the share of objects with a kept token on their mask. Bold: the best of a row, only "
            "where its interval lies above the others.",
        )


def _together_table(results: Results, vlm: str) -> Table | None:
    """What `ablate` changed together: averages and paired differences, a row for each combination, by budget."""
    rows = [
        row for row in results.summary if row["vlm"] == vlm and len(row["changes"]) > 1 and OWN not in row["changes"]
    ]
    if not rows:
        return None
    shown = budgets(rows)
    groups: dict[tuple[str, str], dict[float, Row]] = {}
    for row in rows:
        what = ", ".join(f"{path.rsplit('.', 1)[-1]} {names.plain(value)}" for path, value in row["changes"].items())
        groups.setdefault((row["method"], what), {})[row["share"]] = row
    lines = []
    for (method, what), found in groups.items():
        cells = [average_cell(found.get(share)) for _, share in shown]
        lines.append(Line(f"{names.method(method)}: {what}", cells))
        lines.append(
            Line(
                "points to the grid's own",
                [_points_cell((found.get(share) or {}).get("difference")) for _, share in shown],
            )
        )
        if any(row["against"] for row in found.values()):
            best = [_best_untrained(results, vlm, found.get(share)) for _, share in shown]
            lines.append(Line("points to the best without training", best))
    return Table(
        name=f"together-{vlm}",
        caption=f"Changed together ({vlm})",
        head=["Changes", *(names.budget(tokens, share) for tokens, share in shown)],
        blocks=[Block("", lines)],
        note="Average relative accuracy with its 95% interval; below it the difference to the same method as the grid "
        "has it, and to the most accurate method of the budget that is not trained, both paired by question.",
    )


def _kept_cell(row: Row | None) -> Cell:
    """Tokens of an image that were kept, in the mean."""
    return MISSING if row is None or row.get("kept") is None else Cell(f"{row['kept']:.1f}")


def _points_cell(found: Row | None, name: str = "") -> Cell:
    """A paired difference; `name` says to what."""
    if found is None or found.get("points") is None:
        return MISSING
    points, low, high = (found[key] for key in ("points", "ci_low", "ci_high"))
    return Cell(f"{points:+.1f} {name}".rstrip(), names.interval(low, high), points, low, high)


def _best_untrained(results: Results, vlm: str, row: Row | None) -> Cell:
    """Points of a row to the most accurate method of its budget that no one trained."""
    if row is None:
        return MISSING
    same = [one for one in base_rows(results, vlm) if one["share"] == row["share"] and one["method"] in row["against"]]
    known = [one for one in same if one["average"]["relative"] is not None]
    if not known:
        return MISSING
    best = max(known, key=lambda one: one["average"]["relative"])["method"]
    return _points_cell(row["against"][best], names.method(best))


def _ablated(results: Results, vlm: str, axis: str) -> list[Row] | None:
    """OC-VTP's rows that differ on one axis only; None if there is nothing to compare."""
    if len(values(results, vlm, axis)) < 2:
        return None
    wanted = reference(results, vlm)
    rows = [row for row in results.summary if row["vlm"] == vlm and row["method"] == PRUNED]
    return [
        row for row in rows if set(row["changes"]) <= {axis} and all(row[a] == wanted[a] for a in AXES if a != axis)
    ]


def _slots_label(row: Row) -> str:
    tokens, k = row["tokens"], row["top_k"]
    return f"Top {k}" if tokens is None else f"{int(tokens) // k} Slots - Top {k}"
