"""Traces of an evaluation: which tokens stayed for each question, beside the answer, and runs held against each other.

`samples.jsonl` has them: `kept` of a question is the list of kept tokens (of several images a list of lists; of the
unpruned model their number).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ocvtp.errors import BadInput
from ocvtp.evaluation.listing import SCORE, read_samples

Sample = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """One setting on one benchmark."""

    folder: Path
    score: Mapping[str, Any]
    samples: Mapping[int, Sample]

    @property
    def name(self) -> str:
        """Of the folder of the setting."""
        return self.folder.absolute().parent.name

    @property
    def benchmark(self) -> str:
        """Which was asked."""
        return str(self.score["benchmark"])

    @property
    def setting(self) -> Mapping[str, Any]:
        """What score.json says of it."""
        setting: Mapping[str, Any] = self.score["setting"]
        return setting

    def sample(self, number: int) -> Sample:
        """The answer to a question; `BadInput` if it was not asked."""
        if number not in self.samples:
            raise BadInput(
                f"{self.folder} has no question {number}: it has {len(self.samples)}, from {min(self.samples)} to "
                f"{max(self.samples)}"
            )
        return self.samples[number]


def read(folder: Path) -> Run:
    """A run from its folder; `BadInput` where there is none."""
    samples = {int(sample["doc_id"]): sample for sample in read_samples(folder)}
    if not samples or not (folder / SCORE).is_file():
        raise BadInput(f"{folder} is no finished evaluation: it has no {SCORE if samples else 'answers'}")
    return Run(folder, json.loads((folder / SCORE).read_bytes()), samples)


def _beside(run: Run) -> list[Run]:
    """The other settings of the VLM on the benchmark, by name."""
    home = run.folder.absolute().parent.parent
    folders = sorted(path.parent for path in home.glob(f"*/{run.folder.name}/{SCORE}"))
    return [read(folder) for folder in folders if folder != run.folder.absolute()]


def unpruned(run: Run) -> Run | None:
    """The unpruned model on the same questions; None if it is not there, or is the run itself."""
    return next((one for one in _beside(run) if one.setting["method"] == "vanilla"), None)


def rival(run: Run) -> Run | None:
    """Of other methods at the budget of a run the one that answers most of what it gets wrong; None without any."""
    wrong = [number for number, sample in run.samples.items() if sample["score"] <= 0]

    def mends(other: Run) -> int:
        return sum(other.samples[number]["score"] > 0 for number in wrong if number in other.samples)

    there = [
        one
        for one in _beside(run)
        if one.setting["method"] not in ("vanilla", run.setting["method"])
        and one.setting["keep"] == run.setting["keep"]
    ]
    return max(there, key=mends, default=None)


def lost(run: Run, whole: Run | None) -> int:
    """The first question that the unpruned model answers and the run does not; else the first that it gets wrong."""
    wrong = [number for number, sample in sorted(run.samples.items()) if sample["score"] <= 0]
    known = [number for number in wrong if whole is None or whole.sample(number)["score"] > 0]
    return next(iter(known or wrong or sorted(run.samples)))


def image(data: Path, benchmark: str, number: int) -> Image.Image:
    """The image of a question of ours, from `BENCHMARK.parquet`.

    Raises:
        BadInput: the question set is not there, or has no such row.
    """
    import pyarrow.parquet as pq

    from ocvtp.data.decoding import open_image

    path = data if data.is_file() else data / f"{benchmark}.parquet"
    if not path.is_file():
        raise BadInput(f"{path} is not there: give --data, the folder of {benchmark}.parquet, or the file itself")
    table = pq.read_table(path, columns=["image"])
    if not 0 <= number < len(table):
        raise BadInput(f"{path} has no row {number}: it has {len(table)}")
    cell = table["image"][number].as_py()
    return open_image(cell["bytes"])


def grid_of(run: Run) -> tuple[int, int]:
    """Rows and columns of an image's tokens; `BadInput` where images have no grid of their own."""
    from ocvtp.vlms import resolve

    vlm = str(run.setting["vlm"])
    grid = resolve(vlm).grid
    if grid is None:
        raise BadInput(f"images of {vlm} have no grid of their own: draw one with `ocvtp show`")
    return grid
