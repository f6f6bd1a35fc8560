"""The stages with tiny-llava on a few images: what they put out, what they compute again, what they refuse.

One after another in one workspace, as a user runs them; each test says what it changes.
"""

import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from small_params import SMALL, write_params
from stage_workspace import Workspace, opened, work

from cluster import Outcome, Report, Store, Task
from ocvtp import cli
from ocvtp.evaluation.benchmarks import benchmarks
from ocvtp.vlms.families.llava import LlavaFamily
from ocvtp.vlms.families.llava_next import LlavaNextFamily
from pipelines import eval as evaluate
from pipelines import extract, measure, sample, train
from pipelines.__main__ import in_use
from pipelines.stage.context import Stage

__all__ = ["opened", "work"]

pytestmark = pytest.mark.pipeline


def flip(path: Path, at: int = 2000) -> None:
    """Turn one bit around."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def test_sample_lists_images_and_writes_questions(work: Workspace) -> None:
    assert work.run(sample) == 0
    images = work.json("data/sample/images.json")
    assert [image["id"] for image in images] == [f"train-{index:06d}" for index in range(40)]
    sums = work.files(".ocvtp/store")
    assert all(sums[image["path"]] == image["sha256"] for image in images)
    about = work.json("data/sample/sample.json")
    assert {key: about[key] for key in ("source", "seed", "images", "rejects")} == {
        "source": "scenes", "seed": 0, "images": 40, "rejects": 0,
    }  # fmt: skip
    assert set(about["benchmarks"]) == set(benchmarks())
    assert all(one["questions"] >= 12 for one in about["benchmarks"].values())
    trained_on = {image["sha256"] for image in images}
    assert trained_on.isdisjoint(work.files("data/sample/benchmarks").values())


def test_sample_again_does_nothing_and_a_smaller_sample_leaves_nothing_behind(work: Workspace) -> None:
    before, sums = work.files("data/sample"), [one["sha256"] for one in work.json("data/sample/images.json")]
    assert work.run(sample) == 0
    assert (work.ran, work.files("data/sample")) == ([], before)
    assert work.run(sample, sample={"images": 24, "questions": 0}, evaluate={"data": "official"}) == 0
    assert set(work.files("data/sample")) == {"images.json", "rejects.jsonl", "sample.json", "training.json"}
    assert [one["sha256"] for one in work.json("data/sample/images.json")] == sums[:24]
    assert work.run(sample) == 0
    assert (work.ran, work.files("data/sample")) == ([], before)


def test_extract_computes_what_is_missing_in_one_pass(work: Workspace) -> None:
    assert work.run(extract) == 0
    assert [task.spec["layers"] for task in work.ran] == [[9]] * 3
    alone = work.files("data/tokens")
    assert work.run(extract, layer=[-2, 9, 5]) == 0
    assert [task.spec["layers"] for task in work.ran] == [[-2, 5]] * 3
    together = work.files("data/tokens")
    assert set(together) == {f"tiny-llava/layer_{layer}.json" for layer in (-2, 9, 5)}
    assert together["tiny-llava/layer_9.json"] == alone["tiny-llava/layer_9.json"]
    assert list((work.store / "passes").iterdir()) == []
    assert work.run(extract) == 0
    assert (work.ran, work.files("data/tokens")) == ([], alone)


def test_what_extract_puts_out_does_not_depend_on_what_was_there_before(
    work: Workspace, opened: Callable[[str], Workspace], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert work.run(extract, layer=[-2, 9, 5]) == 0
    fresh = Workspace(work.root.parent / "fresh")
    shutil.copytree(work.root / "data/sample", fresh.root / "data/sample")
    shutil.copytree(work.store / "scenes", fresh.store / "scenes")
    monkeypatch.setenv("OCVTP_ROOT", str(fresh.root))
    assert fresh.run(extract, layer=[5, -2, 9]) == 0
    assert fresh.files("data/tokens") == work.files("data/tokens")


def test_a_pass_that_was_cut_off_before_its_layers_were_published_is_used(
    work: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extract, "_adopt", lambda *_: None)
    assert work.run(extract, layer=[3, 4]) == 1  # a layer that was never published
    assert len(work.ran) == 3
    monkeypatch.undo()
    monkeypatch.setenv("OCVTP_ROOT", str(work.root))
    assert work.run(extract, layer=[3, 4]) == 0
    assert work.ran == []
    assert list((work.store / "passes").iterdir()) == []


def test_a_layer_that_another_run_adopted_meanwhile_costs_no_other_layer(
    work: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extract, "_adopt", lambda *_: None)
    assert work.run(extract, layer=[2, 6]) == 1
    monkeypatch.undo()
    monkeypatch.setenv("OCVTP_ROOT", str(work.root))
    really = extract.adopt

    def adopt(source: Path, out: Path) -> Any:
        manifest = really(source, out)
        if source.name == "layer_2":
            raise OSError("the other run was faster")
        return manifest

    monkeypatch.setattr(extract, "adopt", adopt)
    assert work.run(extract, layer=[2, 6]) == 0
    assert work.ran == []
    assert list((work.store / "passes").iterdir()) == []


def test_tokens_are_read_once(work: Workspace) -> None:
    """By the call that publishes each layer: never again by extract or train, as long as nobody touches them."""
    opened, watching = set[str](), True

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event == "open" and str(arguments[0]).endswith("tokens.arrow"):
            opened.add(str(arguments[0]))

    sys.addaudithook(watch)  # there is no way to take it off
    assert work.run(extract, layer=7) == 0
    assert len(opened) == 3  # adopted by this process, from what workers made
    opened.clear()
    for _ in range(2):
        assert work.run(extract, layer=7) == 0
        assert work.run(train, layer=7) == 0
    assert opened == set()
    shard = work.store / work.json("data/tokens/tiny-llava/layer_7.json")["shards"][1]["path"]
    shard.touch()
    assert work.run(train, layer=7) == 0
    assert opened == {str(shard)}
    watching = False
    shutil.rmtree(work.root / "models")


def test_a_flipped_bit_is_named_and_made_again(work: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    assert work.run(extract) == 0
    before = work.files("data/tokens")
    shard = work.store / work.json("data/tokens/tiny-llava/layer_9.json")["shards"][1]["path"]
    whole = shard.read_bytes()
    flip(shard)
    assert work.run(train) == 1
    printed = capsys.readouterr().err
    assert str(shard) in printed
    assert "python pipelines/extract.py" in printed
    assert not (work.root / "models").exists()
    assert work.run(extract) == 0
    assert (shard.read_bytes(), work.files("data/tokens")) == (whole, before)
    assert len(work.ran) == 1


def test_a_missing_shard_is_named(work: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    shard = work.store / work.json("data/tokens/tiny-llava/layer_9.json")["shards"][0]["path"]
    shard.parent.rename(shard.parent.with_name("aside"))
    assert work.run(train) == 1
    assert shard.parent.name in capsys.readouterr().err
    shard.parent.with_name("aside").rename(shard.parent)


def test_train_puts_out_the_pruners_of_the_grid(work: Workspace) -> None:
    assert work.run(train, loss=["mse", "aw_mse"], slots=[[16], [16, 48]]) == 0
    assert len(work.ran) == 4
    cells = {f"layer_9-{loss}-slots_{slots}-seed_0" for loss in ("mse", "aw_mse") for slots in ("16", "16_48")}
    assert {path.name for path in (work.root / "models/tiny-llava").iterdir()} == cells
    index = work.json("models/pruners.json")
    assert set(index) == {f"tiny-llava/{cell}" for cell in cells}
    for name, about in index.items():
        assert work.files(f"models/{name}") == about["files"]
        assert set(about["files"]) == {"config.json", "model.safetensors", "curves.csv", "metrics.json"}
        config = work.json(f"models/{name}/config.json")
        assert (config["vlm"], config["layer"], config["seed"]) == ("tiny-llava", 9, 0)
        assert f"{config['loss']}-slots_{'_'.join(map(str, config['slots']))}" in name


def test_another_grid_trains_what_is_new_and_leaves_nothing_of_the_old_one(work: Workspace) -> None:
    assert work.run(train, loss="mse", slots=[16]) == 0
    assert work.ran == []
    assert [path.name for path in (work.root / "models/tiny-llava").iterdir()] == ["layer_9-mse-slots_16-seed_0"]
    assert work.run(train) == 0
    assert [task.name for task in work.ran] == ["tiny-llava/layer_9-aw_mse-slots_16_32_48-seed_0"]


def test_a_vlm_teaches_by_its_answers(work: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The VLM, its images and its prompts are in the spec; `ocvtp train` on the same comes to the same weights."""
    taught = {
        "slots": [16],
        "train": {**SMALL["train"], "steps": 2, "eval_every": 1, "pruner": {"assignment": "residual"}},
    }
    assert work.run(train, loss="answers", **taught) == 0
    (task,) = work.ran
    about = task.spec["answers"]
    assert [image["id"] for image in about["images"]] == [image["id"] for image in work.json("data/sample/images.json")]
    assert (about["vlm"], about["scenes"]["seed"], about["prompts"]) == ("tiny-llava", 0, None)
    assert set(about["model"]) >= {"revision", "files"}
    name = "models/tiny-llava/layer_9-answers-slots_16-seed_0"
    metrics = work.json(f"{name}/metrics.json")
    assert metrics["kl"] == metrics["val_loss"] > 0
    assert 0 < metrics["span_error"] < 1
    assert work.run(train, loss="answers", **taught) == 0
    assert work.ran == []

    prompts = tmp_path / "asked.jsonl"
    lines = [{"image": image["id"], "prompt": "What is the number?"} for image in about["images"]]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines[:-1]))
    asked = {**taught, "train": {**taught["train"], "prompts": str(prompts)}}
    assert work.run(train, loss="answers", **asked) == 2
    assert f"no prompts or pictures for 1 of 40 training images: {lines[-1]['image']}" in capsys.readouterr().err
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert work.run(train, loss="answers", **asked) == 0
    assert len(work.ran) == 1
    assert work.run(train, loss="answers", **{**taught, "train": {**taught["train"], "prompts": "none.jsonl"}}) == 2
    assert "train.prompts: prompts in none.jsonl cannot be read" in capsys.readouterr().err

    options = ["loss=answers", "slots=[16]", "steps=2", "eval_every=1", "batch_size=8", "pruner.assignment=residual"]
    call = ["train", str(work.root / "data/tokens/tiny-llava/layer_9.json"), str(tmp_path / "by_hand"),
            "--store", str(work.store), "--set", *options]  # fmt: skip
    assert cli.main([*call, "--sample", str(tmp_path)]) == 2
    assert "loss=answers needs the training images" in capsys.readouterr().err
    assert cli.main([*call, "--sample", str(work.root / "data/sample")]) == 0
    weights = task.out / "model.safetensors"
    assert (tmp_path / "by_hand/model.safetensors").read_bytes() == weights.read_bytes()


