"""`--dry-run` of the stages with tiny-llava: what would run and why, without a change on disk.

One after another in one workspace; each test says what it changes.
"""

import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from small_params import SMALL, write_params

from pipelines import efficiency, extract, measure, report, sample, train
from pipelines import eval as evaluate
from pipelines.stage import context

pytestmark = pytest.mark.pipeline
TINY: dict[str, Any] = {
    **SMALL,
    "method": ["vanilla", "oc-vtp"],
    "keep": [16],
    "mlflow": {},
    "sample": {"images": 20, "questions": 2},
    "train": {"steps": 2, "batch_size": 8, "eval_every": 2},
}
OTHERS = "has put out what other parameters, data or code asked for"


class Workspace:
    """A folder of outputs with a store."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.root, self.store, self._capsys = root, root / ".ocvtp/store", capsys

    def params(self, changes: dict[str, Any]) -> list[str]:
        return write_params(self.root, changes, TINY)

    def run(self, module: ModuleType, **changes: Any) -> int:
        code = int(module.main(self.params({"mlflow": {"enabled": False}, **changes})))
        self._capsys.readouterr()
        return code

    def dry(self, module: ModuleType, expected: int = 0, **changes: Any) -> str:
        """What a dry run says; it changes nothing."""
        arguments = self.params(changes)
        before = self.state()
        assert module.main([*arguments, "--dry-run"]) == expected
        assert self.state() == before
        printed = self._capsys.readouterr()
        return printed.out if expected == 0 else printed.err

    def state(self) -> dict[str, tuple[int, int, int]]:
        found = {path: path.lstat() for path in [self.root, *self.root.rglob("*")]}
        return {str(path): (one.st_mtime_ns, one.st_ctime_ns, one.st_ino) for path, one in found.items()}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("dry")


@pytest.fixture
def work(root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Workspace:
    for name in ("OCVTP_STORE", "DVC_STAGE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OCVTP_ROOT", str(root))
    monkeypatch.setattr(context, "PARAMS", root / "params.yaml")
    monkeypatch.chdir(root)  # where a database of MLflow would appear
    return Workspace(root, capsys)


def test_before_anything_has_run(work: Workspace) -> None:
    said = work.dry(sample)
    assert "scenes: 0 published, 1 would run\n  1 of them: nothing like it is published\n    scenes 0\n" in said
    assert "questions: 0 published, 1 would run" in said
    for module, maker in ((extract, "sample"), (train, "extract"), (evaluate, "train")):
        assert f"run `python pipelines/{maker}.py` or `dvc repro` first" in work.dry(module, expected=2)
    assert [path.name for path in work.root.iterdir()] == ["params.yaml"]


def test_extract_names_what_it_would_extract(work: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    assert work.run(sample) == 0
    assert work.dry(sample) == "scenes: 1 published, 0 would run\nquestions: 1 published, 0 would run\n"
    said = work.dry(extract)
    assert "tokens: 0 published, 2 would run\n  2 of them: nothing like it is published\n" in said
    assert "  tiny-llava 0, layer 9\n  tiny-llava 16, layer 9\n" in said
    assert "their tokens" not in said
    with monkeypatch.context() as patch:
        patch.setattr(extract, "LARGE", 0)
        two = work.dry(extract, layer=[9, 10])
    assert two.endswith(f"their tokens take {2 * 20 * 144 * 96 * 2 / 1e9:.3g} GB of the store\n")
    assert work.run(extract, layer=[5, 9]) == 0
    assert work.dry(extract) == "tokens: 2 published, 0 would run\n"
    said = work.dry(extract, layer=[9, -2])
    assert "tokens: 2 published, 2 would run\n  2 of them: layers[]: 5 -> -2\n" in said
    assert "2 passes, each over the images from the first one named:\n  tiny-llava 0, layer -2\n" in said
    said = work.dry(extract, extract={"batch_size": 4})
    assert "  2 of them: batch_size: 8 -> 4\n" in said


def test_an_earlier_stage_that_is_out_of_date_is_named(work: Workspace) -> None:
    assert work.run(extract) == 0
    said = work.dry(train, extract={"batch_size": 4})
    assert f"stage extract {OTHERS}: run `python pipelines/extract.py` or `dvc repro` first" in said
    assert "pruners: 0 published, 1 would run" in said
    said = work.dry(extract, sample={"images": 24})
    assert f"stage sample {OTHERS}: run `python pipelines/sample.py`" in said
    assert "stage" not in work.dry(train)
    scenes = next(path for path in (work.store / "scenes").iterdir())
    scenes.rename(work.root / "away")
    assert "stage sample lacks 1 of its 2 results in the store: run `python pipelines/sample.py`" in work.dry(extract)
    (work.root / "away").rename(scenes)


def test_damaged_tokens_are_told_without_reading_them(work: Workspace) -> None:
    assert work.run(extract) == 0  # remembers what it adopted
    listing = json.loads((work.root / "data/tokens/tiny-llava/layer_9.json").read_text())
    shard = work.store / listing["shards"][0]["path"]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    said = work.dry(extract)
    assert f"  1 of them: damaged\n    tiny-llava 0, layer 9\n  {shard} has {len(whole) - 1} bytes" in said
    assert "1 passes" in said
    said = work.dry(train)
    assert "stage extract lacks 1 of its 2 results in the store: run `python pipelines/extract.py`" in said
    assert "1 of 2 results of stage extract in the store" in said
    assert "cannot be used" in said
    shard.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])  # another content of the same size
    said = work.dry(extract)
    assert "tokens: 2 published, 0 would run" in said
    assert f"  {shard.parent} was touched since it was found whole: it is read first\n" in said
    assert work.run(extract) == 0
    assert (shard.read_bytes() == whole, work.dry(extract)) == (True, "tokens: 2 published, 0 would run\n")


def test_layers_of_passes_that_are_there_are_not_extracted(work: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(extract, "_adopt", lambda *_: None)
        assert work.run(extract, layer=[3, 4]) == 1  # as if it was killed before layers were published
    said = work.dry(extract, layer=[3, 4])
    assert said == "4 shards are published from passes that are there\n"
    assert work.run(extract, layer=[3, 4]) == 0
    assert work.run(extract) == 0


def test_train_and_evaluate(work: Workspace) -> None:
    assert "pruners: 0 published, 1 would run\n  1 of them: nothing like it" in work.dry(train)
    assert work.run(train) == 0
    assert work.dry(train) == "pruners: 1 published, 0 would run\n"
    said = work.dry(train, loss="mse", train={"steps": 3})
    assert "  1 of them: train.loss: aw_mse -> mse; train.steps: 2 -> 3\n    tiny-llava/layer_9-mse-slots" in said
    assert "answers: 0 published, 2 would run" in work.dry(evaluate)
    assert work.run(evaluate) == 0
    assert work.dry(evaluate) == "scores: 2 published, 0 would run\n"
    said = work.dry(evaluate, keep=[16, 12])
    assert "answers: 0 published, 1 would run\n  1 of them: keep: 16 -> 12\n" in said
    assert "scores: 2 published, 1 would run\n  1 of them: answers.keep: 16 -> 12\n" in said
    shutil.rmtree(work.store / "pruners")
    said = work.dry(evaluate)
    assert "scores: 2 published, 0 would run\npruners/" in said
    assert f"is put back into the store from {work.root}/models/tiny-llava/layer_9-aw_mse-slots" in said


def test_another_layer_leaves_the_pruners_of_the_first_as_they_are(work: Workspace) -> None:
    """Whether it is the one that goes to the LLM or not, and whether trainings see that layer or not."""
    seen = {"train": {**TINY["train"], "handed_on": True}}
    assert work.run(extract, layer=[9, -2]) == 0
    assert work.run(train) == 0
    said = work.dry(train, layer=[9, -2])
    assert "pruners: 1 published, 1 would run" in said
    assert "tiny-llava/layer_-2-aw_mse" in said
    said = work.dry(train, **seen)
    assert "pruners: 0 published, 1 would run" in said
    assert "handed_on" in said
    assert work.dry(extract, **seen) == "tokens: 4 published, 0 would run\n"
    assert work.run(extract, **seen) == 0
    assert [path.name for path in sorted((work.root / "data/tokens/tiny-llava").iterdir())] == [
        "layer_-2.json", "layer_9.json",
    ]  # fmt: skip
    assert work.run(train, **seen) == 0
    (pruner,) = (work.root / "models/tiny-llava").iterdir()
    metrics = json.loads((pruner / "metrics.json").read_text())
    assert 0 < metrics["handed_on_span_error"] < 1
    assert work.run(extract, layer=[9, -2], **seen) == 0
    assert "pruners: 1 published, 1 would run" in work.dry(train, layer=[9, -2], **seen)
    assert work.run(extract) == 0


def test_stages_without_tasks(work: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    assert work.dry(efficiency) == "no tasks: 2 rows are counted here, whenever the stage runs\n"
    assert work.run(efficiency) == 0
    assert "measures: 0 published, 1 would run" in work.dry(measure)
    assert work.run(measure) == 0
    before = work.state()
    assert report.main(work.root, dry=True) == 0
    assert capsys.readouterr().out == "no tasks: 2 rows of results are drawn here, whenever the stage runs\n"
    assert work.state() == before
    work.params({"keep": [12]})
    assert report.main(work.root, dry=True) == 0
    assert (
        "stage evaluate lacks 2 of its 3 results in the store: run `python pipelines/eval.py`"
        in capsys.readouterr().out
    )
