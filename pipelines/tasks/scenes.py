"""A task of stage `sample`: scenes to train on."""

from pathlib import Path
from typing import Any

from ocvtp.data.scenes import Style, write_scenes


def scenes(spec: dict[str, Any], folder: Path) -> None:
    """`images/*.jpg` and `instances.json` of the scenes `first` to `first + count - 1` of the training split."""
    write_scenes(folder, spec["count"], spec["seed"], "train", first=spec["first"], style=Style(**spec["style"]))