def test_segmented_objects_teach(
    work: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of scenes they follow from the spec; `ocvtp train` on the same comes to the same weights, in a word or a file."""
    options = {"slots": [16], "train": {**SMALL["train"], "steps": 2, "eval_every": 1}}
    assert work.run(train, loss="masks", **options) == 0
    (task,) = work.ran
    assert task.spec["objects"]["scenes"]["seed"] == 0
    metrics = work.json("models/tiny-llava/layer_9-masks-slots_16-seed_0/metrics.json")
    assert 0 < metrics["cover"] <= 1
    assert work.run(train, loss="masks", **options) == 0
    assert work.ran == []

    call = ["train", str(work.root / "data/tokens/tiny-llava/layer_9.json"), str(tmp_path / "by_hand"),
            "--store", str(work.store), "--set", "loss=masks", "slots=[16]", "steps=2", "eval_every=1",
            "batch_size=8"]  # fmt: skip
    assert cli.main([*call, "--sample", str(tmp_path)]) == 2
    assert "loss=masks needs segmented objects: --objects JSON, or, of scenes, --sample" in capsys.readouterr().err
    assert cli.main([*call, "--sample", str(work.root / "data/sample")]) == 0
    weights = task.out / "model.safetensors"
    assert (tmp_path / "by_hand/model.safetensors").read_bytes() == weights.read_bytes()
    with monkeypatch.context() as tiled:
        tiled.setattr(LlavaFamily, "maps", LlavaNextFamily.maps)
        assert work.run(train, loss="masks", **options) == 2
        assert "loss is masks, but tiny-llava sees an image in tiles" in capsys.readouterr().err
        assert cli.main([*call, "--sample", str(work.root / "data/sample")]) == 2
        assert "tiny-llava sees an image in tiles" in capsys.readouterr().err
    call[-5] = "loss=mse"
    assert cli.main([*call, "--objects", str(tmp_path / "some.json")]) == 2
    assert "--objects is of use with loss=masks only, loss is mse" in capsys.readouterr().err


def test_evaluate_scores_every_setting(work: Workspace) -> None:
    assert work.run(train) == 0  # puts out the default grid again
    assert work.run(evaluate) == 0
    assert Counter(task.kind for task in work.ran) == {"answers": 5, "scores": 5}
    rows = work.json("results/scores.json")
    assert [(row["method"], row["tokens"], row["seed"]) for row in rows] == [
        ("vanilla", 144, None), ("random", 48, 0), ("random", 16, 0), ("oc-vtp", 48, 0), ("oc-vtp", 16, 0),
    ]  # fmt: skip
    for row in rows:
        samples = [json.loads(line) for line in (work.root / row["path"] / "samples.jsonl").open()]
        right = sum(s["prediction"].lower() == "yes" == s["answer"] for s in samples)
        said = sum(s["prediction"].lower() == "yes" for s in samples)
        truly = sum(s["answer"] == "yes" for s in samples)
        assert row["score"] == pytest.approx(2 * right / (said + truly))  # F1 from the answers
        assert row["relative"] == pytest.approx(100 * row["score"] / rows[0]["score"])
        assert row["kept_mean"] == row["tokens"]
        assert (row["fingerprint"] is not None) == (row["method"] == "oc-vtp")
    summary = work.json("results/summary.json")
    assert [row["average"]["relative"] for row in summary] == [pytest.approx(row["relative"]) for row in rows]
    metrics = work.json("results/metrics.json")["tiny-llava"]
    assert metrics["oc-vtp"]["16"]["average"] == summary[-1]["average"]["relative"]
    assert metrics["vanilla"] == {"pope": rows[0]["score"]}


def test_evaluating_again_asks_nothing_and_another_budget_only_its_own_cells(work: Workspace) -> None:
    before = work.files("results")
    assert work.run(evaluate) == 0
    assert (work.ran, work.files("results")) == ([], before)
    assert work.run(evaluate, keep=["33.3%", 32]) == 0
    asked = [task.spec for task in work.ran if task.kind == "answers"]
    assert sorted((spec["method"], spec["keep"]) for spec in asked) == [("oc-vtp", 32), ("random", 32)]
    assert [task.spec["answers"] | {"shard": [0, 1]} for task in work.ran if task.kind == "scores"] == asked
    names = {path.name for path in (work.root / "results/evaluate/tiny-llava").iterdir()}
    assert "random-33.3pct-seed_0" in names
    assert "random-16-seed_0" not in names
    assert work.run(evaluate) == 0
    assert (work.ran, work.files("results")) == ([], before)


def test_measure_says_what_each_setting_keeps(work: Workspace) -> None:
    changes: dict[str, Any] = {"method": ["random", "oc-vtp", "qr", "tome", "fastv"], "measure": {"images": 6}}
    assert work.run(measure, **changes) == 0
    assert sorted(task.spec["method"] for task in work.ran) == ["oc-vtp", "qr", "random", "tome"]
    rows = work.json("results/measures.json")
    assert [(row["method"], row["tokens"]) for row in rows] == [
        (method, keep) for method in ("random", "oc-vtp", "qr", "tome") for keep in (48, 16)
    ]
    found = {(row["method"], row["tokens"]): row for row in rows}
    for row in rows:
        assert 0 < row["cover"] <= 1
        assert 0 < row["span_on"] < 1
        assert "milliseconds" not in row
    for method in ("random", "qr", "tome"):
        assert found[method, 48]["span_on"] < found[method, 16]["span_on"]
    assert found["qr", 16]["span_on"] < found["random", 16]["span_on"]
    before = work.files("results")
    assert work.run(measure, **changes) == 0
    assert (work.ran, work.files("results")) == ([], before)
    assert work.run(measure, **changes, keep=[48, 16, 8]) == 0
    assert len(work.ran) == 4


def test_results_brought_by_dvc_are_put_back_into_a_store_that_lacks_them(work: Workspace) -> None:
    before = work.files("results")
    shutil.rmtree(work.store / "questions")
    shutil.rmtree(work.store / "pruners")
    assert work.run(evaluate, seed=[0]) == 0
    assert {task.name.split("/")[0] for task in work.ran} == {"put back questions", "put back pruners"}
    assert work.files("results") == before


def test_a_pruner_that_is_not_there_is_named(work: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    assert work.run(evaluate, seed=[0, 7]) == 2
    assert "layer_9-aw_mse-slots_16_32_48-seed_7: run `python pipelines/train.py`" in capsys.readouterr().err


def test_if_tasks_fail_all_are_told_and_the_others_are_kept(
    work: Workspace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    really = Stage.run

    def run(self: Stage, tasks: Sequence[Task], workers: Any = None) -> Report:
        report = really(self, tasks, workers)
        if any(task.kind == "scores" for task in tasks):  # as if another could not be scored
            report.failed.append(Outcome(tasks[0], "error", 1, None, "no score follows"))
        return report

    monkeypatch.setattr(Stage, "run", run)
    # One question is no pair, which mme cannot score.
    code = work.run(evaluate, method="vanilla", benchmark=["mme", "pope"], evaluate={"limit": 1})
    assert code == 1
    said = capsys.readouterr().err
    assert "limit 1 leaves no whole unit of mme" in said
    assert "no score follows" in said
    assert [row["benchmark"] for row in work.json("results/scores.json")] == ["pope"]
    (row,) = work.json("results/summary.json")
    assert (row["benchmarks"]["mme"]["score"], row["average"]["relative"]) == (None, None)


def test_three_or_seven_tasks_end_in_the_bytes_of_one(work: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    changes: dict[str, Any] = {"method": "vanilla", "cluster": {"workers": 1}}
    assert work.run(evaluate, **changes) == 0
    before, keys, said = work.files("results"), set(in_use(Store(work.store), [work.root])), work.answers()
    for count in (3, 7):
        for kind in ("scores", "answers"):
            shutil.rmtree(work.store / kind)
        assert work.run(evaluate, **changes, evaluate={"shards": count}) == 0
        shards = [task.spec["shard"] for task in work.ran if task.kind == "answers"]
        assert shards == [[number, count] for number in range(count)]
        assert (work.files("results"), work.answers()) == (before, said)
    scores = {key for key in keys if key.startswith("scores/")}
    assert {f"scores/{path.name}" for path in (work.store / "scores").iterdir()} == scores

    def planned(count: int | None) -> str:
        capsys.readouterr()
        arguments = write_params(work.root, {**changes, "evaluate": {"shards": count}})
        assert evaluate.main([*arguments, "--dry-run"]) == 0
        return capsys.readouterr().out

    shutil.rmtree(work.store / "scores")
    for count in (3, 7, None):
        assert "answers: 7 published, 0 would run" in planned(count), "what is answered is not asked again"
    shutil.rmtree(next((work.store / "answers").iterdir()))
    assert "answers: 6 published, 1 would run" in planned(None), "what is half answered is gone on with"
    assert "answers: 0 published, 3 would run" in planned(3)
    shutil.rmtree(work.store / "answers")
    questions = len(said.splitlines())
    assert work.run(evaluate, **changes, evaluate={"shards": questions + 1}) == 2
    assert f"evaluate.shards: {questions + 1} tasks of {questions} questions of pope" in capsys.readouterr().err
    assert work.ran == []


@pytest.mark.nightly
def test_another_way_to_score_asks_nothing_and_shards_end_in_the_same_bytes(work: Workspace) -> None:
    changes: dict[str, Any] = {"method": ["vanilla", "random"], "keep": [16]}
    assert work.run(sample) == 0  # it runs by itself, too
    assert work.run(evaluate, **changes) == 0
    before = work.files("results")
    shutil.rmtree(work.store / "scores")  # as if their code had changed
    assert work.run(evaluate, **changes) == 0
    assert ([task.kind for task in work.ran], work.files("results")) == (["scores"] * 2, before)
    assert (
        {f"answers/{path.name}" for path in (work.store / "answers").iterdir()}
        >= {name for name in in_use(Store(work.store), [work.root]) if name.startswith("answers/")}
        != set()
    )
    for kind in ("scores", "answers"):
        shutil.rmtree(work.store / kind)
    small = {"minutes_per_task": 0.001}
    assert work.run(evaluate, **changes, evaluate=small) == 0
    shards = [task.spec["shard"] for task in work.ran if task.kind == "answers"]
    count = len(shards) // 2
    assert count in (2, 4, 8)
    assert shards == 2 * [[number, count] for number in range(count)]
    assert work.files("results") == before
    assert [speed for speed in work.json(".ocvtp/store/logs/speeds.json").values() if not speed > 0] == []
    shutil.rmtree(work.store / "scores")
    assert work.run(evaluate, **changes) == 0
    assert [task.kind for task in work.ran] == ["scores"] * 2, "shards of another size are gone on with"
