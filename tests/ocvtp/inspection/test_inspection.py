"""What `ocvtp inspect` says, against the same things counted plainly."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from ocvtp import cli
from ocvtp.commands import common
from ocvtp.commands.inspect import draw, table
from ocvtp.data.coverage import Objects, read_objects
from ocvtp.data.scenes import write_scenes
from ocvtp.errors import BadInput, Corrupt, Incompatible
from ocvtp.inspection import towers
from ocvtp.inspection.measure import Asked, Subject, measure, summary
from ocvtp.inspection.segments import Picture, pictures
from ocvtp.selection import CHOICES, css, prototype_error, qr, span_error
from ocvtp.tokens.object_masks import mask_of, objects
from ocvtp.vlms import family_of
from ocvtp.vlms.images import Map

SIZE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
GRIDS = {"dinov2": (16, 16), "clip": (4, 4), "siglip": (4, 4)}


def make(kind: str, folder: Path) -> Path:
    torch.manual_seed(0)
    if kind == "dinov2":
        Dinov2Model(Dinov2Config(**SIZE, image_size=56, patch_size=14)).save_pretrained(folder)
    elif kind == "clip":
        CLIPVisionModel(CLIPVisionConfig(**SIZE, image_size=56, patch_size=14)).save_pretrained(folder)
    else:
        SiglipVisionModel(SiglipVisionConfig(**SIZE, image_size=56, patch_size=14)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, 6, 0, "benchmark")
    return folder


def annotations(folder: Path) -> Path:
    return next(path for path in folder.rglob("*.json"))


def images_of(folder: Path) -> Path:
    return next(folder.rglob("*.jpg")).parent


# --- Objects ---


def test_objects_of_padded_scenes_are_those_of_evaluation(scenes: Path) -> None:
    path = annotations(scenes)
    expected = read_objects(path, (12, 12))
    numbers = torch.arange(144).view(12, 12)
    found = pictures(path, images_of(scenes))
    assert len(found) == 6
    for picture in found:
        size = Image.open(picture.path).size
        assert objects(picture.segments, size, "pad", [Map(numbers, 1.0)]) == expected[picture.path.name]


def test_objects_by_hand() -> None:
    """A picture of 8 x 4: a bar on the left, a dot in the middle of the right half."""
    bar, dot = np.zeros((4, 8), bool), np.zeros((4, 8), bool)
    bar[:, :2], dot[1, 5] = True, True
    codes = [{"size": [4, 8], "counts": [0, 8, 24]}, {"size": [4, 8], "counts": [21, 1, 10]}]
    np.testing.assert_array_equal(mask_of(codes[0], (8, 4)), bar)
    np.testing.assert_array_equal(mask_of(codes[1], (8, 4)), dot)
    picture = Picture(Path("a.png"), codes)
    grid = [Map(torch.arange(4).view(2, 2))]
    assert objects(picture.segments, (8, 4), "squash", grid) == Objects(
        (frozenset({0, 2}), frozenset({1})), (True, True)
    )
    padded = [Map(torch.arange(16).view(4, 4), 1.0)]  # two rows of padding above and below
    assert objects(picture.segments, (8, 4), "pad", padded) == Objects(
        (frozenset({4, 8}), frozenset({6})), (False, True)
    )
    # The middle square is columns 2 to 5: the bar is not in it.
    assert objects(picture.segments, (8, 4), "crop", grid) == Objects((frozenset({1}),), (True,))
    # Two maps, as of LLaVA-NeXT: a token of either will do.
    two = [grid[0], Map(4 + torch.arange(2).view(1, 2))]
    assert objects(picture.segments, (8, 4), "squash", two).tokens == (frozenset({0, 2, 4}), frozenset({1, 5}))


def test_segmentations_that_are_read() -> None:
    drawn = mask_of([[1, 1, 3, 1, 3, 2, 1, 2]], (6, 4))
    assert drawn.shape == (4, 6)
    assert {*zip(*(axis.tolist() for axis in np.nonzero(drawn)), strict=True)} == {
        (y, x) for y in (1, 2) for x in (1, 2, 3)
    }
    with pytest.raises(BadInput, match="compressed run-length"):
        mask_of({"size": [4, 6], "counts": "abc"}, (6, 4))
    with pytest.raises(BadInput, match="a mask of 4 x 6 pixels on an image of 6 x 4"):
        mask_of({"size": [6, 4], "counts": [24]}, (6, 4))


def test_images_that_are_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="does not exist"):
        pictures(tmp_path / "nowhere")
    with pytest.raises(BadInput, match="has no images"):
        pictures(tmp_path)
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(Corrupt, match="not a COCO instances file"):
        pictures(tmp_path / "a.json")
    (tmp_path / "b.json").write_text(json.dumps({"images": [{"id": 1, "file_name": "../x.jpg"}], "annotations": []}))
    with pytest.raises(BadInput, match="must stay in the image folder"):
        pictures(tmp_path / "b.json")


# --- Measures ---


@torch.no_grad()
@pytest.mark.parametrize("kind", GRIDS)
def test_a_tower_that_stands_alone(kind: str, scenes: Path, tmp_path: Path) -> None:
    family = towers.load(make(kind, tmp_path / kind))
    subject = Subject(family, None, "crop")
    found = pictures(annotations(scenes), images_of(scenes))
    asked = [Asked.parse(text) for text in ("random", "qr@2", "css@4", "oc-vtp-untrained@2")]
    rows = measure(subject, found, asked, [5], [0, 1], layer=3, batch_size=4)
    assert [(row.method, row.seed) for row in rows] == [
        ("random", 0), ("random", 1), ("qr@2", 0), ("css@4", 0), ("oc-vtp-untrained@2", 0), ("oc-vtp-untrained@2", 1),
    ]  # fmt: skip
    images = subject.images([Image.open(picture.path) for picture in found])
    states = family.model(pixel_values=images.pixels, output_hidden_states=True).hidden_states
    states = [state[:, 0 if kind == "siglip" else 1 :] for state in states]
    on = {"dinov2": 4, "clip": 3, "siglip": 4}[kind]
    assert family.facts.grid == GRIDS[kind]
    chosen = qr(states[2], 5)
    row = rows[2]
    assert row.span == pytest.approx(float(span_error(states[3], chosen).mean()), rel=1e-3)
    assert row.span_on == pytest.approx(float(span_error(states[on], chosen).mean()), rel=1e-3)
    assert row.near == pytest.approx(float(prototype_error(states[on], chosen).mean()), rel=1e-3)
    assert row.tokens == row.distinct == 5
    assert row.milliseconds is not None
    assert row.milliseconds > 0
    assert rows[3].span_on <= rows[2].span_on + 1e-6 or kind == "clip"  # css of the last layer is made for it
    hits = [objects(p.segments, Image.open(p.path).size, "crop", family.maps(images, n)).covered_by(chosen[n].tolist())
            for n, p in enumerate(found)]  # fmt: skip
    assert row.cover == sum(hit.covered for hit in hits) / sum(hit.objects for hit in hits)
    assert rows[0].span != rows[1].span
    assert rows[4].span != rows[5].span
    mean = next(one for one in summary(rows) if one["method"] == "random")
    assert mean["seeds"] == 2
    assert mean["span"] == pytest.approx((rows[0].span + rows[1].span) / 2)


@pytest.mark.parametrize("kind", GRIDS)
def test_pixels_are_those_of_the_folders_processor(kind: str, tmp_path: Path, picture_of: Any) -> None:
    folder = make(kind, tmp_path / kind)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 4]})
    )
    family = towers.load(folder)
    side = 14 * GRIDS[kind][0]
    picture = picture_of(0, side, side)
    expected = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255 - torch.tensor([0.1, 0.2, 0.3])[:, None, None]
    expected = expected / torch.tensor([1.0, 2, 4])[:, None, None]
    for mode in ("crop", "squash"):
        torch.testing.assert_close(family.preprocess(None, [picture], mode=mode).pixels[0], expected)


def test_what_a_tower_alone_cannot_do_is_said(tmp_path: Path, scenes: Path) -> None:
    subject = Subject(towers.load(make("clip", tmp_path / "clip")), None, "crop")
    found = pictures(images_of(scenes))
    with pytest.raises(Incompatible, match="only tokens are read"):
        measure(subject, found, [Asked("visionzip")], [5], [0], layer=2)
    for name in ("fastv", "trim"):
        with pytest.raises(BadInput, match=f"{name} needs a language model or a prompt"):
            measure(subject, found, [Asked(name)], [5], [0], layer=2)
    for text in ("css@x", "css@--2", "css@", "css@2-"):
        with pytest.raises(BadInput, match=f"{text}'"):
            Asked.parse(text)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(BadInput, match="of the type 'bert'"):
        towers.load(tmp_path)
    with pytest.raises(BadInput, match=r"has no config\.json"):
        towers.load(tmp_path / "nowhere")


@torch.no_grad()
def test_every_family_is_inspected(vlm: Any, scenes: Path) -> None:
    family = family_of(vlm.model)
    subject = Subject(family, vlm.processor, "squash" if family.facts.grid is None else "pad")
    found = pictures(annotations(scenes), images_of(scenes))
    asked = [Asked(name, 2) for name in CHOICES] + [Asked("random"), Asked("visionzip")]
    rows = {row.method: row for row in measure(subject, found, asked, [4], [0], layer=2, batch_size=3)}
    assert all(row.tokens == 4 and 0 < row.span < 1 and 0 <= (row.cover or 0) <= 1 for row in rows.values())
    assert rows["css@2"].span < rows["random"].span


def test_the_choice_of_llava_is_that_of_the_function(llava: Any, scenes: Path) -> None:
    family = family_of(llava.model)
    subject = Subject(family, llava.processor, "pad")
    found = pictures(images_of(scenes))
    (row,) = measure(subject, found, [Asked("css", 3)], [0.25], [0], layer=3)
    images = subject.images([Image.open(picture.path) for picture in found])
    tokens = family.encode(images, {3}).tokens(3, range(6))
    assert row.span == pytest.approx(float(span_error(tokens, css(tokens, 4)).mean()), rel=1e-4)
    assert row.cover is None


# --- The command ---


def test_the_command(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tower, out = make("siglip", tmp_path / "siglip"), tmp_path / "drawn.png"
    call = ["inspect", str(annotations(scenes)), "--images", str(images_of(scenes)), "--tower", str(tower),
            "--keep", "6", "25%", "--methods", "random,css@2,oc-vtp-untrained@2", "--layer", "2", "--seeds", "0", "1",
            "--device", "cpu"]  # fmt: skip
    assert cli.main([*call, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == 6
    assert len(found["rows"]) == 2 * (2 + 1 + 2)
    assert cli.main([*call, "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "oc-vtp-untrained@2" in shown
    assert (
        f"{np.mean([row['span'] for row in found['rows'] if row['method'] == 'css@2' and row['keep'] == 6]):.3f}"
        in shown
    )
    assert Image.open(out).size[0] > 300
    assert cli.main([*call, "--limit", "0"]) == 2
    assert "at least 1 each" in capsys.readouterr().err
    assert cli.main([*call, "--out", str(tmp_path / "no/where.png")]) == 2
    assert cli.main([*call, "--out", str(tmp_path)]) == 2
    assert f"--out {tmp_path} cannot be written: Is a directory" in capsys.readouterr().err


def test_a_method_that_works_inside_the_tower_has_no_time_of_its_own(
    llava: Any, scenes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    subject = Subject(family_of(llava.model), llava.processor, "pad")
    found = pictures(images_of(scenes))
    rows = measure(subject, found, [Asked("tome"), Asked("qr", 2)], [4], [0], layer=2)
    assert [row.milliseconds is None for row in rows] == [True, False]
    means = list(summary(rows))
    assert means[0]["milliseconds"] is None
    console = common.console()
    console.print(table(means, len(found), 2))
    line = next(line for line in capsys.readouterr().out.splitlines() if "tome" in line)
    assert line.rstrip(" │┃|").endswith("-")
    assert draw(means)


def test_a_segmentation_that_is_none_names_the_picture(llava: Any, scenes: Path) -> None:
    subject = Subject(family_of(llava.model), llava.processor, "pad")
    (picture,) = pictures(images_of(scenes))[:1]
    with pytest.raises(BadInput, match=rf"{picture.path.name}: a polygon is \[1, 2\]"):
        measure(subject, [Picture(picture.path, [[[1, 2]]])], [Asked("qr", 2)], [4], [0], layer=2)


def test_the_command_on_tiny_llava(scenes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["inspect", str(annotations(scenes)), "--images", str(images_of(scenes)), "--keep", "8", "--device", "cpu"]
    assert cli.main([*call, "--methods", "random,qr,css", "--json"]) == 0
    rows = {row["method"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["css"]["span"] < rows["qr"]["span"] < rows["random"]["span"]
    assert rows["qr"]["cover"] > rows["random"]["cover"]
    assert cli.main([*call, "--fit", "crop"]) == 2
    assert "is for a tower" in capsys.readouterr().err
