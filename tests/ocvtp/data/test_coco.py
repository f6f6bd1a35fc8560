"""COCO files: anything wrong is said in one message; the draw depends on seed and ids alone; rejects are listed."""

import hashlib
import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from ocvtp.data import decoding
from ocvtp.data.coco import Accepted, CocoImages, Rejected, TooManyRejects, check_images, select_images
from ocvtp.data.decoding import UnsafePath
from ocvtp.data.scenes import write_scenes
from ocvtp.errors import BadInput


def coco(count: int = 6) -> dict[str, Any]:
    return {
        "images": [{"id": i, "file_name": f"{i:04d}.jpg", "width": 96, "height": 96} for i in range(count)],
        "annotations": [{"id": 10 + i, "image_id": i, "bbox": [0, 0, 9, 9]} for i in range(count)],
        "categories": [],
    }


def write(tmp_path: Path, content: object) -> Path:
    path = tmp_path / "instances.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def broken(change: Any) -> dict[str, Any]:
    data = coco()
    change(data)
    return data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps(coco())[:-40], r"is not JSON, or was cut off: .* at line 1, column \d+"),
        ("", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ([1, 2], "is not COCO: it holds a list of 2, an object with 'images'"),
        ({"info": {}, "items": []}, r"is not COCO: it has no 'images' \(its keys: info, items\)"),
        (broken(lambda d: d.update(images={})), "images is an object: a list of at least one"),
        (broken(lambda d: d.update(images=[])), "images is a list of 0: a list of at least one"),
        (broken(lambda d: d["images"].append(7)), r"images\[6\] is the number 7: an object with id"),
        (broken(lambda d: d["images"][2].pop("id")), r"images\[2\].id is missing"),
        (broken(lambda d: d["images"][2].pop("file_name")), r"images\[2\].file_name is missing"),
        (broken(lambda d: d["images"][2].update(id=1.5)), r"images\[2\].id is the number 1.5: a whole number"),
        (broken(lambda d: d["images"][2].update(id=True)), r"images\[2\].id is true: a whole number"),
        (broken(lambda d: d["images"][2].update(file_name=3)), r"images\[2\].file_name is the number 3: text"),
        (broken(lambda d: d["images"][2].update(file_name="a\ud800")), r"images\[2\].file_name .*half a char"),
        (broken(lambda d: d["images"][4].update(id=1)), r"images\[4\].id is '1', as is that of images\[1\]"),
        (broken(lambda d: d["images"][4].update(id="1")), r"images\[4\].id is '1', as is that of images\[1\]"),
        (
            broken(lambda d: d["images"][4].update(file_name="0001.jpg")),
            r"images\[4\].file_name is '0001.jpg', as is that of images\[1\]",
        ),
        (broken(lambda d: d["images"][3].update(file_name="../c.jpg")), r"images\[3\].file_name is unsafe"),
        (broken(lambda d: d.update(annotations=3)), "annotations is the number 3: a list is needed"),
        (broken(lambda d: d["annotations"].append(None)), r"annotations\[6\] is null: an object"),
        (broken(lambda d: d["annotations"][0].pop("image_id")), r"annotations\[0\].image_id is missing"),
        (
            broken(lambda d: d["annotations"][5].update(image_id=99)),
            r"annotations\[5\].image_id is 99: there is no such image",
        ),
        (
            broken(lambda d: d["annotations"][5].update(id=10)),
            r"annotations\[5\].id is 10, as is that of annotations\[0\]",
        ),
    ],
)
def test_a_wrong_file_is_refused_with_file_place_and_reason(tmp_path: Path, content: object, message: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(BadInput, match=message) as caught:
        CocoImages.load(path)
    assert str(path) in str(caught.value)


def test_one_message_counts_all_problems(tmp_path: Path) -> None:
    data = coco(100)
    for entry in data["images"][10:50]:
        del entry["file_name"]
    with pytest.raises(BadInput, match=r"has 80 problems: .*images\[10\].file_name is missing.*; and 75 more"):
        CocoImages.load(write(tmp_path, data))  # 40 images, and their 40 annotations
    with pytest.raises(BadInput, match="is not there"):
        CocoImages.load(tmp_path / "nothing.json")
    with pytest.raises(BadInput, match="cannot be read"):
        CocoImages.load(tmp_path)


def test_image_lists_without_annotations_and_ids_as_text_are_fine(tmp_path: Path) -> None:
    loaded = CocoImages.load(write(tmp_path, {"images": [{"id": "a b", "file_name": "x/y.jpg"}]}))
    assert [(image.id, image.file) for image in loaded.images] == [("a b", "x/y.jpg")]


def test_the_draw_depends_on_seed_and_ids_alone(tmp_path: Path) -> None:
    data = coco(200)
    straight = CocoImages.load(write(tmp_path, data))
    random.Random(0).shuffle(data["images"])
    shuffled = CocoImages.load(write(tmp_path, data))
    assert straight.images != shuffled.images
    assert straight.sample(50, 3) == shuffled.sample(50, 3)
    assert straight.sample(20, 3) == straight.sample(50, 3)[:20]
    assert straight.sample(50, 3) != straight.sample(50, 4)
    assert len(set(straight.sample(200, 3))) == 200
    # Uniform: over many seeds, the first fifth of the file is drawn a fifth of the time (standard deviation 0.8 %).
    firsts = [int(image.id) for seed in range(200) for image in straight.sample(20, seed)]
    assert abs(sum(i < 40 for i in firsts) / len(firsts) - 0.2) < 0.03


def test_asking_for_too_many_or_no_images_is_refused(tmp_path: Path) -> None:
    loaded = CocoImages.load(write(tmp_path, coco(6)))
    with pytest.raises(BadInput, match=r"instances.json lists 6 images, fewer than the 7 asked for"):
        loaded.sample(7, 0)
    with pytest.raises(BadInput, match="at least one"):
        loaded.sample(0, 0)


# --- the images themselves ------------------------------------------------------------------------------------------


@pytest.fixture
def scenes(tmp_path: Path) -> tuple[Path, Path]:
    return write_scenes(tmp_path, 12, 0, "train"), tmp_path / "images"


def spoil(folder: Path, name: str) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: int(len(data) * 0.7)])


