"""The stages on images of a data set in COCO's format: copied, refused, measured, and objects that teach."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stage_workspace import Workspace, opened, work

from ocvtp.data.scenes import write_scenes
from pipelines import extract, measure, sample, train
from pipelines.stage import outputs

__all__ = ["opened", "work"]

pytestmark = pytest.mark.pipeline


@pytest.fixture
def coco(tmp_path: Path) -> dict[str, Any]:
    """A data set of ten scenes, one of which is cut off."""
    write_scenes(tmp_path / "set", 10, 3, "train")
    victim = tmp_path / "set/images/train-000004.jpg"
    victim.write_bytes(victim.read_bytes()[:900])
    return {
        "source": "coco", "images": 9, "questions": 0, "max_reject_rate": 0.2,
        "annotations": str(tmp_path / "set/instances.json"), "image_folder": str(tmp_path / "set/images"),
    }  # fmt: skip


def test_images_of_a_data_set_are_copied_and_damaged_ones_listed(work: Workspace, coco: dict[str, Any]) -> None:
    assert work.run(sample, sample=coco, evaluate={"data": "official"}) == 0
    images = work.json("data/sample/images.json")
    assert {image["id"] for image in images} == {str(index) for index in range(10) if index != 4}
    sums = work.files(".ocvtp/store")
    folder = Path(coco["image_folder"])
    originals = outputs.checksums(folder)
    for image in images:
        assert sums[image["path"]] == image["sha256"] == originals[f"train-{int(image['id']):06d}.jpg"]
    (reject,) = [json.loads(line) for line in (work.root / "data/sample/rejects.jsonl").open()]
    assert (reject["id"], reject["file"]) == ("4", "train-000004.jpg")
    assert "truncated" in reject["reason"]
    assert work.json("data/sample/sample.json")["rejects"] == 1


def test_too_many_damaged_images_end_the_stage_and_are_listed(
    work: Workspace, coco: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    before = work.files("data/sample")
    assert work.run(sample, sample={**coco, "max_reject_rate": 0.01}, evaluate={"data": "official"}) == 2
    printed = capsys.readouterr().err
    assert "above max_reject_rate 0.01" in printed
    listing = work.store / "logs/rejects.jsonl"
    assert str(listing) in printed
    assert json.loads(listing.read_text())["file"] == "train-000004.jpg"
    assert work.files("data/sample") == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: data["images"][0].update(file_name="../../secret.jpg"), "secret.jpg"),
        (lambda data: data.pop("images"), "images"),
    ],
)
def test_a_data_set_that_is_not_sound_is_refused_before_anything_is_written(
    work: Workspace, coco: dict[str, Any], change: Any, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = work.files("data/sample")
    path = Path(coco["annotations"])
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    assert work.run(sample, sample=coco, evaluate={"data": "official"}) == 2
    printed = capsys.readouterr().err
    assert said in printed
    assert "instances.json" in printed
    assert work.files("data/sample") == before


def test_images_without_masks_are_measured_too(opened: Callable[[str], Workspace], coco: dict[str, Any]) -> None:
    work = opened("without-masks")
    settings: dict[str, Any] = {"sample": coco, "evaluate": {"data": "official"}, "method": ["random", "qr"]}
    assert work.run(sample, **settings) == 0
    assert work.run(measure, **settings) == 0
    rows = work.json("results/measures.json")
    assert [(row["method"], row["cover"], row["small"]) for row in rows] == [
        (method, None, None) for method in ("random", "random", "qr", "qr")
    ]
    assert all(0 < row["span_on"] < 1 for row in rows)


def test_the_segmented_objects_of_a_data_set_teach(
    opened: Callable[[str], Workspace], coco: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of `sample.annotations`; the key of the training holds the file's checksum."""
    work = opened("segmented")
    settings: dict[str, Any] = {
        "sample": coco, "evaluate": {"data": "official"}, "loss": "masks", "slots": [16],
        "train": {"steps": 2, "batch_size": 4, "eval_every": 1, "validation_share": 0.25},
    }  # fmt: skip
    for script in (sample, extract, train):
        assert work.run(script, **settings) == 0
    (task,) = work.ran
    path = Path(coco["annotations"])
    assert task.spec["objects"]["coco"] == hashlib.sha256(path.read_bytes()).hexdigest()
    metrics = work.json("models/tiny-llava/layer_9-masks-slots_16-seed_0/metrics.json")
    assert 0 < metrics["cover"] <= 1
    data = json.loads(path.read_text())
    data["annotations"] = []
    path.write_text(json.dumps(data))
    assert work.run(train, **settings) == 1
    assert "none of the 9 training images has an object with a segmentation" in capsys.readouterr().err
