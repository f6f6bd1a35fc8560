"""The paper's Tables 1 to 7 in its own layout: its number, ours beside it, and the difference, where there are both.

Results of a VLM that the paper does not have stand in the layout of Table 1, at the budgets of the same share. A
difference is one of points of percent of the unpruned accuracy. Averages are over the benchmarks that all rows of ours
have, and so compare with each other.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ocvtp.evaluation.benchmarks import benchmark
from pipelines.report_html import names
from pipelines.report_html.claims import FILL, GAPS, OWN
from pipelines.report_html.data import AXES, Results, Row
from pipelines.report_html.tables import COSTED, PRUNED, Block, Cell, Line, Table, chosen_rows, reference, score_text

LIKE_ANY = "table1_llava_1_5_7b"
PAPER_VLMS = {
    "table1_llava_1_5_7b": "LLaVA-1.5-7B",
    "table2_llava_next_7b": "LLaVA-NeXT-7B",
    "table3_qwen2_5_vl_7b": "Qwen2.5-VL-7B",
}
"""The paper's tables of accuracy, and the VLM that each is of."""
_NUMBER = {"table1_llava_1_5_7b": 1, "table2_llava_next_7b": 2, "table3_qwen2_5_vl_7b": 3, "table5_slots_top_k": 5}
_SHARE = re.compile(r"([\d.]+)%")
_TOP_K = re.compile(r"Top (\d+)")
_PER_BENCHMARK, _UNPADDED = "OC-VTP (trained per benchmark)", "OC-VTP (unpadded)"
_OF_UNPADDED = 0.111
"""The share that the paper's unpadded row has the slots for."""
_WHOLE = 576
"""Tokens of LLaVA-1.5, of which tables 6 and 7 name budgets."""


def mean_relative(scores: Mapping[str, float | None], whole: Mapping[str, float | None]) -> float | None:
    """The mean of 100 score / unpruned score over the benchmarks that have both; None without any.

    With the numbers of a row of the paper it gives its column Avg.
    """
    known = [100 * score / base for name, score in scores.items() if score is not None and (base := whole.get(name))]
    return sum(known) / len(known) if known else None


def paper_tables(results: Results, vlm: str) -> list[Table]:
    """All tables of the paper with the results of one VLM in them; empty where the paper's numbers are not here."""
    if results.paper is None:
        return []
    key = paper_key(results.paper, vlm)
    tables = [_table(results, vlm, key, chosen_rows(results, vlm)), _costs(results, vlm)]
    tables.append(_table(results, vlm, "table5_slots_top_k", _rows(results, vlm, {"top_k"})))
    for number, name, axis in ((6, "table6_reference_layer", "layer"), (7, "table7_loss", "loss")):
        tables.append(_by_axis(results, vlm, number, name, axis))
    return tables


def paper_key(paper: Row, vlm: str) -> str:
    """The paper's table of accuracy that a VLM stands in: its own, or, of one that the paper lacks, Table 1."""
    found: str = paper["vlms"].get(vlm, LIKE_ANY)
    return found


def share_of(retain: str) -> float | None:
    """Of a budget as the paper names it, `64 Tokens (11.1%)`: 11.1; None if it names no share."""
    found = _SHARE.search(retain)
    return None if found is None else float(found[1])


def common(results: Results, vlm: str) -> list[str]:
    """The benchmarks on which every evaluated setting of a VLM has a relative accuracy that means something.

    Where the unpruned model does no better than chance, a percentage of its score means nothing.
    """
    rows = [row for row in results.summary if row["vlm"] == vlm and OWN not in row["changes"]]
    pruned = [row for row in rows if row["method"] != "vanilla"]
    whole: Row = next((row["benchmarks"] for row in rows if row["method"] == "vanilla"), {})

    return [
        name
        for name in results.benchmarks
        if pruned
        and benchmark(name).means_something((whole.get(name) or {}).get("score"))
        and all((row["benchmarks"].get(name) or {}).get("relative") is not None for row in pruned)
    ]


# --- Tables 1 to 3 and 5: a row for each method, a column for each benchmark ------------------------------------------


