"""Training images of benchmarks: scenes that allow their questions, and the images of official data sets."""

import io
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from ocvtp.answers.asking import scene_questions
from ocvtp.data import training_splits
from ocvtp.data.album import Album
from ocvtp.data.coco import TooManyRejects
from ocvtp.data.overlaps import Fingerprint
from ocvtp.data.question_sets import BENCHMARKS, MAKERS
from ocvtp.data.scenes import PLAIN, SceneSet, jpeg, make_scene
from ocvtp.data.training_splits import (
    ROUND,
    TRAINED_ON,
    Official,
    official_fingerprints,
    split_of,
    write_official_images,
    write_training_scenes,
)
from ocvtp.errors import BadInput, NotAvailable


def test_five_benchmarks_have_a_training_split() -> None:
    """Of the paper's ten: the other five are for evaluation alone."""
    assert set(TRAINED_ON) == set(BENCHMARKS) - {"mmbench", "mme", "pope", "mmmu", "seedbench"}


@pytest.mark.parametrize("benchmark", ["gqa", "textvqa", "scienceqa"])
def test_scenes_of_a_training_split_allow_its_questions(tmp_path: Path, benchmark: str) -> None:
    write_training_scenes(tmp_path, benchmark, 12, seed=5)
    data = json.loads((tmp_path / "instances.json").read_text())
    files = {path.name for path in (tmp_path / "images").iterdir()}
    assert files == {image["file_name"] for image in data["images"]}
    assert len(files) == 12
    album = Album(5, PLAIN, 0, split_of(benchmark))
    for number, image in enumerate(data["images"]):
        assert image["id"] % ROUND == number
        assert image["file_name"] == album.image(image["id"])["path"]
        assert MAKERS[benchmark](album, image["id"], np.random.default_rng(0)) != []
        for skipped in range(number, image["id"], ROUND):
            assert MAKERS[benchmark](album, skipped, np.random.default_rng(0)) == []
    if benchmark == "textvqa":
        assert all(album.scene(image["id"]).digit is not None for image in data["images"])
        assert max(image["id"] for image in data["images"]) > ROUND


def test_parts_are_the_whole_and_no_split_shares_a_scene_with_another(tmp_path: Path) -> None:
    sets = {}
    for name, benchmark, first, count in (("all", "vqav2", 0, 8), ("b", "vqav2", 3, 5), ("c", "vizwiz", 0, 8)):
        write_training_scenes(tmp_path / name, benchmark, count, 0, first=first)
        sets[name] = {path.name: path.read_bytes() for path in (tmp_path / name / "images").iterdir()}
    assert sets["b"].items() <= sets["all"].items()
    known = {jpeg(make_scene(0, split, index)) for split in ("train", "benchmark") for index in range(8)}
    assert not known & set(sets["all"].values())
    assert not set(sets["c"].values()) & set(sets["all"].values())


def test_questions_are_asked_of_these_scenes_too() -> None:
    ask = scene_questions(SceneSet(0, PLAIN), 3)
    asked = ask("textvqa-train-1000004")
    assert len(asked) == 3
    assert all(prompt.answer for prompt in asked)
    assert ask("textvqa-train-1000004") == asked
    assert ask("gqa-train-000004") != ask("train-000004")
    assert [ask(name) for name in ("pope-train-000001", "gqa-train-1", "benchmark-000001", "gqa-train-x")] == [()] * 4


# --- Official data sets, here in a folder with the hub's layout ------------------------------------------------------


