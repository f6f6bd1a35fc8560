"""Charts: accuracy against tokens kept, training curves, phases of time, and times in percent.

Lines are told apart by colour and by marker and dash, so that no reader depends on colour alone; the colours are Okabe
and Ito's.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes

from ocvtp.errors import BadInput
from ocvtp.figures.style import INK, RULE, Format, drawn, saved

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7b68c8", "#8c6d31")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LEGEND_LINE = 4.0
"""Length of a line in a legend, in letters: long enough for a dash to show."""
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.4)), (0, (6, 2, 1, 2)))
HATCHES = ("", "////", "....", "xxxx")
"""On bars, once all colours are taken."""
STANDING = ("oc-vtp", "random", "oc-vtp-untrained", "visionzip", "hiprune", "downsample", "fastv",
"sparsevlm",
            "pyramiddrop", "trim", "tome", "qr", "css", "fps", "medoids")  # fmt: skip
"""Methods that look the same in every picture, whichever others are there."""


@dataclass(frozen=True)
class Series:
    """A line with optional 95 % intervals: `low` and `high` are None or as long as `x`.

    `label` decides how it looks; `name` is what the legend says, `label` unless given.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    name: str = ""


def accuracy(
    series: Sequence[Series],
    *,
    whole: int | None = None,
    beside: Sequence[Series] = (),
    titles: tuple[str, str] = ("", ""),
    xlabel: str = "tokens kept of an image",
    ylabel: str = "average accuracy, % of vanilla",
    form: Format = "png",
) -> bytes:
    """Relative accuracy against tokens kept (logarithmic), one line a method, with 95 % intervals where given.

    Args:
        series: x in tokens, y in percent of vanilla.
        whole: tokens of the unpruned image; budgets are then marked with their share too.
        beside: lines of a second plot on the same scale of accuracy, x in percent of an image's tokens.
        titles: of the two.
        xlabel: below the axis.
        ylabel: beside the axis.
        form: `png` or `svg`.
    """
    if not series:
        raise BadInput("accuracy has no line to draw")
    panels = [(series, whole, xlabel), *([(beside, None, "tokens kept of an image, %")] if beside else [])]
    labels = list(dict.fromkeys(line.label for line in (*series, *beside)))
    with drawn((6.4 + 2.2 * bool(beside), 3.5)) as figure:
        ratios = [1.0] if not beside else [1.7, 1.0]
        row = figure.subplots(1, len(panels), sharey=True, squeeze=False, gridspec_kw={"width_ratios": ratios})[0]
        for axes, (lines, size, below), title in zip(row, panels, titles, strict=False):
            budgets = sorted({x for line in lines for x in line.x})
            step = min(0.06, 0.4 / max(1, len(lines))) * min(
                (math.log(b / a) for a, b in pairwise(budgets)), default=1.0
            )
            axes.set_title(title)
            axes.axhline(100, color=INK, linewidth=0.9, linestyle=(0, (2, 2)))
            axes.annotate("vanilla", (1, 100), xycoords=("axes fraction", "data"), xytext=(-2, 3),
                          textcoords="offset points", ha="right", fontsize=8)  # fmt: skip
            for index, line in enumerate(lines):
                shift = (index - (len(lines) - 1) / 2) * step if len(lines) > 1 else 0.0
                _line(axes, line, looks(line.label, labels), shift)
            axes.set_xscale("log")  # budgets are halves of each other, about
            axes.set_xticks(budgets, [_budget(b, size) for b in budgets])
            axes.minorticks_off()
            axes.set_xlabel(below)
            axes.margins(x=0.08)
            axes.grid(axis="x", visible=False)
        row[0].set_ylabel(ylabel)
        handles = {name: handle for axes in row for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)}
        figure.legend(
            list(handles.values()), list(handles), loc="outside right center", fontsize=8, handlelength=LEGEND_LINE
        )
        return saved(figure, form)


def curves(panels: Sequence[tuple[str, Sequence[Series]]], *, xlabel: str = "step", form: Format = "png") -> bytes:
    """Curves over training: a small plot for each (title, lines). Lines of one label share one look."""
    panels = [(title, lines) for title, lines in panels if lines]
    if not panels:
        raise BadInput("curves has no line to draw")
    labels = list(dict.fromkeys(line.label for _, lines in panels for line in lines))
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    with drawn((max(3.2, 2.5 * columns), 2.1 * rows + 0.25 * (len(labels) > 1))) as figure:
        for index, (title, lines) in enumerate(panels):
            axes = figure.add_subplot(rows, columns, index + 1)
            axes.set_title(title)
            for line in lines:
                color, _, dash = looks(line.label, labels)
                axes.plot(line.x, line.y, color=color, linestyle=dash, linewidth=1.1, label=line.name or line.label)
            if index >= len(panels) - columns:
                axes.set_xlabel(xlabel)
        if len(labels) > 1:
            handles = {str(h.get_label()): h for axes in figure.axes for h in axes.get_lines()}
            figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=3, fontsize=8,
                          handlelength=LEGEND_LINE)  # fmt: skip
        return saved(figure, form)


