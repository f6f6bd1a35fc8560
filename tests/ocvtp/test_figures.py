"""Pictures are right pixel by pixel where it matters, the same every time, and refuse what cannot be drawn."""

import io
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from ocvtp import figures
from ocvtp.errors import BadInput
from ocvtp.figures import Panel, Series

LINES = [
    Series("oc-vtp", [16, 32, 48], [92, 96, 98], [90, 94, 97], [94, 98, 99]),
    Series("random", [16, 32, 48], [70, 82, 89], [67, 80, 87], [73, 84, 91], "Random"),
]


def _white(side: int = 90) -> Image.Image:
    return Image.new("RGB", (side, side), "white")


def _pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("L"), dtype=float)


def test_kept_tokens_are_framed_over_the_slots() -> None:
    slots_KN = np.eye(4)[[0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3]].T
    plain = Panel(_white(), None, (4, 4), slots=slots_KN)
    framed_HW = _pixels(figures.kept_tokens([[replace(plain, kept=[5])]]))
    changed = np.argwhere(framed_HW != _pixels(figures.kept_tokens([[plain]])))
    height, width = framed_HW.shape
    assert len(changed) > 20
    (top, left), (bottom, right) = changed.min(0), changed.max(0)
    assert 0.2 * width < left < right < 0.55 * width, "token 5 stands in the second row and column"
    assert bottom - top < 0.35 * height


