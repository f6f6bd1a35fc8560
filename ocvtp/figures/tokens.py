"""Pictures of images: the tokens that were kept, and which slot attends to which.

Legend: H, W rows and columns of the token grid; K slots; N = H x W tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from ocvtp.errors import BadInput
from ocvtp.figures.style import INK, drawn, saved

Fit = Literal["pad", "stretch"]
_GAP = 0.03
"""Inches around a panel."""
VEIL = (0.05, 0.06, 0.08, 0.74)
"""What lies over dropped tokens: red, green, blue, opacity."""


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
    with drawn(size, layout=None) as figure:
        for r, row in enumerate(rows):
            bottom = (len(rows) - r - 1) * (width + title_height) + _GAP
            for c, (title, draw) in enumerate(row):
                inches = c * width + _GAP, bottom, width - 2 * _GAP, width - 2 * _GAP
                x, y, wide, high = (inch / size[i % 2] for i, inch in enumerate(inches))
                axes = figure.add_axes((x, y, wide, high))
                axes.set_axis_off()
                axes.set_title(title, fontsize=7.5, pad=3)
                draw(axes)
        return saved(figure, "png")
