"""The scenes that questions are about, each drawn and encoded once."""

from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any

from ocvtp.data.questions import all_combinations, combinations
from ocvtp.data.scenes import Scene, Style, file_name, jpeg, make_scene, save_scenes

Row = dict[str, Any]


class Album:
    """Scenes of the split `benchmark` by number.

    Args:
        seed: of the scenes.
        style: how they look.
        counted: over so many scenes the frequent objects are counted.
    """

    def __init__(self, seed: int, style: Style, counted: int) -> None:
        self.seed, self.style, self.counted = seed, style, counted
        self._drawn: dict[int, tuple[Scene, bytes]] = {}

    def scene(self, index: int) -> Scene:
        """What is in it."""
        return self._known(index)[0]

    def image(self, index: int) -> Row:
        """Its picture as `datasets` stores it."""
        return {"bytes": self._known(index)[1], "path": file_name("benchmark", index)}

    def stem(self, index: int) -> str:
        """The name of its picture without suffix."""
        return Path(file_name("benchmark", index)).stem

    @cached_property
    def popular(self) -> list[tuple[str, str]]:
        """(colour, shape) pairs, the most frequent first."""
        seen = Counter(dict.fromkeys(all_combinations(), 0))
        for index in range(self.counted):
            seen.update(combinations(self.scene(index)))
        return sorted(seen, key=lambda pair: (-seen[pair], pair))

    def write(self, folder: Path, count: int) -> None:
        """The first `count` as `images/*.jpg` and `scenes.json` (COCO)."""
        scenes = (self._known(index) for index in range(count))
        save_scenes(folder, scenes, self.seed, "benchmark", annotations="scenes.json")

    def _known(self, index: int) -> tuple[Scene, bytes]:
        if index not in self._drawn:
            scene = make_scene(self.seed, "benchmark", index, self.style)
            self._drawn[index] = scene, jpeg(scene)
        return self._drawn[index]