def rows(count: int, split: str) -> dict[str, list[Any]]:
    """Two rows about each image."""
    images = [jpeg(make_scene(0, split, index)) for index in range(count)]  # type: ignore[arg-type]
    return {
        "image": [{"bytes": image, "path": None} for image in images for _ in range(2)],
        "image_id": [
            f"{split} {index}/x" if index == 2 else f"{split}-{index}" for index in range(count) for _ in "ab"
        ],
    }


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set of nine training and four evaluation images."""
    place = tmp_path / "hub"
    (place / "data").mkdir(parents=True)
    for split, name, count in (("train", "train", 9), ("benchmark", "validation", 4)):
        features = datasets.Features({"image": datasets.Image(), "image_id": datasets.Value("string")})
        made = datasets.Dataset.from_dict(rows(count, split), features=features)
        made.to_parquet(place / f"data/{name}-00000.parquet")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    about = Official(str(place), (None, "train"), (None, "validation"), "image_id")
    monkeypatch.setitem(TRAINED_ON, "textvqa", about)  # type: ignore[arg-type]
    return place


def test_images_of_an_official_training_split_are_drawn_by_their_names(hub: Path, tmp_path: Path) -> None:
    write_official_images(tmp_path / "a", "textvqa", 5, seed=1)
    write_official_images(tmp_path / "all", "textvqa", 40, seed=1)
    write_official_images(tmp_path / "b", "textvqa", 5, seed=2)
    found = {name: {path.name: path.read_bytes() for path in (tmp_path / name / "images").iterdir()} for name in
             ("a", "b", "all")}  # fmt: skip
    assert {name: len(files) for name, files in found.items()} == {"a": 5, "b": 5, "all": 9}
    assert found["a"].items() < found["all"].items() > found["b"].items()
    assert set(found["a"]) != set(found["b"])
    assert set(found["all"].values()) == {jpeg(make_scene(0, "train", index)) for index in range(9)}
    assert sum(name.startswith("train-") for name in found["all"]) == 8, "a name with a slash is a digest"


def test_images_that_are_asked_about_are_read_once_each(hub: Path) -> None:
    found = list(official_fingerprints("textvqa"))
    wanted = [jpeg(make_scene(0, "benchmark", index)) for index in range(4)]
    assert [(one.sha256, one.phash) for one in found] == [
        (made.sha256, made.phash) for made in (Fingerprint.of("x", image) for image in wanted)
    ]


def test_damaged_images_are_counted_and_then_refused(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really = training_splits._bytes
    monkeypatch.setattr(
        training_splits,
        "_bytes",
        lambda row, hub: really(row, hub)[:800] if row["image_id"] == "train-3" else really(row, hub),
    )
    write_official_images(tmp_path / "a", "textvqa", 9, seed=1, max_reject_rate=0.2)
    assert len(list((tmp_path / "a/images").iterdir())) == 8
    with pytest.raises(TooManyRejects, match=r"above max_reject_rate 0\.05; first: image train-3: "):
        write_official_images(tmp_path / "b", "textvqa", 9, seed=1, max_reject_rate=0.05)


def test_what_is_not_there_is_named(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(**changes: Any) -> None:
        about = {"hub": str(hub), "training": (None, "train"), "evaluation": (None, "validation"), "key": None}
        monkeypatch.setitem(TRAINED_ON, "textvqa", Official(**{**about, **changes}))  # type: ignore[arg-type]

    other(training=None)
    with pytest.raises(BadInput, match=r"has no training split: give sample\.training\.textvqa"):
        write_official_images(tmp_path / "a", "textvqa", 5, seed=1)
    other(training=(None, "trian"))
    with pytest.raises(BadInput, match="has no default with a split trian"):
        write_official_images(tmp_path / "a", "textvqa", 5, seed=1)
    other(hub=str(tmp_path / "nowhere"))
    with pytest.raises(NotAvailable, match="is not here and cannot be fetched"):
        write_official_images(tmp_path / "a", "textvqa", 5, seed=1)
    other()
    assert len(list(official_fingerprints("textvqa"))) == 8, "without a key each row has an image of its own"
    (hub / "data/validation-00000.parquet").write_bytes(b"no parquet")
    with pytest.raises(BadInput, match=r"\(default, validation\) cannot be read: "):
        list(official_fingerprints("textvqa"))
    blind = tmp_path / "blind"
    (blind / "data").mkdir(parents=True)
    datasets.Dataset.from_dict({"id": [1]}).to_parquet(blind / "data/train-00000.parquet")
    other(hub=str(blind))
    with pytest.raises(BadInput, match="has no column 'image': it has id"):
        write_official_images(tmp_path / "a", "textvqa", 5, seed=1)


def test_jpeg_is_kept_as_it_is_encoded(hub: Path, tmp_path: Path) -> None:
    write_official_images(tmp_path, "textvqa", 1, seed=0)
    (path,) = (tmp_path / "images").iterdir()
    assert io.BytesIO(path.read_bytes()).read(2) == b"\xff\xd8"
