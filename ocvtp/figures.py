"""Every picture: kept tokens and slots over an image, accuracy against tokens kept, training curves, phases of time.

All functions take plain arrays and dicts and return the bytes of a PNG or an SVG, equal for equal input: no
date, no name of a program, no random id. Lines are told apart by colour and by marker and dash, so that no
reader depends on colour alone; the colours are Okabe and Ito's. An SVG has text as text, and `INK`, `RULE`
and `COLORS` in it stand where a page may put colours of its own.

Legend: H, W rows and columns of the token grid; K slots; N = H x W tokens.
"""

import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from ocvtp.errors import BadInput

Format = Literal["png", "svg"]
Fit = Literal["pad", "stretch"]

INK = "#1b1f24"
"""Text, ticks and axes."""
RULE = "#d5d9de"
"""Grid lines."""
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7b68c8", "#8c6d31")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.4)), (0, (6, 2, 1, 2)))
HATCHES = ("", "////", "....", "xxxx")
"""On bars, once all colours are taken."""
_GAP = 0.03
"""Inches around a panel."""
VEIL = (0.05, 0.06, 0.08, 0.74)
"""What lies over dropped tokens: red, green, blue, opacity."""
STANDING = ("oc-vtp", "random", "oc-vtp-untrained", "visionzip", "hiprune", "downsample", "fastv",
"sparsevlm",
            "pyramiddrop", "trim", "tome", "qr", "css", "fps", "medoids")  # fmt: skip
"""Methods that look the same in every picture, whichever others are there."""
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "ocvtp",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "legend.frameon": False,
    "savefig.dpi": 160,
}


@dataclass(frozen=True)
class Panel:
    """One image with the tokens that were kept of it.

    Attributes:
        image: the picture.
        kept: indices of the kept tokens in raster order; None draws the picture as it is.
        grid: rows and columns of tokens.
        title: what stands above.
        slots: attention of K slots over the tokens, [K, H x W]: each token has the colour of the slot that attends to
            it most, and kept ones are framed.
        fit: `pad`: the grid lies over the picture padded to a square; `stretch`: over the picture itself.
    """

    image: Image.Image
    kept: Sequence[int] | None = None
    grid: tuple[int, int] = (1, 1)
    title: str = ""
    fit: Fit = "stretch"
    slots: ArrayLike | None = None


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


# --- Kept tokens and slots
# -------------------------------------------------------------------------------------------


def kept_tokens(rows: Sequence[Sequence[Panel]], *, width: float = 1.55) -> bytes:
    """Images in which dropped tokens are dimmed and kept ones framed, or segments of slots, side by side, as a PNG.

    Args:
        rows: panels, a list for each row of the picture; rows may differ in length.
        width: of a panel, in inches.
    """

    def draw(panel: Panel) -> Callable[[Axes], None]:
        return lambda axes: _draw_kept(axes, panel) if panel.slots is None else _draw_slots(axes, panel)

    return _panels([[(panel.title, draw(panel)) for panel in row] for row in rows], width)


def kept_mask(kept: Sequence[int], grid: tuple[int, int]) -> NDArray[np.bool_]:
    """Which tokens [H, W] are kept; `BadInput` names an index that is not in the grid."""
    return _mask(kept, grid)


def padded(image: Image.Image, fit: Fit, ratio: float = 1.0) -> Image.Image:
    """The picture that the grid lies over, in RGB: for `pad`, in the middle of a grey one of this width by height."""
    image = image.convert("RGB")
    width, height = max(image.width, round(image.height * ratio)), max(image.height, round(image.width / ratio))
    if fit == "stretch" or image.size == (width, height):
        return image
    canvas = Image.new("RGB", (width, height), (123, 117, 104))  # CLIP's mean colour, as the processors pad
    canvas.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
    return canvas


def _draw_kept(axes: Axes, panel: Panel) -> None:
    size = _show(axes, panel)
    if panel.kept is None:
        return
    mask_HW = _mask(panel.kept, panel.grid)
    veil_HW4 = np.zeros((*panel.grid, 4))
    veil_HW4[~mask_HW] = VEIL
    axes.imshow(veil_HW4, extent=(0, size[0], size[1], 0), interpolation="nearest")
    _frame(axes, mask_HW, size)


