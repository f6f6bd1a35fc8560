"""Kept tokens drawn over a few benchmark images, as in the paper's Figure 4.

Which images: those at equal steps through the first benchmark that has answers with kept tokens for every
method, so that nobody chose them. Kept tokens are those of the smallest seed.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from PIL import Image

from ocvtp import figures
from ocvtp.errors import Corrupt
from pipelines.report_html import names
from pipelines.report_html.data import AXES, Results, Row
from pipelines.report_html.tables import budgets, chosen_rows, standing

COUNT = 6
"""Images in a picture."""
_SIDE = 448
"""Larger images are made as small as this before they go into the page."""


@dataclass(frozen=True)
class Shot:
    """One image of one method and budget; `kept` is None for the image itself."""

    scene: int
    kept: Sequence[int] | None = None
    answer: str = ""
    right: bool | None = None

    def veil(self, grid: tuple[int, int]) -> str:
        """SVG path over the dropped tokens, in units of tokens."""
        return _path(~figures.kept_mask(self.kept or [], grid))

    def frames(self, grid: tuple[int, int]) -> str:
        """SVG path around the kept tokens."""
        columns = grid[1]
        return "".join(f"M{k % columns} {k // columns}h1v1h-1z" for k in self.kept or [])


@dataclass(frozen=True)
class Scene:
    """A benchmark image with its question."""

    image: Image.Image
    fit: figures.Fit
    question: str
    answer: str

    @property
    def data_uri(self) -> str:
        """The picture that the grid lies over, as JPEG."""
        picture = figures.padded(self.image, self.fit)
        picture.thumbnail((_SIDE, _SIDE))
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=90, subsampling=0)
        return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


@dataclass(frozen=True)
class Gallery:
    """Scenes in columns; for every budget, methods in rows."""

    vlm: str
    benchmark: str
    grid: tuple[int, int]
    scenes: Sequence[Scene]
    budgets: Sequence[tuple[str, Sequence[tuple[str, Sequence[Shot]]]]]

    def png(self, title: str) -> bytes:
        """One budget as a PNG: the images above, a row for each method below."""
        methods = dict(self.budgets)[title]
        wanted: list[tuple[str, list[tuple[Scene, Sequence[int] | None]]]] = [
            ("image", [(scene, None) for scene in self.scenes])
        ]
        wanted += [(method, [(self.scenes[shot.scene], shot.kept) for shot in shots]) for method, shots in methods]
        rows = [
            [
                figures.Panel(scene.image, kept, self.grid, "" if column else name, scene.fit)  # named once a row
                for column, (scene, kept) in enumerate(shown)
            ]
            for name, shown in wanted
        ]
        return figures.kept_tokens(rows, width=0.95)


def gallery(results: Results, vlm: str) -> Gallery | None:
    """The drawings of a VLM; None where answers, kept indices or images are not on this machine."""
    for benchmark in results.benchmarks:
        found = _answers(results, vlm, benchmark)
        source = results.root / "data" / "sample" / "benchmarks" / f"{benchmark}.parquet"
        if found is None or not source.exists():
            continue
        whole, groups = found
        side = isqrt(whole)
        shared = set.intersection(*(set(answers) for _, methods in groups for _, answers in methods))
        if side * side != whole or not shared:
            continue
        picked = _spread(sorted(shared, key=_order), COUNT)
        fit: figures.Fit = "stretch" if "qwen" in vlm.lower() else "pad"
        first = groups[0][1][0][1]
        images = _images(source, picked)
        scenes = [
            Scene(image, fit, str(first[doc].get("question", "")), str(first[doc].get("answer", "")))
            for doc, image in zip(picked, images, strict=True)
        ]
        budgets = [
            (title, [(method, [_shot(i, answers[doc]) for i, doc in enumerate(picked)]) for method, answers in methods])
            for title, methods in groups
        ]
        return Gallery(vlm, benchmark, (side, side), scenes, budgets)
    return None


Answers = dict[Any, Row]


def _answers(
    results: Results, vlm: str, benchmark: str
) -> tuple[int, list[tuple[str, list[tuple[str, Answers]]]]] | None:
    """Tokens of a whole image, and for every budget the answers of every method by document."""
    rows = chosen_rows(results, vlm)
    whole = next((row["tokens"] for row in rows if row["method"] == "vanilla"), None)
    groups = []
    for tokens, share in budgets(rows):
        methods = []
        for row in standing([r for r in rows if r["method"] != "vanilla" and r["share"] == share]):
            answers = _kept(results, row, benchmark)
            if answers:
                methods.append((names.method(row["method"]), answers))
        if methods:
            groups.append((names.budget(tokens, share), methods))
    return (int(whole), groups) if whole and groups else None


def _kept(results: Results, row: Row, benchmark: str) -> Answers:
    """Answers with lists of kept tokens of one setting, of its smallest seed."""
    keys = ("vlm", "method", "share", "changes", *AXES)
    scores = [s for s in results.scores if s["benchmark"] == benchmark and all(s.get(k) == row[k] for k in keys)]
    if not scores:
        return {}
    samples = results.samples(min(scores, key=lambda s: s["seed"] if s["seed"] is not None else -1))
    return {sample["doc_id"]: sample for sample in samples if isinstance(sample.get("kept"), list)}


def _shot(index: int, sample: Row) -> Shot:
    score = sample.get("score")
    right = None if score is None else float(score) >= 0.5
    kept = sample["kept"]
    if kept and isinstance(kept[0], list):  # one list an image: benchmarks here show one image a question
        kept = kept[0]
    return Shot(index, kept, str(sample.get("prediction", "")).strip(), right)


def _images(source: Path, docs: Sequence[Any]) -> list[Image.Image]:
    column = pq.read_table(source, columns=["image"])["image"]
    images = []
    for doc in docs:
        if not 0 <= int(doc) < len(column):
            raise Corrupt(f"{source.name} has {len(column)} questions, the answers speak of number {doc}")
        content = column[int(doc)].as_py()["bytes"]
        images.append(Image.open(io.BytesIO(content)).convert("RGB"))
    return images


def _spread(items: Sequence[Any], count: int) -> list[Any]:
    """`count` items at equal steps, the first among them."""
    if len(items) <= count:
        return list(items)
    return [items[index * len(items) // count] for index in range(count)]


def _order(doc: Any) -> tuple[int, str]:
    text = str(doc)
    return (int(text), "") if text.isdigit() else (0, text)


def _path(mask_HW: Any) -> str:
    """SVG path of the cells that are true: one rectangle for each run in a row."""
    parts = []
    for y, row in enumerate(mask_HW):
        x = 0
        while x < len(row):
            end = x
            while end < len(row) and row[end]:
                end += 1
            if end > x:
                parts.append(f"M{x} {y}h{end - x}v1h-{end - x}z")
            x = end + 1
    return "".join(parts)