def _table(results: Results, vlm: str, key: str, rows: Sequence[Row]) -> Table:
    paper: Any = results.paper
    data, number = paper[key], _NUMBER[key]
    columns = {label: name for name, label in paper["benchmarks"].items() if label in data["benchmarks"]}
    shown = [name for name in common(results, vlm) if name in columns.values()]
    whole = data["rows"][0]
    own = _changed(results, vlm, {OWN})
    unpadded = _unpadded(results, vlm)
    blocks = []
    for retain in dict.fromkeys(row["retain"] for row in data["rows"]):
        lines, used = [], []
        for theirs in (row for row in data["rows"] if row["retain"] == retain):
            label = theirs["method"]
            if label == _PER_BENCHMARK:
                ours = _per_benchmark(theirs, own)
            elif label == _UNPADDED:
                ours = unpadded
                label += (
                    ""
                    if ours is None
                    else f", here {ours['kept']:.1f} of {names.budget(ours['tokens'], ours['share'])}"
                )
            else:
                ours = _ours(paper, theirs, rows)
            used.append(None if ours is None else ours["method"])
            lines.append(_line(results, label, theirs, ours, columns, whole, shown))
        more = [row for row in rows if number != 5 and row["method"] not in used and _same_share(retain, row)]
        lines += [_line(results, names.method(row["method"]), None, row, columns, whole, shown) for row in more]
        blocks.append(Block(retain, lines))
    return Table(
        name=f"table{number}-{vlm}",
        caption=f"Table {number} of the paper, and {vlm}",
        head=["Method", *columns, "Avg"],
        blocks=blocks,
        note=f"Above: {vlm} here. Below: the paper, and how many points of percent of its unpruned VLM ours are more."
        f" {_about_vlm(paper, vlm)} {_about_average(shown, columns)}",
    )


def _rows(results: Results, vlm: str, free: Collection[str]) -> list[Row]:
    """Rows of a VLM at the paper's choice of each axis but the free ones, of which `ablate` may have others."""
    wanted = reference(results, vlm)
    return [
        row
        for row in results.summary
        if row["vlm"] == vlm
        and set(row["changes"]) <= set(free)
        and all(row[axis] in (None, wanted[axis]) for axis in AXES if axis not in free)
    ]


def _ours(paper: Row, theirs: Row, rows: Sequence[Row]) -> Row | None:
    """The row of ours that a row of the paper compares with."""
    method = next((name for name, label in paper["methods"].items() if label == theirs["method"]), None)
    top_k = _TOP_K.search(theirs["method"])
    if method == "vanilla":
        return next((row for row in rows if row["method"] == "vanilla"), None)
    if top_k is not None:
        method, rows = PRUNED, [row for row in rows if row["top_k"] == int(top_k[1])]
    return next((row for row in rows if row["method"] == method and _same_share(theirs["retain"], row)), None)


def _changed(results: Results, vlm: str, paths: Collection[str]) -> list[Row]:
    """Rows of OC-VTP at the paper's choice of each axis, with exactly these entries changed."""
    wanted = reference(results, vlm)
    return [
        row
        for row in results.summary
        if row["vlm"] == vlm
        and row["method"] == PRUNED
        and set(row["changes"]) == set(paths)
        and all(wanted[axis] is None or row[axis] == wanted[axis] for axis in AXES)
    ]


def _unpadded(results: Results, vlm: str) -> Row | None:
    """OC-VTP without filling, at the budget for which the paper gives it."""
    found = (row for row in _changed(results, vlm, {FILL}) if row["changes"][FILL] == GAPS)
    return next((row for row in found if row["share"] and round(row["share"], 3) == _OF_UNPADDED), None)


def _per_benchmark(theirs: Row, own: Sequence[Row]) -> Row | None:
    """Of each benchmark the pruner that was trained on its images, as one row."""
    found = {
        row["changes"][OWN]: row["benchmarks"].get(row["changes"][OWN])
        for row in reversed(own)
        if _same_share(theirs["retain"], row)
    }
    return {"method": PRUNED, "benchmarks": found} if found else None


def _same_share(retain: str, row: Row) -> bool:
    return row["share"] is not None and round(100 * row["share"], 1) == share_of(retain)


def _line(
    results: Results, label: str, theirs: Row | None, ours: Row | None, columns: Mapping[str, str], whole: Row,
    shown: Sequence[str],
) -> Line:  # fmt: skip
    cells = []
    for column, name in columns.items():
        found = ((ours or {}).get("benchmarks") or {}).get(name) or {}
        score, relative = found.get("score"), found.get("relative")
        paper = None if theirs is None else theirs[column]
        top = names.DASH if score is None else score_text(results, name, score)
        cells.append(_cell(top, relative, paper, None if paper is None else 100 * paper / whole[column]))
    printed = None if theirs is None else theirs["average_relative_percent"]
    there = {column: theirs[column] for column, name in columns.items() if name in shown} if theirs else {}
    same = mean_relative(there, whole) if there and None not in there.values() else None
    mean = _mean(ours, shown)
    text = None if printed is None else names.percent(printed)
    cells.append(_cell(names.percent(mean), mean, text, same))
    return Line(label, cells)