def phases(bars: Mapping[str, Mapping[str, float]], *, title: str = "", form: Format = "png") -> bytes:
    """Milliseconds of each phase of several cases, a bar a case.

    Args:
        bars: for each case its phases in their order.
        title: what stands above.
        form: `png` or `svg`.
    """
    if not bars:
        raise BadInput("phases has no bar to draw")
    names = list(dict.fromkeys(name for phases_of in bars.values() for name in phases_of))
    with drawn((6.4, 0.9 + 0.36 * len(bars))) as figure:
        axes = figure.add_subplot()
        axes.set_title(title)
        ends = dict.fromkeys(bars, 0.0)
        for index, name in enumerate(names):
            widths = [bars[case].get(name, 0.0) for case in bars]
            axes.barh(list(bars), widths, left=list(ends.values()), height=0.62, label=name,
                      color=COLORS[index % len(COLORS)], edgecolor="white", linewidth=0.5)  # fmt: skip
            ends = {case: end + width for (case, end), width in zip(ends.items(), widths, strict=True)}
        for case, end in ends.items():
            axes.annotate(f"{end:.1f}", (end, case), xytext=(3, 0), textcoords="offset points", va="center", fontsize=8)
        axes.invert_yaxis()
        axes.margins(x=0.1)
        axes.set_xlabel("milliseconds")
        axes.grid(axis="y", visible=False)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(names), fontsize=8)
        return saved(figure, form)


def times(
    panels: Mapping[str, Mapping[str, Mapping[str, float]]],
    *,
    names: Mapping[str, str] | None = None,
    whole: str = "vanilla",
    form: Format = "png",
) -> bytes:
    """Time per image of methods, in percent of the unpruned model's, with the milliseconds on each bar: a plot for each
    VLM in it, a group of bars for each measurement.

    Args:
        panels: title -> measurement -> method -> milliseconds. What is not there has no bar.
        names: of all methods, for the legend, in the order of bars.
        whole: the method that is 100 %; every measurement needs it.
        form: `png` or `svg`.

    Raises:
        BadInput: nothing to draw, or a measurement without the unpruned model; names it.
    """
    panels = {title: groups for title, groups in panels.items() if groups}
    if not panels:
        raise BadInput("times has no bar to draw")
    for title, groups in panels.items():
        for group, found in groups.items():
            if not found.get(whole):
                raise BadInput(f"times: {title}, {group} has no {whole}: it is the 100 % of the others")
    there = dict.fromkeys(name for groups in panels.values() for found in groups.values() for name in found)
    names = names or {name: name for name in there}
    if unnamed := [name for name in there if name not in names]:
        raise BadInput(f"times: {unnamed[0]} has no name among {', '.join(names)}")
    methods = [name for name in names if name in there]
    ratios = [len(groups) for groups in panels.values()]
    with drawn((6.4, 0.55 * len(panels) + 0.13 * sum(ratios) * (len(methods) + 1) + 0.5)) as figure:
        column = figure.subplots(len(panels), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": ratios})[
            :, 0
        ]
        for axes, (title, groups) in zip(column, panels.items(), strict=True):
            axes.set_title(title)
            for number, method in enumerate(methods):
                known = [(index, found) for index, found in enumerate(groups.values()) if method in found]
                places = [index + (number - (len(methods) - 1) / 2) * 0.8 / len(methods) for index, _ in known]
                shares = [100 * found[method] / found[whole] for _, found in known]
                axes.barh(
                    places,
                    shares,
                    height=0.74 / len(methods),
                    label=names[method],
                    color=RULE if method == whole else looks(method, methods)[0],
                    hatch=HATCHES[_place(method, methods) // len(COLORS)],
                    edgecolor="white",
                    linewidth=0,
                )
                for place, share, (_, found) in zip(places, shares, known, strict=True):
                    axes.annotate(f"{found[method]:.1f} ms", (share, place), xytext=(3, 0), textcoords="offset points",
                                  va="center", fontsize=7)  # fmt: skip
            axes.set_yticks(range(len(groups)), list(groups))
            axes.invert_yaxis()
            axes.margins(x=0.12)
            axes.grid(axis="y", visible=False)
        column[-1].set_xlabel("time per image, % of the unpruned model's")
        handles = {str(label): handle for axes in column
                   for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}  # fmt: skip
        shown = [names[method] for method in methods]
        figure.legend(
            [handles[name] for name in shown], shown, loc="outside lower center", ncols=min(5, len(shown)), fontsize=8
        )
        return saved(figure, form)


def looks(label: str, among: Sequence[str]) -> tuple[str, str, Any]:
    """Colour, marker and dash of a label: fixed for methods, in the order of `among` for anything else."""
    index = _place(label, among)
    turn = index // len(COLORS)
    return COLORS[index % len(COLORS)], MARKERS[(index + 3 * turn) % len(MARKERS)], DASHES[(index + turn) % len(DASHES)]


def _place(label: str, among: Sequence[str]) -> int:
    return STANDING.index(label) if label in STANDING else list(among).index(label)


def _line(axes: Axes, line: Series, look: tuple[str, str, Any], shift: float) -> None:
    color, marker, dash = look
    x = [value * math.exp(shift) for value in line.x]
    if line.low is not None and line.high is not None:
        axes.vlines(x, line.low, line.high, color=color, linewidth=1.2, alpha=0.75)
    axes.plot(
        x,
        line.y,
        color=color,
        marker=marker,
        markersize=4.5,
        linewidth=1.4,
        linestyle=dash,
        label=line.name or line.label,
    )


def _budget(tokens: float, whole: int | None) -> str:
    return f"{tokens:g}" if not whole else f"{tokens:g}\n({100 * tokens / whole:.1f}%)"
