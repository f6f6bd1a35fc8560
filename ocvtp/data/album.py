"""The scenes that questions are about, each drawn and encoded once."""

from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any

from ocvtp.data.questions import all_combinations, combinations
from ocvtp.data.scenes import Scene, Split, Style, file_name, jpeg, make_scene, save_scenes

Row = dict[str, Any]


class Album:
    """Scenes of a split by number.

    Args:
        seed: of the scenes.
        style: how they look.
        counted: over so many scenes the frequent objects are counted.
        split: which scenes.
    """

    def __init__(self, seed: int, style: Style, counted: int, split: Split = "benchmark") -> None:
        self.seed, self.style, self.counted, self.split = seed, style, counted, split
        self._drawn: dict[int, tuple[Scene, bytes]] = {}

    def scene(self, index: int) -> Scene:
        """What is in it."""
        return self.drawn(index)[0]

    def image(self, index: int) -> Row:
        """Its picture as `datasets` stores it."""
        return {"bytes": self.drawn(index)[1], "path": file_name(self.split, index)}

    def stem(self, index: int) -> str:
        """The name of its picture without suffix."""
        return Path(file_name(self.split, index)).stem

    @cached_property
    def popular(self) -> list[tuple[str, str]]:
        """(colour, shape) pairs, the most frequent first."""
        seen = Counter(dict.fromkeys(all_combinations(), 0))
        for index in range(self.counted):
            seen.update(combinations(self.scene(index)))
        return sorted(seen, key=lambda pair: (-seen[pair], pair))

    def write(self, folder: Path, count: int) -> None:
        """The first `count` as `images/*.jpg` and `scenes.json` (COCO)."""
        scenes = (self.drawn(index) for index in range(count))
        save_scenes(folder, scenes, self.seed, self.split, annotations="scenes.json")

    def drawn(self, index: int) -> tuple[Scene, bytes]:
        """What is in it, and its picture as JPEG."""
        if index not in self._drawn:
            scene = make_scene(self.seed, self.split, index, self.style)
            self._drawn[index] = scene, jpeg(scene)
        return self._drawn[index]