def _mean(row: Row | None, shown: Sequence[str]) -> float | None:
    if row is None or not shown:
        return None
    whole = row["method"] == "vanilla"
    if not whole and not all(row["benchmarks"].get(name) for name in shown):
        return None
    return sum(100.0 if whole else row["benchmarks"][name]["relative"] for name in shown) / len(shown)


def _cell(top: str, ours: float | None, paper: Any, theirs: float | None) -> Cell:
    """Ours above; the paper's below, with the difference where there are both."""
    if paper is None:
        return Cell(top, "", ours)
    difference = "" if ours is None or theirs is None else f" ({ours - theirs:+.1f})"
    return Cell(top, f"paper {paper if isinstance(paper, str) else f'{paper:g}'}{difference}", ours)


def _about_vlm(paper: Row, vlm: str) -> str:
    if vlm in paper["vlms"]:
        return "It is the paper's VLM."
    return f"The paper has no {vlm}: its numbers are of LLaVA-1.5-7B, and stand here for orientation alone."


def _about_average(shown: Sequence[str], columns: Mapping[str, str]) -> str:
    if not shown:
        return "No benchmark has a relative accuracy in all rows, so there is no average."
    over = ", ".join(column for column, name in columns.items() if name in shown)
    return (
        f"Avg here: over {over}, which all our rows have and where the unpruned model is above chance; the difference "
        "is to the paper's mean over the same."
    )


# --- Table 4: cost ---------------------------------------------------------------------------------------------------


def _costs(results: Results, vlm: str) -> Table:
    paper: Any = results.paper
    lines = []
    for theirs in paper["table4_prefill_flops"]["rows"]:
        asked = COSTED[theirs["vlm"]] == vlm
        own = [row for row in (results.efficiency or {}).get("rows", []) if asked and row["vlm"] == vlm]
        whole = next((row for row in own if row["method"] == "vanilla"), None)
        kept = next((r for r in own if r["method"] == PRUNED and r["tokens"] == theirs["kept_tokens"]), None)
        cells = [
            _cost(whole and whole["paper_flops"], theirs["vanilla"]),
            _cost(kept and kept["paper_flops"], theirs["pruned"]),
            _cost(kept and kept["paper_pruner_flops"], theirs["oc_pruner"]),
        ]
        lines.append(Line(f"{theirs['vlm']}, {theirs['kept_tokens']} tokens", cells))
    return Table(
        name=f"table4-{vlm}",
        caption=f"Table 4 of the paper, and {vlm}",
        head=["VLM", "Vanilla", "OC-VTP", "OC-Pruner"],
        blocks=[Block("", lines)],
        note="FLOP of a prefill by the paper's formula, and of 64 slots, operations on single elements too. "
        "Above: counted here in closed form, for the paper's VLMs. Below: the paper, and how many percent of it ours "
        "are more.",
    )


def _cost(ours: float | None, paper: float) -> Cell:
    difference = "" if ours is None else f" ({100 * ours / paper - 100:+.1f}%)"
    return Cell(names.flops(ours), f"paper {names.flops(paper)}{difference}", ours)


# --- Tables 6 and 7: averages, a column for each value of one axis ----------------------------------------------------


def _by_axis(results: Results, vlm: str, number: int, key: str, axis: str) -> Table:
    paper: Any = results.paper
    names_of = {label: name for name, label in paper["benchmarks"].items()}
    over = [names_of[label] for label in paper["table5_slots_top_k"]["benchmarks"]]
    shown = [name for name in common(results, vlm) if name in over]
    rows = [row for row in _rows(results, vlm, {axis}) if row["method"] == PRUNED]
    columns = [column for column in paper[key]["rows"][0] if column != "tokens"]
    lines = []
    for theirs in paper[key]["rows"]:
        retain = f"{100 * theirs['tokens'] / _WHOLE:.1f}%"
        found = {str(row[axis]): row for row in rows if _same_share(retain, row)}
        cells = []
        for column in columns:
            mean = _mean(found.get(column), shown)
            cells.append(_cell(names.percent(mean), mean, names.percent(theirs[column]), theirs[column]))
        lines.append(Line(f"{theirs['tokens']} Tokens ({retain})", cells))
    labels = [f"Layer {column}" if axis == "layer" else names.LOSSES[column] for column in columns]
    return Table(
        name=f"table{number}-{vlm}",
        caption=f"Table {number} of the paper, and {vlm}",
        head=["Tokens", *labels],
        blocks=[Block("", lines)],
        note=f"Average relative accuracy of OC-VTP. {_about_vlm(paper, vlm)} The paper's is over the benchmarks of "
        f"Table 5; ours over {', '.join(map(names.benchmark, shown)) or 'none'}.",
    )
