"""How every picture looks, and how it becomes bytes: the same for the same input."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Format = Literal["png", "svg"]

INK = "#1b1f24"
"""Text, ticks and axes."""
RULE = "#d5d9de"
"""Grid lines."""
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


@contextmanager
def drawn(size: tuple[float, float], layout: Literal["constrained"] | None = "constrained") -> Iterator[Figure]:
    """A figure in our style, that belongs to no window and no global state."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        figure = Figure(figsize=size, layout=layout)
        FigureCanvasAgg(figure)
        yield figure


def saved(figure: Figure, form: Format) -> bytes:
    """The bytes of a figure: no date, no name of a program, no random id."""
    buffer = io.BytesIO()
    nothing = {"Software": None} if form == "png" else dict.fromkeys(("Date", "Creator", "Format", "Type"))
    pillow = {"pil_kwargs": {"compress_level": 3}} if form == "png" else {}
    figure.savefig(buffer, format=form, metadata=nothing, transparent=form == "svg", **pillow)
    return buffer.getvalue()
