"""Tables beside the main ones: cost, time, the paper's own numbers, and what made the results."""

from collections.abc import Mapping, Sequence
from typing import Any

from ocvtp import figures
from ocvtp.errors import Corrupt
from ocvtp.json_files import read_json
from pipelines.report_html import names
from pipelines.report_html.data import Results, Row
from pipelines.report_html.paper_tables import PAPER_VLMS
from pipelines.report_html.tables import COSTED, PRUNED, Block, Cell, Line, Table

_PARTS = ("tower", "projector", "pruner", "llm", "lm_head")


def efficiency_table(results: Results, vlm: str) -> Table | None:
    """Operations of a prefill by the paper's formula and in truth, and the KV cache; None if not counted."""
    if results.efficiency is None:
        return None
    rows = [row for row in results.efficiency["rows"] if row["vlm"] == vlm]
    if not rows:
        return None
    vanilla = next((row for row in rows if row["method"] == "vanilla"), None)
    whole = _total(vanilla)
    blocks = (
        [Block(f"Vanilla, {names.budget(vanilla['tokens'], 1.0, whole=True)}", [_cost(vanilla, whole)])]
        if (vanilla)
        else []
    )
    pruned = [row for row in rows if row["method"] != "vanilla"]
    for tokens in sorted({row["tokens"] for row in pruned}, reverse=True):
        group = [row for row in pruned if row["tokens"] == tokens]
        share = group[0].get("share") or (tokens / vanilla["tokens"] if vanilla else None)
        blocks.append(Block(f"Retain {names.budget(tokens, share)}", [_cost(row, whole) for row in group]))
    text = results.efficiency.get("text_tokens")
    return Table(
        name=f"efficiency-{vlm}",
        caption=f"Operations of a prefill of one image ({vlm})",
        head=["Method", "Paper’s formula", "Tower", "Projector", "Pruner", "LLM", "lm_head", "All", "KV cache"],
        blocks=blocks,
        note="FLOP, a multiply-accumulate counts as two. The paper’s formula has the language model only, with two of "
        "its MLP’s three matrices; the other columns count all that runs. Under each sum: percent of vanilla’s."
        + (f" {text} text tokens beside the image’s." if text is not None else ""),
    )


FIGURE_3 = ("vanilla", "random", "hiprune", PRUNED)
"""The bars of the paper's Figure 3."""
Times = dict[str, dict[str, dict[str, float]]]


def measured_times(results: Results) -> Times:
    """Milliseconds an image at the budgets of the paper's Figure 3: VLM and budget -> measurement -> method.

    First what the paper prints of it, then each table of benchmarks/gpu.py that was measured at that budget, to the
    first token: the file that it is in and its batch. Empty where the paper's numbers are not here.

    Raises:
        Corrupt: a file of benchmarks/results is not what benchmarks/gpu.py writes; names it.
    """
    found: Times = {}
    for label, printed in (results.paper or {}).get("figure3_latency_ms_per_image_v100_32gb", {}).items():
        name, tokens = label.removesuffix(" tokens").rsplit(", ", 1)
        theirs = {method: printed[key] for method, key in (("vanilla", "vanilla"), (PRUNED, "oc_vtp"))}
        found[label] = {"paper, V100": theirs, **_of_benchmarks(results, COSTED[name], int(tokens))}
    return found


def figure3_table(results: Results) -> Table | None:
    """The paper's Figure 3 in numbers; None where the paper's are not here."""
    times = measured_times(results)
    if not times:
        return None
    columns = list(dict.fromkeys(column for groups in times.values() for column in groups))
    blocks = [
        Block(label, [
            Line(names.method(method), [_time(groups.get(column, {}), method) for column in columns])
            for method in FIGURE_3
        ])
        for label, groups in times.items()
    ]  # fmt: skip
    note = (
        "Milliseconds, and percent of the unpruned model's. Paper: an image end to end on a V100, of which it prints "
        "these four numbers alone. "
    )
    note += (
        "Here: to the first token, a file of benchmarks/results and its batch; random weights, which take as long as "
        "others, so OC-VTP is untrained."
        if len(columns) > 1
        else "Here: never measured, benchmarks/results has no run of benchmarks/gpu.py at these budgets."
    )
    return Table("figure3", "Figure 3 of the paper: time per image", ["Method", *columns], blocks, note)


def figure3(results: Results, form: figures.Format = "svg") -> bytes | None:
    """The paper's Figure 3 as bars; None where the paper's numbers are not here."""
    times = measured_times(results)
    drawn = {name: names.method(name) for name in FIGURE_3}
    return figures.times(times, names=drawn, form=form) if times else None


def _of_benchmarks(results: Results, vlm: str, tokens: int) -> dict[str, dict[str, float]]:
    found = {}
    for path in sorted((results.root / "benchmarks" / "results").glob("gpu-*.json")):
        try:
            tables = [one for model in read_json(path)["vlms"] if model["vlm"] == vlm for one in model["tables"]]
            for table in tables:
                rows = [row for row in table["rows"] if row["kept"] in (tokens, table["tokens"])]
                times = {row["method"].removesuffix("-untrained"): row["ms"]["first_token"] / table["batch"]
                         for row in rows}  # fmt: skip
                if table["new_tokens"] == 1 and len(times) > 1 and "vanilla" in times:
                    name = f"{path.stem.removeprefix('gpu-')}, batch {table['batch']}"
                    found[name] = {method: times[method] for method in FIGURE_3 if method in times}
        except (KeyError, TypeError, AttributeError) as error:
            raise Corrupt(f"{path} is not what benchmarks/gpu.py writes: it has no {error}") from error
    return found