def test_dropped_tokens_are_dark_and_kept_ones_are_not() -> None:
    kept = [0, 4, 8]
    pixels = _pixels(figures.kept_tokens([[Panel(_white(), kept, (3, 3))]], width=3.0))
    bright = pixels > 250
    dark = np.argwhere(pixels < 100)
    (top, left), (bottom, right) = dark.min(axis=0), dark.max(axis=0)
    cell_h, cell_w = (bottom - top + 1) / 3, (right - left + 1) / 3
    for token in range(9):
        y, x = int(top + (token // 3 + 0.5) * cell_h), int(left + (token % 3 + 0.5) * cell_w)
        assert bright[y, x] == (token in kept), token


def test_an_image_without_kept_tokens_is_left_as_it_is() -> None:
    assert _pixels(figures.kept_tokens([[Panel(_white(), None, (3, 3))]])).min() > 250


def test_slots_get_one_colour_each() -> None:
    attention = np.zeros((4, 16))
    attention[[0, 1, 2, 3] * 4, np.arange(16)] = 1.0  # four columns of one slot each
    panel = Panel(_white(), None, (4, 4))
    png = figures.kept_tokens([[panel, replace(panel, slots=attention)]])
    picture = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    right = picture[picture.shape[0] // 2 :, picture.shape[1] // 2 :]
    values, counts = np.unique(right.reshape(-1, 3), axis=0, return_counts=True)
    colored = values[(counts > 0.05 * right[..., 0].size) & (values.min(axis=1) < 240)]
    assert len(colored) == 4


def test_a_picture_that_is_not_square_is_padded_as_processors_do() -> None:
    wide = Image.new("RGB", (40, 20), "red")
    square = figures.padded(wide, "pad")
    assert square.size == (40, 40)
    assert square.getpixel((20, 20)) == (255, 0, 0)
    assert square.getpixel((20, 2)) == (123, 117, 104)
    assert figures.padded(wide, "stretch").size == (40, 20)


@pytest.mark.parametrize("form", ["png", "svg"])
def test_equal_input_gives_equal_bytes_in_another_process(form: str) -> None:
    code = (
        "import sys; from ocvtp import figures; from ocvtp.figures import Series;"
        "lines = [Series('oc-vtp', [16, 32], [92, 96], [90, 94], [94, 98])];"
        f"sys.stdout.buffer.write(figures.accuracy(lines, whole=144, form={form!r}))"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    here = figures.accuracy([Series("oc-vtp", [16, 32], [92, 96], [90, 94], [94, 98])], whole=144, form=form)  # type: ignore[arg-type]
    assert here == there
    assert b"Matplotlib" not in here
    assert b"date" not in here.lower()


def test_the_drawing_does_not_depend_on_the_users_matplotlib() -> None:
    import matplotlib as mpl

    plain = figures.accuracy(LINES)
    with mpl.rc_context({"font.size": 30, "axes.facecolor": "black"}):
        assert figures.accuracy(LINES) == plain


def test_svg_has_names_budgets_and_intervals_as_text_and_lines() -> None:
    svg = figures.accuracy(LINES, whole=144, form="svg").decode()
    for text in ("oc-vtp", "Random", "16", "(11.1%)", "48", "(33.3%)", "vanilla"):
        assert f">{text}</text>" in svg
    assert svg.count("LineCollection") == 2


def test_methods_look_the_same_whoever_else_is_there() -> None:
    assert figures.looks("random", ["random"]) == figures.looks("random", ["oc-vtp", "random"])
    looks = [figures.looks(name, []) for name in figures.STANDING]
    assert len({(color, marker) for color, marker, _ in looks}) == len(looks), "also where a method is one point"


def test_curves_of_one_label_share_one_line_of_the_legend() -> None:
    lines = [Series("mse", [0, 1], [1, seed]) for seed in range(3)] + [Series("aw_mse", [0, 1], [1, 2])]
    svg = figures.curves([("loss", lines), ("empty", [])], form="svg").decode()
    assert svg.count(">mse</text>") == 1
    assert ">loss</text>" in svg
    assert ">empty</text>" not in svg


def test_bars_of_one_colour_differ_by_a_hatch() -> None:
    """`hiprune` and `css` have the same colour."""
    found = dict.fromkeys(("vanilla", "random", "hiprune"), 10.0)
    assert "<pattern" not in figures.times({"tiny": {"keep 16": found}}, form="svg").decode()
    svg = figures.times({"tiny": {"keep 16": {**found, "css": 5.5}}}, form="svg").decode()
    assert svg.count("<pattern") == 1
    assert ">5.5 ms</text>" in svg


def test_what_cannot_be_drawn_is_named() -> None:
    with pytest.raises(BadInput, match="kept token 9 is outside a grid of 3 x 3: 0 to 8"):
        figures.kept_tokens([[Panel(_white(), [0, 9], (3, 3))]])
    with pytest.raises(BadInput, match=r"shape \[2, 8\]: \[slots, 9\]"):
        figures.kept_tokens([[Panel(_white(), None, (3, 3), slots=np.zeros((2, 8)))]])
    with pytest.raises(BadInput):
        figures.kept_tokens([])
    with pytest.raises(BadInput):
        figures.accuracy([])
    with pytest.raises(BadInput):
        figures.curves([("loss", [])])


# --- Times -----------------------------------------------------------------------------------------------------------

TIMES = {
    "A": {"V100": {"vanilla": 300.0, "oc-vtp": 150.0}, "H200": {"vanilla": 40.0, "random": 10.0, "oc-vtp": 12.0}},
    "B": {"V100": {"vanilla": 800.0}},
}


def test_times_are_bars_in_percent_of_the_unpruned_model() -> None:
    svg = figures.times(
        TIMES, names={"vanilla": "Vanilla", "random": "Random", "oc-vtp": "OC-VTP"}, form="svg"
    ).decode()
    for said in ("300.0 ms", "150.0 ms", "40.0 ms", "10.0 ms", "12.0 ms", "800.0 ms"):
        assert svg.count(said) >= 1, said
    assert svg.count(" ms<") == 6, "what is not there has no bar"
    assert svg.index("Vanilla") < svg.index("Random") < svg.index("OC-VTP"), "the legend is in the order of the names"
    assert figures.times(TIMES).startswith(b"\x89PNG")


def test_times_that_cannot_be_drawn_are_named() -> None:
    with pytest.raises(BadInput, match="no bar"):
        figures.times({"A": {}})
    with pytest.raises(BadInput, match="times: A, H200 has no vanilla"):
        figures.times({"A": {"H200": {"oc-vtp": 12.0}}})
    with pytest.raises(BadInput, match="random has no name among vanilla, oc-vtp"):
        figures.times(TIMES, names={"vanilla": "Vanilla", "oc-vtp": "OC-VTP"})