def _draw_slots(axes: Axes, panel: Panel) -> None:
    attention_KN = np.asarray(panel.slots, dtype=np.float64)
    tokens = panel.grid[0] * panel.grid[1]
    if attention_KN.ndim != 2 or attention_KN.shape[1] != tokens:
        raise BadInput(
            f"attention has shape {list(attention_KN.shape)}: [slots, {tokens}] is needed for a grid of "
            f"{panel.grid[0]} x {panel.grid[1]} tokens"
        )
    width, height = _show(axes, panel)
    leads_HW = attention_KN.argmax(axis=0).reshape(panel.grid)
    tint_HW3 = _slot_colors(attention_KN.shape[0])[leads_HW]
    axes.imshow(tint_HW3, extent=(0, width, height, 0), alpha=0.55, interpolation="nearest")
    _edges(axes, leads_HW, (width, height), "white", 0.4)
    if panel.kept is not None:
        _frame(axes, _mask(panel.kept, panel.grid), (width, height), INK, 1.1)


def _show(axes: Axes, panel: Panel) -> tuple[int, int]:
    picture = padded(panel.image, panel.fit)
    axes.imshow(np.asarray(picture), extent=(0, picture.width, picture.height, 0), interpolation="bicubic")
    return picture.size


def _mask(kept: Sequence[int], grid: tuple[int, int]) -> NDArray[np.bool_]:
    tokens = grid[0] * grid[1]
    wrong = [index for index in kept if not 0 <= index < tokens]
    if wrong:
        raise BadInput(f"kept token {wrong[0]} is outside a grid of {grid[0]} x {grid[1]}: 0 to {tokens - 1}")
    mask = np.zeros(tokens, dtype=bool)
    mask[np.asarray(kept, dtype=np.int64)] = True
    return mask.reshape(grid)


def _frame(
    axes: Axes, mask_HW: NDArray[np.bool_], size: tuple[int, int], color: str = "white", width: float = 0.8
) -> None:
    """A line around every kept token."""
    numbers_HW = np.where(mask_HW, np.arange(mask_HW.size).reshape(mask_HW.shape) + 1, 0)
    _edges(axes, np.pad(numbers_HW, 1), size, color, width, pad=1)


def _edges(axes: Axes, labels_HW: NDArray[Any], size: tuple[int, int], color: str, width: float, pad: int = 0) -> None:
    """Lines between neighbours of different label; `pad` is how many cells lie around the picture."""
    height, breadth = labels_HW.shape
    dy, dx = size[1] / (height - 2 * pad), size[0] / (breadth - 2 * pad)
    down = [
        [((x + 1 - pad) * dx, (y - pad) * dy), ((x + 1 - pad) * dx, (y + 1 - pad) * dy)]
        for y, x in np.argwhere(labels_HW[:, 1:] != labels_HW[:, :-1])
    ]
    across = [
        [((x - pad) * dx, (y + 1 - pad) * dy), ((x + 1 - pad) * dx, (y + 1 - pad) * dy)]
        for y, x in np.argwhere(labels_HW[1:] != labels_HW[:-1])
    ]
    axes.add_collection(LineCollection(down + across, colors=color, linewidths=width, capstyle="projecting"))


def _slot_colors(count: int) -> NDArray[np.float64]:
    """[count, 3]: hues a golden angle apart, so that neighbours differ however many there are."""
    hues = (np.arange(count) * 0.61803398875) % 1
    hsv = np.stack([hues, np.full(count, 0.75), np.full(count, 0.95)], axis=1)
    return np.asarray(mpl.colors.hsv_to_rgb(hsv), dtype=np.float64)


def _panels(rows: Sequence[Sequence[tuple[str, Callable[[Axes], None]]]], width: float) -> bytes:
    if not any(rows):
        raise BadInput("there is no image to draw")
    columns, title_height = max(len(row) for row in rows), 0.24
    size = columns * width, len(rows) * (width + title_height)
    # Panels are placed by hand: a layout engine takes seconds for a page of them.
    with _figure(size, layout=None) as figure:
        for r, row in enumerate(rows):
            bottom = (len(rows) - r - 1) * (width + title_height) + _GAP
            for c, (title, draw) in enumerate(row):
                inches = c * width + _GAP, bottom, width - 2 * _GAP, width - 2 * _GAP
                x, y, wide, high = (inch / size[i % 2] for i, inch in enumerate(inches))
                axes = figure.add_axes((x, y, wide, high))
                axes.set_axis_off()
                axes.set_title(title, fontsize=7.5, pad=3)
                draw(axes)
        return _save(figure, "png")