def _time(times: Mapping[str, float], method: str) -> Cell:
    found = times.get(method)
    if found is None:
        return Cell(names.DASH)
    return Cell(f"{found:.1f}", names.percent(100 * found / times["vanilla"]), found)


def paper_table(results: Results) -> Table | None:
    """The averages that the paper reports, to compare with."""
    if results.paper is None:
        return None
    blocks = []
    for key, vlm in PAPER_VLMS.items():
        rows = results.paper.get(key, {}).get("rows", [])
        budgets = list(dict.fromkeys(row["retain"] for row in rows))[1:]
        methods = list(dict.fromkeys(row["method"] for row in rows))[1:]
        found = {(row["method"], row["retain"]): row.get("average_relative_percent") for row in rows}
        lines = [Line(m, [Cell(names.percent(found.get((m, b)))) for b in budgets[:3]]) for m in methods]
        lines = [line for line in lines if any(cell.top != names.DASH for cell in line.cells)]
        if lines:
            blocks.append(Block(f"{vlm}: {'; '.join(budgets[:3])}", lines))
    if not blocks:
        return None
    return Table(
        name="paper",
        caption="The paper’s averages",
        head=["Method", "largest budget", "middle", "smallest"],
        blocks=blocks,
        note="Average relative accuracy as printed in the paper, over its own benchmarks, without intervals. "
        "Nothing on this page was tuned to these numbers.",
    )


def pruners_table(results: Results) -> Table | None:
    """The trained pruners; None if none is there."""
    if not results.pruners:
        return None
    lines = []
    for pruner in results.pruners:
        values = [c for c in pruner.curves.get("val_loss", []) if c is not None]
        lines.append(
            Line(
                pruner.name,
                [
                    Cell(names.plain(pruner.metrics.get("fingerprint"))[:12]),
                    Cell(names.plain(pruner.metrics.get("val_loss", min(values, default=None)))),
                    Cell(names.plain(pruner.metrics.get("steps"))),
                ],
            )
        )
    return Table(
        name="pruners",
        caption="Trained pruners",
        head=["Pruner", "Fingerprint", "Validation loss", "Steps"],
        blocks=[Block("", lines)],
    )


def provenance(results: Results) -> list[tuple[str, str]]:
    """What made the numbers: (what, which). Values that differ between results are all listed."""
    scores = [results.score_file(row) for row in results.scores]
    facts: list[tuple[str, str]] = []
    for key, title in (
        ("dtype", "Computed in"),
        ("attn_implementation", "Attention"),
        ("image_backend", "Images read by"),
        ("protocol", "Protocol"),
        ("prompt_template", "Prompt"),
    ):
        facts += _fact(title, [score.get(key) for score in scores])
    facts += _fact("VLM", [_revision(score.get("setting") or {}) for score in scores])
    asked = {row["benchmark"]: row.get("n") for row in results.scores if row.get("n")}
    facts += _fact("Questions", [", ".join(f"{names.benchmark(k)} {v}" for k, v in asked.items())])
    if results.sample is not None:
        facts += _fact("Data", ["; ".join(f"{k} {names.plain(v)}" for k, v in results.sample.items() if _short(v))])
    versions: dict[str, list[Any]] = {}
    for score in scores:
        for package, version in (score.get("versions") or {}).items():
            versions.setdefault(package, []).append(version)
    facts += _fact("Packages", ["; ".join(f"{p} {_distinct(v)}" for p, v in sorted(versions.items()))])
    return facts


def _cost(row: Row, whole: float | None) -> Line:
    flops = row["flops"]
    total = _total(row)
    share = names.percent(100 * total / whole) if total and whole else ""
    cells = [Cell(names.flops(row.get("paper_flops")))]
    cells += [Cell(names.flops(flops.get(part)) if flops.get(part) else names.DASH) for part in _PARTS]
    cells += [Cell(names.flops(total), share), Cell(names.size(row.get("kv_cache_bytes")))]
    return Line(names.method(row["method"]), cells)


def _total(row: Row | None) -> float | None:
    if row is None:
        return None
    flops = row["flops"]
    return flops["total"] if "total" in flops else sum(flops.get(part) or 0 for part in _PARTS)


def _revision(setting: Row) -> str | None:
    vlm = setting.get("vlm")
    return f"{vlm} ({setting['revision']})" if vlm and setting.get("revision") else vlm


def _fact(title: str, found: Sequence[Any]) -> list[tuple[str, str]]:
    text = _distinct(found)
    return [(title, text)] if text else []


def _distinct(found: Sequence[Any]) -> str:
    return ", ".join(dict.fromkeys(names.plain(value) for value in found if value not in (None, "")))


def _short(value: Any) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)
