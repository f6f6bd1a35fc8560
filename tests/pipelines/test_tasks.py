"""Workers refuse what is not what the key of their task says; keys cover the data that tasks read."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cluster.fingerprint import parts
from ocvtp.errors import Incompatible
from ocvtp.evaluation import setting
from ocvtp.vlms import resolve
from pipelines.stage.context import ROOT
from pipelines.tasks import tokens as tokens_module
from pipelines.tasks.answers import answers, asked
from pipelines.tasks.scores import scored, scores
from pipelines.tasks.tokens import tokens

COMMON: dict[str, Any] = {"dtype": "float32", "compute_dtype": "float32", "batch_size": 2}


@pytest.fixture
def vlm(tmp_path: Path) -> Path:
    setting.forget()
    tokens_module._vlm.cache_clear()
    return Path(shutil.copytree(ROOT / "ocvtp/vlms/tiny_llava", tmp_path / "vlm"))


def edit(vlm: Path) -> None:
    path = vlm / "chat_template.jinja"
    path.write_text(path.read_text() + " ")


def test_tokens_of_another_vlm_than_planned_are_refused(vlm: Path, tmp_path: Path) -> None:
    spec = {**COMMON, "vlm": str(vlm), "model": resolve(vlm).identity}
    edit(vlm)
    with pytest.raises(Incompatible, match=r"\(files.chat_template.jinja\)"):
        tokens(spec, tmp_path, {})


def test_answers_of_another_vlm_than_planned_are_refused(vlm: Path, tmp_path: Path) -> None:
    spec = {**COMMON, "vlm": str(vlm), "model": resolve(vlm).identity, "benchmark": "pope", "protocol": "native",
            **asked("pope", "native")}  # fmt: skip
    edit(vlm)
    with pytest.raises(Incompatible, match=r"\(files.chat_template.jinja\)"):
        answers(spec, tmp_path, {"pruner": None, "data": None})


def test_answers_to_another_benchmark_than_planned_are_refused(tmp_path: Path) -> None:
    said = asked("pope", "native")
    spec = {
        "benchmark": "pope",
        "protocol": "native",
        "task": {**said["task"], "split": "other"},
        "lmms_eval": said["lmms_eval"],
    }
    assert json.loads(json.dumps(said)) == said
    with pytest.raises(Incompatible, match=r"pope here is not what the task was planned for \(task.split\)"):
        answers(spec, tmp_path, {})


@pytest.fixture
def changed(tmp_path: Path) -> dict[str, Any]:
    """Answers to be scored in a store whose questions, masks and pruner are not those that were planned with."""
    for name in ("questions/k/pope.parquet", "questions/k/scenes.json", "pruners/k/config.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("other")
    there = hashlib.sha256(b"other").hexdigest()
    asking = {"benchmark": "pope", "protocol": "native", **asked("pope", "native"), "data": there, "pruner": None}
    return {"answers": asking, "masks": there, **scored("pope", "native")}


INPUTS: dict[str, Any] = {"data": "questions/k", "pruner": None, "answers": []}


def test_answers_to_questions_other_than_planned_are_refused(changed: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "answers/k/result"
    with pytest.raises(Incompatible, match=r"pope.parquet has changed since the task was planned \(SHA-256 differs\)"):
        answers({**changed["answers"], "data": "0" * 64}, folder, INPUTS)
    with pytest.raises(Incompatible, match=r"config.json has changed since the task was planned"):
        answers({**changed["answers"], "pruner": {"config.json": "0" * 64}}, folder, {**INPUTS, "pruner": "pruners/k"})
    with pytest.raises(Incompatible, match=r"model.safetensors has changed since"):
        answers(
            {**changed["answers"], "pruner": {"model.safetensors": "0" * 64}}, folder, {**INPUTS, "pruner": "pruners/k"}
        )


def test_scores_on_questions_or_masks_other_than_planned_are_refused(changed: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "scores/k/result"
    with pytest.raises(Incompatible, match=r"pope.parquet has changed since the task was planned"):
        scores({**changed, "answers": {**changed["answers"], "data": "0" * 64}}, folder, INPUTS)
    with pytest.raises(Incompatible, match=r"scenes.json has changed since the task was planned"):
        scores({**changed, "masks": "0" * 64}, folder, INPUTS)


def test_scores_know_nothing_of_how_answers_are_made_and_the_other_way_round() -> None:
    """So a new metric asks nothing again, and scoring needs no VLM."""
    asking, scoring = (set(parts(f"pipelines.tasks.{name}")) for name in ("answers", "scores"))
    made = {part for part in scoring if part.startswith(("ocvtp.vlms", "ocvtp.pruning", "ocvtp.methods"))}
    assert made | (scoring & {"ocvtp.evaluation.generate", "ocvtp.evaluation.setting"}) == set()
    assert asking & {"ocvtp.evaluation.scores", "ocvtp.evaluation.score", "ocvtp.evaluation.lmms.outcome"} == set()


@pytest.mark.parametrize(
    "name", ["answers", "copies", "pruners", "questions", "restored", "scenes", "scores", "tokens"]
)
def test_a_task_reads_no_data_of_the_package_that_its_key_misses(name: str) -> None:
    """Tables of entries are in specs, entry by entry; each other file that is read would be a part."""
    covered = parts(f"pipelines.tasks.{name}")
    assert [part for part in covered if ":" in part] == []
    for module in (part for part in covered if part.startswith("ocvtp.")):
        path = ROOT / (module.replace(".", "/") + ".py")
        text = path.read_text() if path.is_file() else ""
        if "importlib.resources" in text or "__file__" in text:
            assert module in ("ocvtp.vlms.catalogue", "ocvtp.evaluation.benchmarks")
            assert "DATA_IN_SPECS" in text
