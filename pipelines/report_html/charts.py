"""The lines of the report: what is drawn, and how a drawing becomes part of a page that is light or dark."""

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import replace

from ocvtp import figures
from pipelines.report_html import names
from pipelines.report_html.data import AXES, Pruner, Results
from pipelines.report_html.paper_tables import PAPER_VLMS, paper_key, share_of
from pipelines.report_html.tables import PRUNED, chosen_rows

_FIRST = ("loss", "val_loss", "val_mse", "distinct_picks", *names.RATIOS, "span_error", "prototype_error")
_LAST = ("grad_norm",)
_LEFT_OUT = ("step", "lr", "random_span_error", "handed_on_span_error", "random_handed_on_span_error")


def accuracy_svg(results: Results, vlm: str, form: figures.Format = "svg") -> bytes | None:
    """The paper's Figure 1: average relative accuracy against tokens kept, here and in the paper; None without any."""
    rows = [row for row in chosen_rows(results, vlm) if (row["average"] or {}).get("relative") is not None]
    whole = next((row["tokens"] for row in rows if row["method"] == "vanilla"), None)
    series = []
    for method in dict.fromkeys(row["method"] for row in rows):
        points = sorted((row for row in rows if row["method"] == method), key=lambda row: row["share"] or 1)
        if method == "vanilla":
            continue
        x = [row["tokens"] if whole else 100 * row["share"] for row in points]
        y, low, high = ([row["average"].get(key) for row in points] for key in ("relative", "ci_low", "ci_high"))
        known = all(value is not None for value in [*low, *high])
        series.append(
            figures.Series(method, x, y, low if known else None, high if known else None, names.method(method))
        )
    if not series:
        return None
    series.sort(key=lambda line: line.label != PRUNED)
    xlabel = "tokens kept of an image" if whole else "tokens kept of an image, %"
    theirs, of = _of_paper(results, vlm)
    return figures.accuracy(
        series, whole=whole, beside=theirs, titles=(f"{vlm}, here", f"{of}, in the paper"), xlabel=xlabel, form=form
    )


def _of_paper(results: Results, vlm: str) -> tuple[list[figures.Series], str]:
    """The averages that the paper prints, a line a method, and the VLM that they are of; none without its numbers."""
    if results.paper is None:
        return [], ""
    key = paper_key(results.paper, vlm)
    methods = {label: name for name, label in results.paper["methods"].items() if name != "vanilla"}
    points: dict[str, dict[float, float]] = {}
    for row in results.paper[key]["rows"]:
        share, mean = share_of(row["retain"]), row["average_relative_percent"]
        if row["method"] in methods and share is not None and mean is not None:
            points.setdefault(row["method"], {})[share] = mean
    lines = [
        figures.Series(
            methods[label], sorted(found), [found[x] for x in sorted(found)], name=names.method(methods[label])
        )
        for label, found in points.items()
    ]
    return sorted(lines, key=lambda line: line.label != PRUNED), PAPER_VLMS[key]


def curves_svg(pruners: Sequence[Pruner], form: figures.Format = "svg") -> bytes | None:
    """Training curves, a plot for each column and for how well kept tokens rebuild the others; None without any."""
    pruners = [replace(pruner, curves={**pruner.curves, **_ratios(pruner)}) for pruner in pruners]
    columns = list(dict.fromkeys(k for pruner in pruners for k in pruner.curves if k not in _LEFT_OUT))
    order = [*(c for c in _FIRST if c in columns), *(c for c in columns if c not in (*_FIRST, *_LAST))]
    order += [c for c in _LAST if c in columns]
    legend = _legend(pruners)
    panels = []
    for column in order:
        lines = [line for pruner in pruners if (line := _curve(pruner, column, legend[pruner.name]))]
        if lines:
            panels.append((names.CURVES.get(column, column.replace("_", " ")), lines))
    return figures.curves(panels, form=form) if panels else None


