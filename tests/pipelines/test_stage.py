"""What all stages share: exit codes, messages, where things are, and scripts that run from anywhere."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import BadTask, CorruptResult, Interrupted, TasksFailed
from ocvtp.errors import BadInput, Corrupt, Incompatible, NotAvailable
from ocvtp.tokens.writer import DiskFull
from pipelines import efficiency, extract, measure, sample, train
from pipelines import eval as evaluate
from pipelines.stage.command import explain
from pipelines.stage.context import ROOT, home_of, open_stage


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (BadInput("x"), 2), (Incompatible("x"), 2), (NotAvailable("x"), 2), (BadTask("x"), 2), (DiskFull("x"), 2),
        (TasksFailed("x"), 1), (CorruptResult("x"), 1), (Corrupt("x"), 1), (OSError("x"), 1),
        (KeyboardInterrupt(), 130), (Interrupted(2), 130), (Interrupted(15), 143),
    ],
)  # fmt: skip
def test_exit_codes(error: BaseException, code: int) -> None:
    assert explain("train", error) == code


def test_a_mistake_is_one_message_without_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "params.yaml"
    path.write_text("kep: 16\n")
    assert train.main(["--params", str(path)]) == 2
    printed = capsys.readouterr()
    assert "train: params.yaml: an entry is wrong\n  kep: unknown key; did you mean keep?" in printed.err
    assert "Traceback" not in printed.err + printed.out


@pytest.mark.parametrize("module", [sample, extract, train, evaluate, measure, efficiency])
def test_help(module, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        module.main(["--help"])
    assert caught.value.code == 0
    assert "Stage `" in capsys.readouterr().out


def test_an_input_that_is_missing_is_named_with_the_command_that_makes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OCVTP_ROOT", str(tmp_path))
    for module, maker in ((extract, "sample"), (train, "extract"), (evaluate, "train")):
        assert module.main([]) == 2
        assert f"run `python pipelines/{maker}.py` or `dvc repro` first" in capsys.readouterr().err
    assert list(tmp_path.rglob("*.json")) == []


def test_fail_fast_can_be_asked_for() -> None:
    assert open_stage("sample", fail_fast=True).params.cluster.fail_fast
    assert not open_stage("sample").params.cluster.fail_fast


def test_where_things_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / ".dvc/tmp/exps/standalone/tmpabc"
    assert home_of(copy) == tmp_path
    assert home_of(tmp_path) == tmp_path
    monkeypatch.delenv("OCVTP_STORE", raising=False)
    assert open_stage("sample", root=copy).store.root == tmp_path / ".ocvtp/store"
    monkeypatch.setenv("OCVTP_ROOT", str(tmp_path / "shared"))
    assert open_stage("sample").root == tmp_path / "shared"
    assert open_stage("sample").store.root == tmp_path / "shared/.ocvtp/store"
    monkeypatch.setenv("OCVTP_STORE", str(tmp_path / "elsewhere"))
    assert open_stage("sample").store.root == tmp_path / "elsewhere"
    monkeypatch.setenv("DVC_STAGE", "sample")  # DVC's outputs lie in its own workspace
    assert open_stage("sample").root == ROOT


@pytest.mark.pipeline
def test_a_script_runs_in_a_copy_of_the_repository_and_uses_the_code_there(tmp_path: Path) -> None:
    copy = tmp_path / "a copy; of it"
    for name in ("cluster", "ocvtp", "pipelines"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    text = (
        (ROOT / "params.yaml")
        .read_text()
        .replace("images: 2048", "images: 6")
        .replace("questions: 400", "questions: 4")
    )
    (copy / "params.yaml").write_text(text)
    script = copy / "pipelines/sample.py"
    script.write_text(script.read_text().replace("CHUNK = 512", "CHUNK = 2"))
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("OCVTP_", "DVC_", "PYTHONPATH"))
    }
    done = subprocess.run(
        [sys.executable, "pipelines/sample.py"], cwd=copy, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (copy / "data/sample/images.json").is_file()
    assert len(list((copy / ".ocvtp/store/scenes").glob("[!.]*"))) == 3
