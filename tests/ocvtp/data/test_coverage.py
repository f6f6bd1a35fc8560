"""Object coverage against masks drawn by hand and a count with plain loops."""

import json
from pathlib import Path

import numpy as np
import pytest

from ocvtp.data.coverage import Covered, read_objects, touched
from ocvtp.data.masks import encode_mask
from ocvtp.data.scenes import file_name, make_scene, write_scenes
from ocvtp.errors import Corrupt

GRID = (12, 12)


def test_tokens_that_a_mask_touches() -> None:
    mask = np.zeros((96, 96), bool)
    mask[7:9, 16:24] = True  # two rows of tokens, one column of them
    assert touched(mask, GRID) == {2, 14}
    wide = np.zeros((48, 96), bool)  # padded above and below by 24 pixels, three rows of tokens
    wide[0, 0] = wide[47, 95] = True
    assert touched(wide, GRID) == {3 * 12, 8 * 12 + 11}


def test_counts_equal_plain_loops(tmp_path: Path) -> None:
    path = write_scenes(tmp_path, 5, 3, "benchmark")
    found = read_objects(path, GRID)
    rng = np.random.default_rng(0)
    for index in range(5):
        kept = rng.permutation(144)[:16].tolist()
        hits = small_hits = small = 0
        things = make_scene(3, "benchmark", index).objects
        for thing in things:
            hit = any(
                thing.mask_HW[8 * (k // 12) : 8 * (k // 12) + 8, 8 * (k % 12) : 8 * (k % 12) + 8].any() for k in kept
            )
            hits += hit
            if thing.area < 128:
                small, small_hits = small + 1, small_hits + hit
        covered = found[file_name("benchmark", index)].covered_by(kept)
        assert covered == Covered(len(things), hits, small, small_hits)
    everything = sum((objects.covered_by(range(144)) for objects in found.values()), Covered())
    assert everything.share == everything.small_share == 1.0
    assert Covered().share is None


def test_crowds_and_objects_without_masks_do_not_count(tmp_path: Path) -> None:
    mask = np.ones((8, 8), bool)
    rows = [
        {"image_id": 1, "iscrowd": 1, "segmentation": encode_mask(mask)},
        {"image_id": 1, "iscrowd": 0, "segmentation": []},
        {"image_id": 1, "iscrowd": 0, "segmentation": encode_mask(mask)},
    ]
    path = tmp_path / "instances.json"
    path.write_text(json.dumps({"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": rows}))
    assert read_objects(path, (2, 2))["a.jpg"].covered_by([0]) == Covered(1, 1, 0, 0)
    for wrong in (
        "{",
        "[]",
        '{"images": []}',
        '{"images": [], "annotations": [{"segmentation": {"counts": [1], "size": [2, 2]}}]}',
    ):
        path.write_text(wrong)
        with pytest.raises(Corrupt, match=r"instances\.json"):
            read_objects(path, (2, 2))
