"""Pruners trained on a benchmark's own images: `train.on`, from the scenes to the scores.

One after another in one workspace; each test says what it changes.
"""

import io
import json
import logging
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image
from small_params import SMALL, write_params

from cluster import Store, Task
from ocvtp.data.scenes import jpeg, make_scene, write_scenes
from ocvtp.json_files import read_json
from pipelines import eval as evaluate
from pipelines import extract, sample, train
from pipelines.__main__ import in_use
from pipelines.stage import context, outputs
from pipelines.tasks.overlaps import OVERLAPS, overlaps, seen_scenes
from pipelines.tasks.training import benchmark_scenes

pytestmark = pytest.mark.pipeline
TINY: dict[str, Any] = {
    **SMALL,
    "method": ["vanilla", "oc-vtp"],
    "keep": [16],
    "benchmark": ["pope", "textvqa"],
    "slots": [16],
    "sample": {"images": 20, "questions": 6},
    "cluster": {"workers": 1},
    "train": {"steps": 2, "batch_size": 8, "eval_every": 2, "on": ["sample", "textvqa"]},
}
OWN = "tiny-llava/layer_9-aw_mse-slots_16-on_textvqa-seed_0"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trained_on")


@pytest.fixture
def run(root: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("OCVTP_STORE", "DVC_STAGE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OCVTP_ROOT", str(root))
    monkeypatch.setattr(context, "PARAMS", root / "params.yaml")

    def stage(module: ModuleType, *arguments: str, **changes: Any) -> int:
        return int(module.main([*write_params(root, changes, TINY), *arguments]))

    return stage


def test_its_training_images_are_listed_beside_those_of_the_data_set(
    root: Path, run, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert run(sample) == 0
    assert "textvqa: of 20 training images 0 are left out, which it asks about" in caplog.text
    assert len(read_json(root / "data/sample/images.json")) == 20
    found = read_json(root / "data/sample/training.json")
    assert list(found) == ["textvqa"]
    about = found["textvqa"]
    assert (about["drawn"], len(about["images"])) == (20, 20)
    assert about["asked_about"] == len(list((root / "data/sample/benchmarks/images").iterdir()))
    assert about["left_out"] == {"sha256": 0, "phash": 0, "distance": 6, "images": []}
    assert all(image["id"].startswith("textvqa-train-") for image in about["images"])
    sums = outputs.checksums(root / ".ocvtp/store")
    assert all(sums[image["path"]] == image["sha256"] for image in about["images"])
    assert not {image["sha256"] for image in about["images"]} & set(sums_of_questions(root))


def sums_of_questions(root: Path) -> list[str]:
    return list(outputs.checksums(root / "data/sample/benchmarks").values())


def test_a_dry_run_knows_all_of_it_before_and_after(root: Path, run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(sample, "--dry-run") == 0
    said = capsys.readouterr().out
    for kind in ("training", "seen", "overlaps"):
        assert f"{kind}: 1 published, 0 would run" in said
    assert run(sample, "--dry-run", train={"on": ["textvqa", "gqa"]}, benchmark=["gqa", "textvqa"]) == 0
    said = capsys.readouterr().out
    assert "training: 1 published, 1 would run" in said
    assert "seen: 1 published, 0 would run" in said
    assert run(extract, "--dry-run") == 0
    said = capsys.readouterr().out
    assert "stage sample" not in said
    assert "tiny-llava on textvqa 0, layer 9\n  tiny-llava on textvqa 16, layer 9\n" in said
    assert run(extract, "--dry-run", train={"on": "gqa"}, benchmark=["gqa"]) == 2
    assert "has no images of gqa: run `python pipelines/sample.py`" in capsys.readouterr().err


def test_a_pruner_is_trained_on_them_and_would_be_tried_on_that_benchmark_alone(root: Path, run) -> None:
    for module in (extract, train):
        assert run(module) == 0
    listings = {path.name for path in (root / "data/tokens/tiny-llava").iterdir()}
    assert listings == {"layer_9.json", "layer_9-on_textvqa.json"}
    index = read_json(root / "models/pruners.json")
    assert {name: about["changes"] for name, about in index.items()} == {
        "tiny-llava/layer_9-aw_mse-slots_16-seed_0": {},
        OWN: {"train.on": "textvqa"},
    }
    weights = {about["files"]["model.safetensors"] for about in index.values()}
    assert len(weights) == 2
    stage = context.open_stage("evaluate", root / "params.yaml", root, dry=True)
    asked = [task.name for task in evaluate.plan(stage).tasks if task.kind == "answers"]
    assert len(asked) == 5
    own = Path(OWN).name.replace("-seed", "-top_1-seed")
    assert [name for name in asked if "on_textvqa" in name] == [f"tiny-llava oc-vtp-16-{own} textvqa"]


@pytest.mark.nightly
def test_it_is_scored_on_that_benchmark_alone(root: Path, run) -> None:
    for module in (sample, extract, train, evaluate):
        assert run(module) == 0
    rows = read_json(root / "results/scores.json")
    assert [(row["method"], row["changes"].get("train.on"), row["benchmark"]) for row in rows] == [
        ("vanilla", None, "pope"), ("vanilla", None, "textvqa"),
        ("oc-vtp", None, "pope"), ("oc-vtp", None, "textvqa"), ("oc-vtp", "textvqa", "textvqa"),
    ]  # fmt: skip
    fingerprints = [row["fingerprint"] for row in rows]
    assert fingerprints[3] != fingerprints[4]
    (own,) = [row for row in read_json(root / "results/summary.json") if row["changes"]]
    assert own["benchmarks"]["textvqa"]["relative"] is not None
    assert own["benchmarks"]["pope"]["relative"] is own["average"]["relative"] is None


def test_nothing_of_it_is_done_twice_and_nothing_is_cleared_away(root: Path, run, monkeypatch) -> None:
    before = {path: outputs.checksums(root / path) for path in ("data", "models")}
    really, ran = context.run, list[Task]()

    def watched(tasks: list[Task], *args: Any, **kwargs: Any) -> Any:
        report = really(tasks, *args, **kwargs)
        ran.extend(report.done)
        return report

    monkeypatch.setattr(context, "run", watched)
    for module in (sample, extract, train):
        assert run(module) == 0
    assert ran == []
    assert {path: outputs.checksums(root / path) for path in before} == before
    used = set(in_use(Store(root / ".ocvtp/store"), [root]))
    made = {f"{kind}/{path.name}" for kind in ("training", "seen", "overlaps", "tokens", "pruners")
            for path in (root / ".ocvtp/store" / kind).iterdir()}  # fmt: skip
    assert made <= used


def test_without_it_nothing_of_it_is_there(root: Path, run) -> None:
    assert run(sample, train={"on": "sample"}) == 0
    assert read_json(root / "data/sample/training.json") == {}


def scaled(data: bytes) -> bytes:
    image, buffer = Image.open(io.BytesIO(data)), io.BytesIO()
    image.resize((150, 150), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=70)
    return buffer.getvalue()


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Four scenes that are asked about and nine to train on, two of which are of the four."""
    write_scenes(tmp_path / "questions/a", 4, 0, "benchmark")
    benchmark_scenes({"benchmark": "gqa", "seed": 0, "first": 0, "count": 7, "style": {}}, tmp_path / "training/b")
    images = tmp_path / "training/b/images"
    (images / "deep").mkdir()
    (images / "again.jpg").write_bytes(jpeg(make_scene(0, "benchmark", 1)))
    (images / "deep/scaled.png").write_bytes(scaled(jpeg(make_scene(0, "benchmark", 2))))
    return tmp_path


def test_images_that_are_asked_about_are_found_as_the_same_file_and_as_the_same_picture(store: Path) -> None:
    places = []
    for kind, call, inputs in (
        ("seen", seen_scenes, {"questions": "questions/a"}),
        ("overlaps", overlaps, {"images": "training/b", "seen": "seen/.c.tmp-1/result"}),
    ):
        folder = store / kind / ".c.tmp-1/result"
        folder.mkdir(parents=True)
        call({}, folder, inputs)
        places.append(folder)
    found = json.loads((places[1] / OVERLAPS).read_bytes())
    assert [(one["image"], one["other"], one["by"]) for one in found] == [
        ("images/again.jpg", "images/benchmark-000001.jpg", "sha256"),
        ("images/deep/scaled.png", "images/benchmark-000002.jpg", "phash"),
    ]
    assert 0 <= found[1]["distance"] <= 6


def test_images_that_are_asked_about_are_left_out_counted_and_listed(
    root: Path, run, caplog: pytest.LogCaptureFixture
) -> None:
    """As if two of the images drawn were also asked about."""
    assert run(sample) == 0
    stage = context.open_stage("sample", root / "params.yaml", root)
    _, _, asked = sample._tasks(stage)
    own = sample._own(stage, asked)["textvqa"]
    names = [path.name for path in sorted((own.chunks[0].out / "images").iterdir())]
    listed = [{"image": f"images/{name}", "other": "images/x.jpg", "by": by, "distance": distance}
              for name, by, distance in ((names[3], "sha256", 0), (names[5], "phash", 4))]  # fmt: skip
    marked = stage.store.root / "overlaps/marked"
    marked.mkdir()
    (marked / OVERLAPS).write_text(json.dumps(listed))
    pretended = replace(own, compared=[replace(own.compared[0], out=marked)])
    with caplog.at_level(logging.INFO):
        about = sample._training(stage, "textvqa", pretended)
    assert len(about["images"]) == 18
    assert not {Path(image["path"]).name for image in about["images"]} & {names[3], names[5]}
    assert about["left_out"] == {"sha256": 1, "phash": 1, "distance": 6, "images": listed}
    assert (
        "of 20 training images 2 are left out, which it asks about (1 the same file, 1 by pHash within 6" in caplog.text
    )
