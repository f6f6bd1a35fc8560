"""Scenes: exact annotations, reproducible, of the promised mix, and never shared between splits."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ocvtp.data.masks import decode_mask, encode_mask
from ocvtp.data.scenes import (
    CATEGORIES,
    COLORS,
    SIZE,
    digest,
    make_scene,
    make_scenes,
    write_scenes,
)
from ocvtp.errors import BadInput


def test_a_scene_depends_on_seed_split_and_index_alone() -> None:
    once, alone = list(make_scenes(3, "train", 5))[4], make_scene(3, "train", 4)
    assert digest(once) == digest(alone)
    assert digest(alone) != digest(make_scene(4, "train", 4))
    assert digest(alone) != digest(make_scene(3, "benchmark", 4))


def test_splits_share_no_picture() -> None:
    pictures = [
        digest(s) for split in ("train", "benchmark", "vlm", "vlm-validation") for s in make_scenes(0, split, 150)
    ]
    assert len(set(pictures)) == len(pictures)


def test_the_mix_of_sizes_counts_and_digits() -> None:
    scenes = list(make_scenes(0, "train", 300))
    objects = [thing for scene in scenes for thing in scene.objects]
    small = [thing for thing in objects if thing.size == "small"]
    assert len(small) >= len(objects) / 3
    assert max(thing.area for thing in small) <= 2 * 8 * 8, "small means one or two patches of 8 x 8"
    assert {len(scene.shapes) for scene in scenes} >= {2, 3, 4, 5}
    assert 0.4 < np.mean([scene.digit is not None for scene in scenes]) < 0.8
    assert {thing.category for thing in objects} == set(CATEGORIES)
    assert {thing.color for thing in objects} == {*COLORS, ""}


def test_objects_never_overlap_and_have_their_colour() -> None:
    for scene in make_scenes(1, "train", 60):
        assert sum(thing.mask_HW.astype(int) for thing in scene.objects).max() <= 1
        for thing in scene.shapes:
            seen_3 = scene.pixels_HW3[thing.mask_HW].mean(0)
            distances = {name: np.abs(seen_3 - np.asarray(ink)).sum() for name, ink in COLORS.items()}
            assert min(distances, key=distances.__getitem__) == thing.color


def test_coco_files_say_exactly_what_was_drawn(tmp_path: Path) -> None:
    coco = json.loads(write_scenes(tmp_path, 20, seed=5, split="train", first=7).read_text())
    scenes = {scene.index: scene for scene in make_scenes(5, "train", 27)}
    assert [image["id"] for image in coco["images"]] == list(range(7, 27))
    for image in coco["images"]:
        drawn = np.asarray(Image.open(tmp_path / "images" / image["file_name"])).astype(int)
        assert drawn.shape == (SIZE, SIZE, 3)
        assert np.abs(drawn - scenes[image["id"]].pixels_HW3).mean() < 6, "JPEG may not change much"
        things = [a for a in coco["annotations"] if a["image_id"] == image["id"]]
        assert len(things) == len(scenes[image["id"]].objects)
        for entry, thing in zip(things, scenes[image["id"]].objects, strict=True):
            mask_HW = decode_mask(entry["segmentation"])
            assert (mask_HW == thing.mask_HW).all()
            assert entry["area"] == mask_HW.sum()
            x, y, width, height = entry["bbox"]
            assert mask_HW[y : y + height, x : x + width].sum() == entry["area"]
            assert mask_HW[y].any()
            assert mask_HW[:, x + width - 1].any()
            assert coco["categories"][entry["category_id"] - 1]["name"] == thing.category


def test_masks_are_pycocotools_run_lengths() -> None:
    mask_HW = np.array([[0, 1], [0, 1], [1, 0]], bool)  # down the columns: 0 0 1 | 1 1 0
    assert encode_mask(mask_HW) == {"size": [3, 2], "counts": [2, 3, 1]}
    assert (decode_mask({"size": [3, 2], "counts": [2, 3, 1]}) == mask_HW).all()
    assert encode_mask(np.ones((2, 2), bool))["counts"] == [0, 4]
    with pytest.raises(BadInput, match="5 pixels for an image of 3 x 2"):
        decode_mask({"size": [3, 2], "counts": [2, 3]})


def test_no_scenes_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="count of scenes is 0"):
        write_scenes(tmp_path, 0, 0, "train")
