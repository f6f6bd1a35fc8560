"""The scenes that tiny-llava learns from, rendered once, with a label for each patch.

Letters: S scenes, P patches of an image (raster order), H W pixels.
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

from ocvtp.data.scenes import COLORS, DIGITS, SHAPES, SIZE, Scene, SizeName, Split, make_scene
from pipelines.tiny.model import GRID, PATCH

COLOR_NAMES, SHAPE_NAMES, SIZE_NAMES = tuple(COLORS), SHAPES, get_args(SizeName)
MIN_COVERAGE = 9
"""Pixels of an object (of the 64 of a patch) from which the patch is said to show it."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pool:
    """Scenes with their patch labels; 0 stands for "none" in every label.

    Attributes:
        scenes: what is in each picture (their own pixels included).
        color_SP, shape_SP, size_SP, digit_SP: label of the object that covers most of the patch; in the patch of
            an object's middle always that object's.
        center_SP: whether an object's middle lies in the patch.
        offset_SP2: from the patch's middle to the object's, in units of half an image.
        tags_ST: which (colour, shape) pairs and digits the scene shows.
    """

    scenes: tuple[Scene, ...]
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
        batch_BHW3 = torch.from_numpy(np.stack([self.scenes[i].pixels_HW3 for i in indices]))
        return (batch_BHW3.permute(0, 3, 1, 2).float() / 255 - _MEAN) / _STD


_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


def make_pool(seed: int, split: Split, count: int, workers: int = 2) -> Pool:
    """Render `count` scenes of a split and label their patches."""
    scenes: list[Scene] = []
    with ProcessPoolExecutor(workers, get_context("spawn")) as executor:
        for scene in executor.map(partial(make_scene, seed, split), range(count), chunksize=200):
            scenes.append(scene)
            if len(scenes) % 4000 == 0:
                _log.info("rendered %d of %d scenes", len(scenes), count)
    labels = [torch.stack(column) for column in zip(*(_labels(scene) for scene in scenes), strict=True)]
    return Pool(tuple(scenes), *labels)


def _labels(scene: Scene) -> Iterator[Tensor]:
    color_P, shape_P, size_P, digit_P, center_P = (np.zeros(GRID * GRID, np.int64) for _ in range(5))
    offset_P2 = np.zeros((GRID * GRID, 2), np.float32)
    best_P = np.full(GRID * GRID, MIN_COVERAGE - 1)
    tags_T = np.zeros(len(COLOR_NAMES) * len(SHAPE_NAMES) + len(DIGITS), np.float32)
    middles_P2 = np.indices((GRID, GRID)).reshape(2, -1).T * PATCH + PATCH / 2
    for thing in scene.objects:
        cover_P = thing.mask_HW.reshape(GRID, PATCH, GRID, PATCH).sum((1, 3)).ravel()
        x, y, width, height = thing.box
        middle_2 = np.array([y + height / 2, x + width / 2])
        row, column = (min(int(m // PATCH), GRID - 1) for m in middle_2)
        cover_P[row * GRID + column] = PATCH * PATCH  # a ring has nothing in its middle
        here = cover_P > best_P
        best_P = np.maximum(best_P, cover_P)
        center_P[row * GRID + column] = 1
        offset_P2[here] = ((middle_2 - middles_P2) / (SIZE / 2))[here]
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