def _ratios(pruner: Pruner) -> dict[str, list[float | None]]:
    """What kept tokens leave unexplained, relative to random ones."""
    found = {}
    for name, (above, below) in names.RATIOS.items():
        pairs = zip(pruner.curves.get(above, []), pruner.curves.get(below, []), strict=False)
        found[name] = [a / b if a is not None and b else None for a, b in pairs]
    return {name: values for name, values in found.items() if values}


def _curve(pruner: Pruner, column: str, name: str) -> figures.Series | None:
    steps, values = pruner.curves.get("step", []), pruner.curves.get(column, [])
    points = [(x, y) for x, y in zip(steps, values, strict=False) if x is not None and y is not None]
    if not points:
        return None
    x, y = zip(*points, strict=True)
    return figures.Series(name, x, y)


def _legend(pruners: Sequence[Pruner]) -> dict[str, str]:
    """What tells each pruner from the others, seeds apart: `layer 10, AW-MSE`."""
    said = {pruner.name: _said(pruner) for pruner in pruners}
    differ = [i for i in range(5) if len({parts[i] for parts in said.values()}) > 1]
    return {name: ", ".join(parts[i] for i in differ) or "OC-Pruner" for name, parts in said.items()}


def _said(pruner: Pruner) -> tuple[str, str, str, str, str]:
    layer, loss, slots = (pruner.config.get(key) for key in ("layer", "loss", "slots"))
    loss_name = names.LOSSES.get(str(loss), names.plain(loss))
    changes = ", ".join(f"{path.removeprefix('train.')} {names.plain(v)}" for path, v in pruner.changes.items())
    return pruner.vlm, f"layer {names.plain(layer)}", loss_name, f"slots {names.plain(slots)}", changes or "grid"


def inline(svg: bytes, prefix: str) -> str:
    """An SVG as part of an HTML page: ids of its own, colours of the page, width of its column."""
    text = svg.decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r"url\(#", f"url(#{prefix}-", text)
    text = re.sub(r'href="#', f'href="#{prefix}-', text)
    text = re.sub(r'(<svg[^>]*?) width="[\d.]+pt" height="[\d.]+pt"', r'\1 class="chart" role="img"', text, count=1)
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    text = text.replace("font-family: 'DejaVu Sans', sans-serif", "font-family: var(--sans)")
    text = text.replace(figures.INK, "var(--ink)").replace(figures.RULE, "var(--rule)")
    for index, color in enumerate(figures.COLORS):
        text = text.replace(color, f"var(--c{index})")
    return text.rstrip()


# --- Plots of DVC
# ----------------------------------------------------------------------------------------------------


def accuracy_csv(results: Results) -> bytes:
    """A row for each VLM, method, setting and budget, for `dvc plots`."""
    rows = [
        [
            row["vlm"], row["method"], *(names.plain(row[axis]) for axis in AXES), row["tokens"], row["share"],
            *((row["average"] or {}).get(key) for key in ("relative", "ci_low", "ci_high")),
        ]
        for row in results.summary
    ]  # fmt: skip
    head = ["vlm", "method", *AXES, "tokens", "share", "relative", "ci_low", "ci_high"]
    return _csv([head, *rows])


def curves_csv(pruners: Sequence[Pruner]) -> bytes:
    """A row for each pruner and step, for `dvc plots`."""
    columns = list(dict.fromkeys(key for pruner in pruners for key in pruner.curves if key != "step"))
    rows: list[list[object]] = [["vlm", "pruner", "step", *columns]]
    for pruner in pruners:
        by_column = [pruner.curves.get(column, []) for column in columns]
        for index, step in enumerate(pruner.curves.get("step", [])):
            values = [column[index] if index < len(column) else None for column in by_column]
            rows.append([pruner.vlm, pruner.name, step, *values])
    return _csv(rows)


def _csv(rows: Sequence[Sequence[object]]) -> bytes:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(
        ["" if item is None else f"{item:.6g}" if isinstance(item, float) else item for item in row] for row in rows
    )
    return buffer.getvalue().encode()
