"""Scenes: exact annotations, reproducible, of the promised mix, and never shared between splits."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ocvtp.data.masks import decode_mask, encode_mask
from ocvtp.data.scenes import (
    CATEGORIES,
    COLORS,
    SIZE,
    STEP,
    Style,
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


@pytest.mark.parametrize("style", [Style(background="textured"), Style(background="natural"), Style(clutter=8)])
def test_a_style_changes_what_is_around_objects_alone(style: Style) -> None:
    for plain, styled in zip(make_scenes(2, "benchmark", 30), make_scenes(2, "benchmark", 30, style), strict=True):
        assert digest(plain) != digest(styled)
        names = [(thing.category, thing.color, thing.text, thing.box) for thing in plain.objects]
        assert names == [(thing.category, thing.color, thing.text, thing.box) for thing in styled.objects]
        for thing in styled.shapes:
            drawn = styled.pixels_HW3[thing.mask_HW].astype(float).mean(0)
            assert np.linalg.norm(drawn - COLORS[thing.color]) < 75


def test_clutter_is_as_much_as_is_asked_for_and_never_on_objects() -> None:
    covered = []
    for plain, styled in zip(make_scenes(2, "train", 30), make_scenes(2, "train", 30, Style(clutter=6)), strict=True):
        moved_HW = np.abs(styled.pixels_HW3.astype(int) - plain.pixels_HW3).max(2) > 0
        assert not any(moved_HW[thing.mask_HW].any() for thing in plain.objects)
        covered.append(moved_HW.mean())
    assert 0.03 < np.mean(covered) < 0.15


def test_a_natural_background_has_the_spectrum_of_photographs() -> None:
    scenes = zip(make_scenes(4, "train", 40), make_scenes(4, "train", 40, Style(background="natural")), strict=True)
    added = [b.pixels_HW3.astype(float).mean(2) - a.pixels_HW3.mean(2) for a, b in scenes]
    power_HW = np.mean([np.abs(np.fft.fft2(one)) ** 2 for one in added], 0)
    radius_HW = np.hypot(*np.meshgrid(np.fft.fftfreq(96), np.fft.fftfreq(96)))
    rings = [power_HW[(radius_HW > low) & (radius_HW <= 1.5 * low)].mean() for low in (0.03, 0.06, 0.12)]
    assert all(2.5 < first / second < 5.5 for first, second in pairwise(rings))  # 1 / f^2: 4


def test_the_share_of_small_shapes_is_what_is_asked_for() -> None:
    scenes = make_scenes(0, "train", 300, Style(small_share=0.9))
    sizes = [thing.size for scene in scenes for thing in scene.shapes]
    assert 0.87 < sizes.count("small") / len(sizes) < 0.94


def test_sides_differ_where_the_style_says_so(tmp_path: Path) -> None:
    style = Style(sides=(64, 160))
    assert style == Style(sides=[64, 160]), "as JSON has it"  # type: ignore[arg-type]
    scenes = list(make_scenes(0, "benchmark", 200, style))
    for extent in ({scene.width for scene in scenes}, {scene.height for scene in scenes}):
        assert extent == set(range(64, 161, STEP))
    assert any(scene.width != scene.height for scene in scenes)
    assert all(scene.shapes for scene in scenes)
    assert all(thing.mask_HW.shape == scene.pixels_HW3.shape[:2] for scene in scenes for thing in scene.objects)
    widths = [max(thing.box[2:]) for scene in scenes if scene.width == 160 for thing in scene.shapes]
    assert max(widths) <= 36, "objects are as large as in other scenes"
    coco = json.loads(write_scenes(tmp_path, 5, 0, "benchmark", style=style).read_text())
    for image, scene in zip(coco["images"], scenes[:5], strict=True):
        assert (image["width"], image["height"]) == (scene.width, scene.height)
        with Image.open(tmp_path / "images" / image["file_name"]) as picture:
            assert picture.size == (scene.width, scene.height)


@pytest.mark.parametrize(
    "wrong",
    [{"small_share": 1.5}, {"background": "grass"}, {"clutter": -1}, {"sides": (160, 64)}, {"sides": (64, 100)}],
)
def test_a_style_that_cannot_be_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=next(iter(wrong))):
        Style(**wrong)


def test_no_scenes_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="count of scenes is 0"):
        write_scenes(tmp_path, 0, 0, "train")