# --- Lines
# -----------------------------------------------------------------------------------------------------------


def accuracy(
    series: Sequence[Series],
    *,
    whole: int | None = None,
    xlabel: str = "tokens kept of an image",
    ylabel: str = "average accuracy, % of vanilla",
    form: Format = "png",
) -> bytes:
    """Relative accuracy against tokens kept, one line a method, with 95 % intervals where given.

    Args:
        series: x in tokens, y in percent of vanilla.
        whole: tokens of the unpruned image; budgets are then marked with their share too.
        xlabel: below the axis.
        ylabel: beside the axis.
        form: `png` or `svg`.
    """
    if not series:
        raise BadInput("accuracy has no line to draw")
    budgets = sorted({x for line in series for x in line.x})
    step = 0.06 * min((b - a for a, b in pairwise(budgets)), default=1.0)
    with _figure((6.4, 3.5)) as figure:
        axes = figure.add_subplot()
        axes.axhline(100, color=INK, linewidth=0.9, linestyle=(0, (2, 2)))
        axes.annotate("vanilla", (1, 100), xycoords=("axes fraction", "data"), xytext=(-2, 3),
                      textcoords="offset points", ha="right", fontsize=8)  # fmt: skip
        for index, line in enumerate(series):
            shift = (index - (len(series) - 1) / 2) * step if len(series) > 1 else 0.0
            _line(axes, line, looks(line.label, [s.label for s in series]), shift)
        axes.set_xticks(budgets, [_budget(b, whole) for b in budgets])
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        axes.margins(x=0.08)
        axes.grid(axis="x", visible=False)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", fontsize=8)
        return _save(figure, form)


def curves(panels: Sequence[tuple[str, Sequence[Series]]], *, xlabel: str = "step", form: Format = "png") -> bytes:
    """Curves over training: a small plot for each (title, lines). Lines of one label share one look."""
    panels = [(title, lines) for title, lines in panels if lines]
    if not panels:
        raise BadInput("curves has no line to draw")
    labels = list(dict.fromkeys(line.label for _, lines in panels for line in lines))
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    with _figure((max(3.2, 2.5 * columns), 2.1 * rows + 0.25 * (len(labels) > 1))) as figure:
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
            figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=3, fontsize=8)
        return _save(figure, form)


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
    with _figure((6.4, 0.9 + 0.36 * len(bars))) as figure:
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
        return _save(figure, form)


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
    with _figure((6.4, 0.55 * len(panels) + 0.13 * sum(ratios) * (len(methods) + 1) + 0.5)) as figure:
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
        return _save(figure, form)


def looks(label: str, among: Sequence[str]) -> tuple[str, str, Any]:
    """Colour, marker and dash of a label: fixed for methods, in the order of `among` for anything else."""
    index = _place(label, among)
    turn = index // len(COLORS)
    return COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)], DASHES[(index + turn) % len(DASHES)]


def _place(label: str, among: Sequence[str]) -> int:
    return STANDING.index(label) if label in STANDING else list(among).index(label)


def _line(axes: Axes, line: Series, look: tuple[str, str, Any], shift: float) -> None:
    color, marker, dash = look
    x = [value + shift for value in line.x]
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
    return f"{tokens:g}" if not whole else f"{tokens:g} ({100 * tokens / whole:.1f}%)"


# --- Saving
# ----------------------------------------------------------------------------------------------------------


@contextmanager
def _figure(size: tuple[float, float], layout: Literal["constrained"] | None = "constrained") -> Iterator[Figure]:
    """A figure in our style, that belongs to no window and no global state."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        figure = Figure(figsize=size, layout=layout)
        FigureCanvasAgg(figure)
        yield figure


def _save(figure: Figure, form: Format) -> bytes:
    buffer = io.BytesIO()
    nothing = {"Software": None} if form == "png" else dict.fromkeys(("Date", "Creator", "Format", "Type"))
    pillow = {"pil_kwargs": {"compress_level": 3}} if form == "png" else {}
    figure.savefig(buffer, format=form, metadata=nothing, transparent=form == "svg", **pillow)
    return buffer.getvalue()