def test_sound_images_come_with_the_hash_of_their_file(scenes: tuple[Path, Path]) -> None:
    annotations, folder = scenes
    seen: list[tuple[int, int]] = []
    selection = select_images(annotations, folder, 8, 1, progress=lambda a, b: seen.append((a, b)))
    assert [r.id for r in selection.records] == [i.id for i in CocoImages.load(annotations).sample(8, 1)]
    for record in selection.records:
        assert record.sha256 == hashlib.sha256((folder / record.file).read_bytes()).hexdigest()
    assert selection.rejects == ()
    assert seen == [(i + 1, 8) for i in range(8)]


def test_a_damaged_image_is_listed_and_replaced_by_the_next_drawn(scenes: tuple[Path, Path]) -> None:
    annotations, folder = scenes
    order = CocoImages.load(annotations).order(1)
    spoil(folder, order[2].file)
    (folder / order[5].file).unlink()
    for workers in (1, 3):
        selection = select_images(annotations, folder, 8, 1, max_reject_rate=0.2, workers=workers)
        wanted = [image for i, image in enumerate(order[:10]) if i not in (2, 5)]
        assert [r.id for r in selection.records] == [image.id for image in wanted]
        assert [(r.id, r.file) for r in selection.rejects] == [(order[i].id, order[i].file) for i in (2, 5)]
        assert "truncated" in selection.rejects[0].reason
        assert "not there" in selection.rejects[1].reason


def test_too_many_rejects_fail_the_run_and_carry_the_list(scenes: tuple[Path, Path]) -> None:
    annotations, folder = scenes
    order = CocoImages.load(annotations).order(1)
    for image in (order[0], order[7]):
        spoil(folder, image.file)
    # 2 rejected of 10 looked at is a rate of 0.2: just allowed, and just not.
    assert len(select_images(annotations, folder, 8, 1, max_reject_rate=0.2).records) == 8
    with pytest.raises(TooManyRejects, match=r"2 of the first 8 images .* above max_reject_rate 0.19") as caught:
        select_images(annotations, folder, 8, 1, max_reject_rate=0.19)
    assert [reject.id for reject in caught.value.rejects] == [order[0].id, order[7].id]
    with pytest.raises(TooManyRejects, match=r"10 of its 12 images .* fewer than the 11 asked for"):
        select_images(annotations, folder, 11, 1, max_reject_rate=0.5)
    with pytest.raises(BadInput, match="share"):
        select_images(annotations, folder, 8, 1, max_reject_rate=1.0)
    with pytest.raises(BadInput, match="is not a folder"):
        select_images(annotations, folder / "no", 8, 1)


def test_a_link_out_of_the_folder_ends_the_run_before_anything_is_opened(
    scenes: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    annotations, folder = scenes
    canary = tmp_path / "canary.jpg"
    victim = CocoImages.load(annotations).order(1)[6]
    (folder / victim.file).rename(canary)
    (folder / victim.file).symlink_to(canary)
    opened: list[str] = []
    real = decoding.read_image_file

    def watch(path: Path) -> bytes:
        opened.append(str(path))
        return real(path)

    monkeypatch.setattr("ocvtp.data.coco.read_image_file", watch)
    with pytest.raises(UnsafePath, match=victim.file):
        select_images(annotations, folder, 8, 1)
    assert opened == []
    with pytest.raises(UnsafePath):
        list(check_images([victim], folder))
    assert opened == []
    assert isinstance(next(check_images([CocoImages.load(annotations).order(1)[0]], folder)), Accepted)
    assert len(opened) == 1  # the watch works


def test_verdicts_keep_the_order_given(scenes: tuple[Path, Path]) -> None:
    annotations, folder = scenes
    images = list(CocoImages.load(annotations).images)
    spoil(folder, images[3].file)
    verdicts = list(check_images(images, folder, workers=4))
    assert [verdict.id for verdict in verdicts] == [image.id for image in images]
    assert [isinstance(verdict, Rejected) for verdict in verdicts] == [i == 3 for i in range(12)]


def test_outlines_of_objects_are_not_kept_in_memory(tmp_path: Path) -> None:
    """Nine tenths of COCO's files: as numbers of Python they would take several times the file."""
    data = coco(50)
    outline = [[index / 100 for index in range(400)]]
    data["annotations"] = [{"id": i, "image_id": i % 50, "segmentation": outline} for i in range(1500)]
    path = write(tmp_path, data)
    size = path.stat().st_size
    assert size > 3e6
    tracemalloc.start()
    try:
        found = CocoImages.load(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(found) == 50
    assert peak < 2.7 * size, "the file as bytes and as text, and little more"
