"""Objects of training images, from scenes and from files of COCO."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ocvtp.data.coverage import read_objects
from ocvtp.data.scenes import SceneSet, Style, write_scenes
from ocvtp.errors import BadInput, Corrupt
from ocvtp.tokens.object_masks import ObjectMasks, check_one_grid
from ocvtp.vlms import family_of
from ocvtp.vlms.family import Family

GRID = (12, 12)


def listed(touched_SN: torch.Tensor) -> list[list[int]]:
    return [row.nonzero()[:, 0].tolist() for row in touched_SN if row.any()]


def test_scenes_and_the_coco_file_of_them_say_the_same(tmp_path: Path) -> None:
    path = write_scenes(tmp_path, 4, 3, "train")
    names = [f"train-{index:06d}" for index in range(4)]
    coco = json.loads(path.read_bytes())
    for image in coco["images"]:  # ids as stage `sample` gives them
        image["id"] = Path(image["file_name"]).stem
    for one in coco["annotations"]:
        one["image_id"] = f"train-{one['image_id']:06d}"
    path.write_text(json.dumps(coco))
    of_file = ObjectMasks.of_coco(path, names, "pad", GRID)
    of_scenes = ObjectMasks.of_scenes(SceneSet(3), "pad", GRID)
    for masks in (of_file, of_scenes):
        masks.check(names)
    expected = read_objects(path, GRID)
    grids = [GRID] * 4
    for found in (of_file.touched(names, grids, 144), of_scenes.touched(names, grids, 150)):
        for name, image_SN in zip(names, found, strict=True):
            objects = expected[f"{name}.jpg"]
            assert listed(image_SN) == [sorted(tokens) for tokens in objects.tokens]
    # Read anew or remembered, in whatever order.
    again = of_scenes.touched(names[::-1], grids, 150)
    assert torch.equal(again.flip(0), found)


def test_a_native_grid_is_stretched_over_the_image(tmp_path: Path) -> None:
    square = [[0, 0, 2, 0, 2, 1, 0, 1]]
    coco = {
        "images": [{"id": 7, "file_name": "a.jpg", "width": 8, "height": 4}],
        "annotations": [
            {"image_id": 7, "segmentation": square},
            {"image_id": 7, "segmentation": {"size": [4, 8], "counts": [0, 32]}, "iscrowd": 1},
        ],
    }
    path = tmp_path / "a.json"
    path.write_text(json.dumps(coco))
    native = ObjectMasks.of_coco(path, ["7"], "pad", None)
    assert listed(native.touched(["7"], [(2, 4)], 8)[0]) == [[0, 1]]
    padded = ObjectMasks.of_coco(path, ["7"], "pad", (4, 4))  # the picture is rows 1 and 2
    assert listed(padded.touched(["7"], [(4, 4)], 16)[0]) == [[4, 5]]


def test_what_is_not_known_is_said(tmp_path: Path) -> None:
    path = write_scenes(tmp_path, 1, 0, "train")
    masks = ObjectMasks.of_coco(path, ["0", "1"], "pad", GRID)
    with pytest.raises(BadInput, match="no segmentations are known of 1 of 2 training images: 1"):
        masks.check(["0", "1"])
    with pytest.raises(BadInput, match="no segmentations are known of 1 of 1 training images: photo"):
        ObjectMasks.of_scenes(SceneSet(0, Style()), "pad", GRID).check(["photo"])
    path.write_text(json.dumps({"images": [{"id": 0, "width": 4, "height": 4}], "annotations": []}))
    with pytest.raises(BadInput, match="none of the 1 training images has an object"):
        ObjectMasks.of_coco(path, ["0"], "pad", GRID).check(["0"])
    path.write_text('{"images": []}')
    with pytest.raises(Corrupt, match="is not a COCO instances file: KeyError 'annotations'"):
        ObjectMasks.of_coco(path, ["0"], "pad", GRID)
    with pytest.raises(BadInput, match=r"segmentations in .* cannot be read"):
        ObjectMasks.of_coco(tmp_path / "none.json", ["0"], "pad", GRID)


@pytest.mark.parametrize(
    ("segmentation", "what"),
    [
        ({"size": [4, 4], "counts": "x"}, "a segmentation is a compressed run-length code"),
        ({"size": [4, 4], "counts": [20, -4]}, r"counts of a run-length code is \[20, -4\]"),
        ({"counts": [16]}, "size of a run-length code is None"),
        ({"size": [4], "counts": [4]}, r"size of a run-length code is \[4\]: height and width"),
        ({"size": [4, 4], "counts": [4]}, "run-length code of 4 pixels for an image of 4 x 4"),
        ({"size": [2, 8], "counts": [16]}, "a mask of 8 x 2 pixels on an image of 4 x 4"),
        ([[1, 2]], r"a polygon is \[1, 2\]"),
        ([[]], r"a polygon is \[\]"),
        ([[1, 2, 3, 4, 5]], r"a polygon is \[1, 2, 3, 4, 5\]"),
        ([1, 2, 3, 4], "a polygon is 1: a flat list of x, y"),
        ([["a", 2, 3, 4]], r"a polygon is \['a', 2, 3, 4\]"),
        ([[math.nan, 2, 3, 4]], r"a polygon is \[nan, 2, 3, 4\]"),
        ("x", "a segmentation is x: a run-length code or a list of polygons"),
    ],
)
def test_a_segmentation_that_is_none_is_refused_before_anything_is_trained(
    tmp_path: Path, segmentation: Any, what: str
) -> None:
    path = tmp_path / "a.json"
    annotation = {"image_id": 0, "segmentation": segmentation}
    path.write_text(json.dumps({"images": [{"id": 0, "width": 4, "height": 4}], "annotations": [annotation]}))
    masks = ObjectMasks.of_coco(path, ["0"], "pad", GRID)
    with pytest.raises(BadInput, match=f"image 0: {what}"):
        masks.check(["0"])
    with pytest.raises(BadInput, match=f"image 0: {what}"):
        masks.touched(["0"], [GRID], 144)


def test_vlms_that_see_tiles_are_refused(vlm: Any, tmp_path: Path) -> None:
    """Where `Family.maps` lays tokens otherwise than `ObjectMasks` does, which is one grid over the image."""
    family, folder = family_of(vlm.model), tmp_path / "vlm"
    vlm.model.save_pretrained(folder)
    picture = Image.new("RGB", (112, 56))
    images = family.preprocess(vlm.processor, [picture], mode="squash" if family.facts.grid is None else "pad")
    maps, (grid,) = family.maps(images, 0), family.grids(images)
    one_grid = len(maps) == 1 and torch.equal(maps[0].numbers_hw, torch.arange(grid[0] * grid[1]).view(*grid))
    if one_grid and type(family).maps is Family.maps:
        check_one_grid(str(folder))
        return
    with pytest.raises(BadInput, match=r"sees an image in tiles, and tokens do not say where these lie"):
        check_one_grid(str(folder))
