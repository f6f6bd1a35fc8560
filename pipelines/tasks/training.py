"""Tasks of stage `sample`: training images of one benchmark, scenes or those of the official data set."""

from pathlib import Path
from typing import Any

from cluster import progress
from ocvtp.data.scenes import Style
from ocvtp.data.training_splits import write_official_images, write_training_scenes


def benchmark_scenes(spec: dict[str, Any], folder: Path) -> None:
    """`images/*.jpg` and `instances.json` of the scenes `first` to `first + count - 1`."""
    style = Style(**spec["style"])
    write_training_scenes(folder, spec["benchmark"], spec["count"], spec["seed"], first=spec["first"], style=style)


def official_images(spec: dict[str, Any], folder: Path) -> None:
    """`images/*`, as the data set has them encoded."""
    rate = spec["max_reject_rate"]
    write_official_images(
        folder, spec["benchmark"], spec["images"], spec["seed"], max_reject_rate=rate, progress=progress
    )
