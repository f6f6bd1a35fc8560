"""`python -m pipelines`: `python -m cluster`, told where the store is and what is in use."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.driver.lock import run_lock
from cluster.store.layout import MANIFEST
from cluster.store.publish import About, File, Manifest
from pipelines.__main__ import main


def publish(store: Path, kind: str, key: str, content: bytes) -> Path:
    folder = store / kind / key
    folder.mkdir(parents=True)
    (folder / "result.bin").write_bytes(content)
    about = About(key=key, kind=kind, call="m.f", spec={}, code="1", part="")
    file = File("result.bin", hashlib.sha256(content).hexdigest(), len(content))
    (folder / MANIFEST).write_text(Manifest(about, (file,)).to_text())
    return folder


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Outputs and a store: one result held by an output, one named in one, one of no use."""
    store = tmp_path / ".ocvtp" / "store"
    publish(store, "models", "aaaa1111", b"weights of a pruner")
    publish(store, "tokens", "bbbb2222", b"tokens of a shard")
    publish(store, "tokens", "cccc3333", b"tokens of an earlier grid")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "model.safetensors").write_bytes(b"weights of a pruner")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "layer_9.json").write_text('{"shards": [{"path": "tokens/bbbb2222/result.bin"}]}')
    monkeypatch.setenv("OCVTP_ROOT", str(tmp_path))
    monkeypatch.delenv("OCVTP_STORE", raising=False)
    monkeypatch.delenv("DVC_STAGE", raising=False)
    return tmp_path


def said(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


def test_the_store_of_the_params_is_verified(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["verify", "--json"]) == 0
    store = str(work / ".ocvtp" / "store")
    assert said(capsys) == {"store": store, "checked": 3, "bytes": 61, "corrupt": {}}
    monkeypatch.setenv("OCVTP_STORE", "/nowhere")
    assert main(["verify"]) == 2
    assert "there is no store at /nowhere" in capsys.readouterr().err
    assert main(["verify", "--store", store]) == 0


def test_clean_lists_first_and_drops_only_what_nothing_refers_to(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = work / ".ocvtp" / "store"
    assert main(["clean", "--json"]) == 0
    assert said(capsys)["unused"] == ["tokens/cccc3333"]
    assert (store / "tokens" / "cccc3333").exists()
    stale = store / "locks" / "train.json"  # of a run that was killed
    stale.parent.mkdir()
    stale.write_text('{"run": "r0"}')
    assert main(["clean", "--yes", "--json", "--wait", "0"]) == 0
    assert said(capsys)["dropped"] is True
    assert not stale.exists()
    assert [path.name for path in (store / "tokens").iterdir()] == ["bbbb2222"]
    assert (store / "models" / "aaaa1111" / "result.bin").exists()


def test_clean_spares_what_an_experiment_in_a_copy_of_the_repository_uses(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = work / ".dvc" / "tmp" / "exps" / "standalone" / "tmp123"
    (copy / "data").mkdir(parents=True)
    (copy / "dvc.yaml").touch()
    (copy / "data" / "layer_10.json").write_text('{"shards": [{"path": "tokens/cccc3333/result.bin"}]}')
    assert main(["clean", "--json"]) == 0
    assert said(capsys)["unused"] == []


def test_clean_drops_nothing_beside_a_run_or_without_outputs(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = work / ".ocvtp" / "store"
    with run_lock(store / "locks", "train", "r1", "refuse"):
        assert main(["clean", "--yes", "--wait", "0"]) == 2
    error = capsys.readouterr().err
    assert "run r1 on" in error
    assert "is at work in this store" in error
    bare = tmp_path / "bare"
    bare.mkdir()
    monkeypatch.setenv("OCVTP_ROOT", str(bare))
    assert main(["clean", "--yes", "--store", str(store)]) == 1
    assert "holds no outputs of stages" in capsys.readouterr().err
    assert (store / "tokens" / "cccc3333").exists()


def test_push_and_pull_use_the_second_place_of_the_params(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    params = tmp_path / "params.yaml"
    text = (Path(__file__).parents[2] / "params.yaml").read_text()
    assert "remote: null" in text
    params.write_text(text.replace("remote: null", f"remote: file://{tmp_path}/second"))
    monkeypatch.setattr("pipelines.stage.context.PARAMS", params)
    assert main(["push", "--json"]) == 0
    assert said(capsys)["pushed"] == ["models/aaaa1111", "tokens/bbbb2222", "tokens/cccc3333"]
    assert main(["pull", "tokens", "--json", "--store", str(tmp_path / "other")]) == 0
    assert said(capsys)["pulled"] == ["tokens/bbbb2222", "tokens/cccc3333"]
    monkeypatch.setattr("pipelines.stage.context.PARAMS", Path(__file__).parents[2] / "params.yaml")
    with pytest.raises(SystemExit):
        main(["push"])
    assert "required: --remote" in capsys.readouterr().err


def test_it_runs_as_a_module_and_names_its_commands(work: Path) -> None:
    for arguments in ((), ("--help",)):
        done = subprocess.run(
            [sys.executable, "-m", "pipelines", *arguments],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parents[2],
            env=dict(os.environ),
            check=False,
        )
        assert done.returncode == 0, done.stderr
        for command in ("plan", "status", "results", "verify", "clean", "push", "pull"):
            assert f"\n    {command} " in done.stdout
