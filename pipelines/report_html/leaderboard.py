"""All methods at all budgets: ranks with intervals, hard questions, what layers truly read, and milliseconds."""

import statistics
from collections.abc import Mapping
from typing import Any

from ocvtp.json_files import read_json
from pipelines.report_html import names
from pipelines.report_html.data import Results, Row
from pipelines.report_html.tables import MISSING, Block, Cell, Line, Table, average_cell, budgets, chosen_rows

SHALLOW = 12
"""Layers of an LLM below which methods inside it rank tokens by layers that have hardly seen them."""


def leaderboard(results: Results, vlm: str) -> Table | None:
    """None where no setting has a rank."""
    rows = [row for row in chosen_rows(results, vlm) if row.get("rank")]
    if not rows:
        return None
    layers, times = _layers(results, vlm), _milliseconds(results, vlm)
    blocks = []
    for tokens, share in budgets(rows):
        block = sorted((row for row in rows if row["share"] == share), key=lambda row: row["rank"]["rank"])
        lines = [
            Line(
                names.method(row["method"]),
                [_rank(row), average_cell(row), _hard(row), _mean(row, layers), _time(row, times)],
            )
            for row in block
        ]
        blocks.append(Block(f"Retain {names.budget(tokens, share)}", lines))
    return Table(
        name=f"leaderboard-{vlm}",
        caption="Leaderboard",
        head=["Method", "Rank", "Avg", "Hard questions", "Tokens a layer", "ms, batch 8"],
        blocks=blocks,
        note="Rank by average relative accuracy; its 95% interval is that of ranks over resamples in which all methods "
        "answer the same questions, so that methods whose intervals overlap little differ. Hard: of the questions that "
        "the unpruned model answers and downsampling to the same budget does not, the share that is answered. Tokens a "
        "layer: of an image, mean over the layers of the LLM as they truly read them; rows “as its authors count” keep "
        "what their authors keep at that number. ms: to the first token, as benchmarks/methods.py recorded it at this "
        f"budget, on the machine that its file names.{_caveat(layers, vlm)}",
    )


def _rank(row: Row) -> Cell:
    found = row["rank"]
    return Cell(f"{found['rank']}", f"[{found['low']}, {found['high']}]", -float(found["rank"]))


def _hard(row: Row) -> Cell:
    found = row.get("hard")
    if not found:
        return MISSING
    value, low, high = (100 * found[key] for key in ("share", "ci_low", "ci_high"))
    return Cell(names.percent(value), f"{names.interval(low, high)} of {found['n']}", value, low, high)


def _layers(results: Results, vlm: str) -> dict[Any, list[int]]:
    """Tokens that each layer reads, by method and budget."""
    rows = (results.efficiency or {}).get("rows", [])
    return {(row["method"], row["tokens"]): row["layers"] for row in rows if row["vlm"] == vlm and "layers" in row}


def _mean(row: Row, layers: Mapping[Any, list[int]]) -> Cell:
    found = layers.get((row["method"], row["tokens"]))
    return MISSING if not found else Cell(f"{statistics.fmean(found):.1f}")


def _milliseconds(results: Results, vlm: str) -> dict[Any, float]:
    """Of the newest methods-cpu-DATE.json (or cuda) of benchmarks/methods.py, by method and share."""
    files = sorted(
        (results.root / "benchmarks" / "results").glob("methods-c*-????-??-??.json"), key=lambda path: path.name[-15:]
    )
    for path in reversed(files):
        for model in read_json(path).get("models", []):
            if model["model"] == vlm:
                return {(row["method"], row["keep"]): row["batch_8"]["ms"] for row in model["rows"] if "batch_8" in row}
    return {}


def _time(row: Row, times: Mapping[Any, float]) -> Cell:
    found = times.get((row["method"], f"{100 * row['share']:.1f}%"))
    return MISSING if found is None else Cell(f"{found:.1f}")


def _caveat(layers: Mapping[Any, list[int]], vlm: str) -> str:
    depth = max((len(each) for each in layers.values()), default=SHALLOW)
    if depth >= SHALLOW:
        return ""
    return (
        f" No conclusion about methods inside the LLM follows from {vlm}: its LLM has {depth} layers, so that they "
        "rank tokens by layers that have hardly seen them, and layer 0 alone reads more than small budgets."
    )
