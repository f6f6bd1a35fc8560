"""A real browser opens the report from disk and finds in it what the results say."""

import importlib.util
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from browser import browse
from PIL import Image

from pipelines.report import main

pytestmark = pytest.mark.browser


def _results() -> ModuleType:
    path = Path(__file__).parent.parent / "pipelines" / "report_results.py"
    spec = importlib.util.spec_from_file_location("report_results", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Cells(HTMLParser):
    """Text of the cells of one table, row by row."""

    def __init__(self, html: str, table: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self._inside = self._cell = False
        self._table = table
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "table":
            self._inside = dict(attrs).get("id") == self._table
        elif self._inside and tag == "tr":
            self.rows.append([])
        elif self._inside and tag in ("td", "th"):
            self._cell = True
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._cell = self._cell and tag not in ("td", "th")
        self._inside = self._inside and tag != "table"

    def handle_data(self, data: str) -> None:
        if self._inside and self._cell:
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = _results().write_results(tmp_path_factory.mktemp("results"))
    assert main(root) == 0
    return Path(root) / "reports" / "index.html"


def test_the_table_is_there(page: Path, tmp_path: Path) -> None:
    dom = browse(page, tmp_path / "profile", "--dump-dom")
    rows = Cells(dom, "table-main-tiny-llava").rows
    assert rows[0] == ["Method", "GQA", "MME", "POPE", "TextVQA", "Avg"]
    assert rows[1] == ["Vanilla, 144 Tokens (100%)"]
    assert [row[0] for row in rows].count("OC-VTP") == 3
    assert rows[-1] == ["OC-VTP", "78.692.5%", "140293.5%", "85.094.5%", "76.495.5%", "94.0%[92.5, 95.5]"]
    assert "OC-VTP beats random by 22.5 points" in dom


@pytest.mark.parametrize(("scheme", "light"), [("1", True), ("0", False)])
def test_it_is_drawn_in_light_and_in_dark(page: Path, tmp_path: Path, scheme: str, light: bool) -> None:
    picture = tmp_path / "page.png"
    setting = f"--blink-settings=preferredColorScheme={scheme}"
    browse(page, tmp_path / "profile", f"--screenshot={picture}", setting)
    pixels = np.asarray(Image.open(picture).convert("RGB"), dtype=float)
    paper = pixels[:, :8].mean()
    assert (paper > 230) if light else (paper < 60)
    ink = np.abs(pixels.mean(axis=2) - paper) > 120
    assert ink.any(axis=1).mean() > 0.2  # text, lines and pictures down the page
    blue = (pixels[..., 2] > pixels[..., 0] + 60) & (pixels[..., 2] > 120)
    assert blue.sum() > 200  # OC-VTP's line in the chart
