"""MLflow: one run a fingerprint, whatever happens to the server, the driver or the ledger."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tracked import PRUNER, SETTING, at, closed_port, runs

from pipelines import tracking
from pipelines.params.load import load
from pipelines.spool import Spool, curves
from pipelines.stage.context import ROOT, Stage


def test_a_run_says_what_the_record_says(
    stage: Stage, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tracking.track(stage, [PRUNER, SETTING])
    found = runs(home, stage.params.mlflow.experiment)
    assert set(found) == {PRUNER.fingerprint, SETTING.fingerprint}
    run = found[PRUNER.fingerprint]
    assert run["params"] == {"layer": "9", "loss": "aw_mse", "slots": "[16, 32, 48]"}
    assert run["metrics"]["val_loss"] == 0.25
    assert ("curve.val_loss", 10, 0.25) in run["history"]
    assert len(run["history"]) == 2 + 3
    assert (run["status"], run["name"], run["tags"]["pruner"]) == ("FINISHED", PRUNER.name, "feed")
    assert Spool(home).waiting == []
    assert list(tmp_path.iterdir()) == [], "mlflow writes where the store is"


def test_the_same_again_makes_no_second_run_and_does_not_import_mlflow(
    stage: Stage, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracking.track(stage, [SETTING])
    before = runs(home, stage.params.mlflow.experiment)
    monkeypatch.setitem(sys.modules, "mlflow", None)  # an import of it would fail, and leave a file in the spool
    tracking.track(stage, [SETTING])
    assert Spool(home).waiting == []
    assert runs(home, stage.params.mlflow.experiment) == before


def test_a_lost_ledger_makes_no_second_run_either(stage: Stage, home: Path) -> None:
    tracking.track(stage, [PRUNER])
    before = runs(home, stage.params.mlflow.experiment)
    (home / ".ocvtp/mlflow-spool/sent.json").unlink()
    tracking.track(stage, [PRUNER])
    assert runs(home, stage.params.mlflow.experiment) == before


def test_another_benchmark_goes_to_the_same_run(stage: Stage, home: Path) -> None:
    tracking.track(stage, [SETTING])
    tracking.track(stage, [replace(SETTING, metrics={"pope": 0.5, "gqa": 0.75})])
    (run,) = runs(home, stage.params.mlflow.experiment).values()
    assert run["metrics"] == {"pope": 0.5, "gqa": 0.75}
    assert len(run["history"]) == 2  # pope was not logged again


def test_a_run_that_was_cut_off_is_finished(stage: Stage, home: Path) -> None:
    from mlflow import MlflowClient

    experiment = stage.params.mlflow.experiment
    client = MlflowClient(tracking_uri=f"sqlite:///{home / 'mlflow.db'}")
    tracking.track(stage, [SETTING])  # makes the experiment
    where = client.get_experiment_by_name(experiment)
    assert where is not None
    cut_off = client.create_run(where.experiment_id, tags={"fingerprint": PRUNER.fingerprint})
    client.log_param(cut_off.info.run_id, "layer", 9)
    tracking.track(stage, [PRUNER])
    run = runs(home, experiment)[PRUNER.fingerprint]
    assert (run["run"], run["status"]) == (cut_off.info.run_id, "FINISHED")
    assert run["params"]["loss"] == "aw_mse"
    assert len(run["history"]) == 5


def test_an_experiment_that_was_deleted_is_brought_back(stage: Stage, home: Path) -> None:
    from mlflow import MlflowClient

    tracking.track(stage, [SETTING])
    client = MlflowClient(tracking_uri=f"sqlite:///{home / 'mlflow.db'}")
    where = client.get_experiment_by_name(stage.params.mlflow.experiment)
    assert where is not None
    client.delete_experiment(where.experiment_id)
    tracking.track(stage, [PRUNER])
    assert PRUNER.fingerprint in runs(home, stage.params.mlflow.experiment)


def test_a_server_that_is_away_costs_nothing_and_gets_its_runs_later(
    stage: Stage, home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    elsewhere = at(stage, f"http://127.0.0.1:{closed_port()}", tmp_path)
    started = time.monotonic()
    tracking.track(elsewhere, [PRUNER, SETTING])
    tracking.track(elsewhere, [replace(SETTING, metrics={"pope": 0.75})])
    assert time.monotonic() - started < 2
    assert "does not answer" in caplog.text
    spool = Spool(tmp_path)
    assert len(spool.waiting) == 2
    # Later, the same records at an address that answers.
    assert tracking.sync(spool, f"sqlite:///{home / 'mlflow.db'}") == 3
    assert spool.waiting == []
    found = runs(home, stage.params.mlflow.experiment)
    assert set(found) == {PRUNER.fingerprint, SETTING.fingerprint}
    assert found[SETTING.fingerprint]["metrics"] == {"pope": 0.75}  # the newest, although it was spooled last


def test_the_command_sends_what_waits_and_says_what_is_left(
    stage: Stage, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "ROOT", tmp_path)
    assert tracking.main(["sync"]) == 0  # nothing waits
    tracking.track(at(stage, f"http://127.0.0.1:{closed_port()}", tmp_path), [PRUNER])
    assert tracking.main(["sync"]) == 1
    assert tracking.main(["sync", "--uri", f"sqlite:///{home / 'mlflow.db'}"]) == 0
    assert set(runs(home, stage.params.mlflow.experiment)) == {PRUNER.fingerprint}


@pytest.fixture(params=["error", "silence"])
def sick_server(request: pytest.FixtureRequest) -> Iterator[str]:
    """A server that answers everything with 500, or takes a call and never answers."""
    stop = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if request.param == "silence":
                stop.wait(20)
            self.send_error(500)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    stop.set()
    server.shutdown()
    server.server_close()


def test_a_sick_server_holds_nobody_up(stage: Stage, tmp_path: Path, sick_server: str) -> None:
    started = time.monotonic()
    tracking.track(at(stage, sick_server, tmp_path), [PRUNER])
    assert time.monotonic() - started < 2
    assert len(Spool(tmp_path).waiting) == 1


def test_whatever_mlflow_raises_the_stage_goes_on(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    tracking.track(at(stage, "sqlite:///mlflow.db", tmp_path), [PRUNER])
    assert "runs wait in" in caplog.text
    assert len(Spool(tmp_path).waiting) == 1


def test_switched_off_it_writes_nothing(stage: Stage, tmp_path: Path) -> None:
    params = load(ROOT / "params.yaml")
    off = params.model_copy(update={"mlflow": params.mlflow.model_copy(update={"enabled": False})}).seen_by("train")
    tracking.track(replace(stage, params=off, root=tmp_path), [PRUNER])
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_was_removed_gets_everything_again(stage: Stage, tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    store = tmp_path / "other.db"
    sent: list[str] = []

    def send(uri: str, lines: Any) -> bool:
        store.touch()
        sent.extend(line["record"]["fingerprint"] for line in lines)
        return True

    for _ in range(2):
        spool.add([PRUNER], "sqlite:///other.db", "e", tmp_path)
        spool.deliver(send)
    assert len(sent) == 1
    store.unlink()
    spool.add([PRUNER], "sqlite:///other.db", "e", tmp_path)
    spool.deliver(send)
    assert len(sent) == 2


def test_experiments_of_dvc_share_the_repository(stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / ".dvc" / "tmp" / "exps" / "standalone" / "tmpx1"
    copy.mkdir(parents=True)
    monkeypatch.setenv("DVC_EXP_NAME", "loss-mse")
    monkeypatch.setenv("DVC_EXP_BASELINE_REV", "c0ffee")
    tracking.track(at(stage, f"http://127.0.0.1:{closed_port()}", copy), [PRUNER])
    (path,) = Spool(tmp_path).waiting
    line = json.loads(path.read_text())
    assert line["tags"] == {"git_commit": "c0ffee", "mlflow.source.git.commit": "c0ffee", "dvc_experiment": "loss-mse"}


def test_the_commit_is_a_tag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DVC_EXP_BASELINE_REV", raising=False)
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
        git = ["git", "-c", "user.name=t", "-c", "user.email=t@localhost", *command]
        subprocess.run(git, cwd=tmp_path, check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tmp_path, capture_output=True, text=True, check=True)
    spool = Spool(tmp_path)
    spool.add([PRUNER], "sqlite:///x.db", "e", tmp_path)
    assert json.loads(spool.waiting[0].read_text())["tags"]["git_commit"] == head.stdout.strip()


def test_curves_leave_out_what_is_no_number(tmp_path: Path) -> None:
    path = tmp_path / "curves.csv"
    path.write_text("step,loss,val_loss\n0,,0.5\n10,0.25,nan\n")
    assert curves(path) == [{"step": 0.0, "val_loss": 0.5}, {"step": 10.0, "loss": 0.25}]
