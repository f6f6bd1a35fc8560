"""The scenes that a tiny VLM learns from, rendered once, with a label for each patch or token of theirs.

Letters: S scenes, P patches of an image (row by row), H W pixels.
"""

import logging
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ocvtp.data.scenes import COLORS, DIGITS, SHAPES, Scene, SizeName, Split, Style, make_scene

COLOR_NAMES, SHAPE_NAMES, SIZE_NAMES = tuple(COLORS), SHAPES, get_args(SizeName)
MIN_COVERAGE = 9
"""Pixels of an object from which a patch is said to show it."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pool:
    """Scenes of one size with labels for squares of theirs; 0 stands for "none" in every label.

    Attributes:
        scenes: what is in each picture (their own pixels included).
        grid: rows and columns of squares: a tower's patches, or tokens of several of them.
        color_SP, shape_SP, size_SP, digit_SP: label of the object that covers most of the square; in the square of
            an object's middle always that object's.
        center_SP: whether an object's middle lies in the square.
        offset_SP2: from the square's middle to the object's, in units of half an image.
        tags_ST: which (colour, shape) pairs and digits the scene shows.
    """

    scenes: tuple[Scene, ...]
    grid: tuple[int, int]
    color_SP: Tensor
    shape_SP: Tensor
    size_SP: Tensor
    digit_SP: Tensor
    center_SP: Tensor
    offset_SP2: Tensor
    tags_ST: Tensor

    def __len__(self) -> int:
        return len(self.scenes)

    def pixels(self, indices: NDArray[np.int64] | list[int]) -> Tensor:
        """Images as the processor gives them: [B, 3, H, W], normalised with CLIP's mean and deviation."""
        return normalised(np.stack([self.scenes[i].pixels_HW3 for i in indices]))


Pools = tuple[Pool, ...]
"""One for each size of scenes."""
_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


def normalised(pixels_BHW3: NDArray[np.uint8]) -> Tensor:
    """Pictures less CLIP's mean, divided by its deviation, [B, 3, H, W]."""
    return (torch.from_numpy(pixels_BHW3).permute(0, 3, 1, 2).float() / 255 - _MEAN) / _STD


def make_scenes_by_size(
    seed: int, split: Split, count: int, style: Style, workers: int = 2
) -> tuple[tuple[Scene, ...], ...]:
    """Render `count` scenes of a split; those of one size together."""
    found: dict[tuple[int, int], list[Scene]] = {}
    with ProcessPoolExecutor(workers, get_context("spawn")) as executor:
        scenes = executor.map(partial(make_scene, seed, split, style=style), range(count), chunksize=200)
        for number, scene in enumerate(scenes, 1):
            found.setdefault((scene.height, scene.width), []).append(scene)
            if number % 4000 == 0:
                _log.info("rendered %d of %d scenes", number, count)
    return tuple(tuple(found[size]) for size in sorted(found))


def label(scenes: tuple[Scene, ...], width: int) -> Pool:
    """Label squares of `width` pixels of scenes of one size."""
    labels = [torch.stack(column) for column in zip(*(_labels(scene, width) for scene in scenes), strict=True)]
    return Pool(scenes, (scenes[0].height // width, scenes[0].width // width), *labels)


def draw(pools: Pools, batch: int, rng: np.random.Generator) -> tuple[int, NDArray[np.int64]]:
    """A random batch of scenes of one size: which pool, and which of its scenes."""
    sizes = np.array([len(pool) for pool in pools])
    number = int(rng.choice(len(pools), p=sizes / sizes.sum())) if len(pools) > 1 else 0
    return number, rng.integers(0, sizes[number], batch)


def _labels(scene: Scene, width: int) -> Iterator[Tensor]:
    rows, columns = scene.height // width, scene.width // width
    color_P, shape_P, size_P, digit_P, center_P = (np.zeros(rows * columns, np.int64) for _ in range(5))
    offset_P2 = np.zeros((rows * columns, 2), np.float32)
    best_P = np.full(rows * columns, MIN_COVERAGE - 1)
    tags_T = np.zeros(len(COLOR_NAMES) * len(SHAPE_NAMES) + len(DIGITS), np.float32)
    middles_P2 = np.indices((rows, columns)).reshape(2, -1).T * width + width / 2
    half_2 = np.array([scene.height, scene.width]) / 2
    for thing in scene.objects:
        cover_P = thing.mask_HW.reshape(rows, width, columns, width).sum((1, 3)).ravel()
        x, y, breadth, height = thing.box
        middle_2 = np.array([y + height / 2, x + breadth / 2])
        row, column = (min(int(m // width), n - 1) for m, n in zip(middle_2, (rows, columns), strict=True))
        cover_P[row * columns + column] = width * width  # a ring has nothing in its middle
        here = cover_P > best_P
        best_P = np.maximum(best_P, cover_P)
        center_P[row * columns + column] = 1
        offset_P2[here] = ((middle_2 - middles_P2) / half_2)[here]
        size_P[here] = 1 + SIZE_NAMES.index(thing.size)
        if thing.text:
            color_P[here], shape_P[here], digit_P[here] = 0, 0, 1 + DIGITS.index(thing.text)
            tags_T[len(COLOR_NAMES) * len(SHAPE_NAMES) + DIGITS.index(thing.text)] = 1
        else:
            color, shape = COLOR_NAMES.index(thing.color), SHAPE_NAMES.index(thing.category)
            color_P[here], shape_P[here], digit_P[here] = 1 + color, 1 + shape, 0
            tags_T[color * len(SHAPE_NAMES) + shape] = 1
    for array in (color_P, shape_P, size_P, digit_P, center_P):
        yield torch.from_numpy(array)
    yield torch.from_numpy(offset_P2)
    yield torch.from_numpy(tags_T)
