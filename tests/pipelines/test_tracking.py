"""MLflow: one run a fingerprint, whatever happens to the server, the driver or the ledger."""

import json
import socket
import sqlite3
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

from cluster import ClusterConfig
from pipelines import latency, tracking
from pipelines.params.load import load
from pipelines.spool import Dataset, Record, Series, Spool, curves
from pipelines.stage.context import ROOT, Stage

PRUNER = Record(
    fingerprint="0123456789abcdef01234567",
    kind="pruner",
    name="tiny-llava/layer_9",
    params={"layer": 9, "loss": "aw_mse", "slots": [16, 32, 48]},
    metrics={"val_loss": 0.25, "steps": 400},
    curves=[{"step": 0, "val_loss": 0.5}, {"step": 10, "val_loss": 0.25, "loss": 0.3}],
    tags={"pruner": "feed"},
)
SETTING = Record("89abcdef0123456789abcdef", "setting", "tiny-llava/random-16", {"keep": 16}, {"pope": 0.5})


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository whose sqlite store is made once: that takes mlflow many seconds. Tests use experiments of it."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def stage(home: Path, request: pytest.FixtureRequest) -> Stage:
    """A stage whose records go to an experiment of the test's own."""
    params = load(ROOT / "params.yaml")
    mlflow = params.mlflow.model_copy(update={"experiment": request.node.name})
    return Stage(
        "train",
        params.model_copy(update={"mlflow": mlflow}).seen_by("train"),
        home,
        ClusterConfig(store=home / "store"),
    )


def at(stage: Stage, uri: str, root: Path | None = None) -> Stage:
    """The same stage with another tracking address, in another repository if given."""
    params = load(ROOT / "params.yaml")
    mlflow = stage.params.mlflow.model_copy(update={"uri": uri})
    return replace(stage, params=params.model_copy(update={"mlflow": mlflow}).seen_by("train"), root=root or stage.root)


def runs(home: Path, experiment: str) -> dict[str, dict[str, Any]]:
    """Runs by fingerprint, read with sqlite3 and nothing of mlflow."""
    connection = sqlite3.connect(home / "mlflow.db")
    query = (
        "select r.run_uuid, r.name, r.status from runs r join experiments e using (experiment_id)"
        " where e.name = ? and r.lifecycle_stage = 'active'"
    )
    found = {}
    for run, name, status in connection.execute(query, (experiment,)).fetchall():

        def values(table: str, run: str = run) -> dict[str, Any]:
            return dict(connection.execute(f"select key, value from {table} where run_uuid = ?", (run,)).fetchall())

        history = connection.execute("select key, step, value from metrics where run_uuid = ?", (run,)).fetchall()
        tags = values("tags")
        assert tags["fingerprint"] not in found, "two runs of one fingerprint"
        found[tags["fingerprint"]] = {
            "run": run, "name": name, "status": status, "tags": tags, "params": values("params"),
            "metrics": values("latest_metrics"), "history": sorted(history),
        }  # fmt: skip
    connection.close()
    return found


def test_a_run_says_what_the_record_says(stage: Stage, home: Path) -> None:
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
    assert not (Path.cwd() / "mlruns").exists()


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


def closed_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


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


# --- Pruners as logged models, settings nested under them ------------------------------------------------------------

TOKENS = Dataset.of("tiny-llava, layer 9", ["shard"], "training", {"layer": 9})
POPE = Dataset.of("pope", "questions", "evaluation", {"sha256": "feed"})
TRAINED = replace(PRUNER, datasets=[TOKENS], measured_on={"val_loss": TOKENS.name})
OURS = Series(PRUNER.fingerprint, "pruner", PRUNER.name, {"layer": 9})
CSS = Series("c55" * 8, "method", "tiny-llava/css-layer_-2", {"method": "css", "layer": -2})


def setting(series: Series, keep: int, score: float) -> Record:
    """A setting of a series, better or worse."""
    return Record(
        fingerprint=f"{keep:08d}{series.fingerprint[:16]}", kind="setting", name=f"{series.name}-{keep}",
        params={"keep": keep}, metrics={"pope": score, "average_relative": 100 * score}, datasets=[POPE],
        measured_on={"pope": POPE.name, f"keep_{keep}/pope": POPE.name}, series=series,
        series_metrics={f"keep_{keep}/pope": score, f"keep_{keep}/average_relative": 100 * score},
    )  # fmt: skip


GRID = [setting(OURS, 16, 0.8), setting(OURS, 8, 0.7), setting(CSS, 16, 0.9), setting(CSS, 8, 0.6)]


def client_of(home: Path, stage: Stage) -> tuple[Any, str]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{home / 'mlflow.db'}")
    where = client.get_experiment_by_name(stage.params.mlflow.experiment)
    assert where is not None
    return client, where.experiment_id


def test_pruners_are_ranked_by_average_accuracy_at_a_budget(stage: Stage, home: Path) -> None:
    tracking.track(stage, [TRAINED])
    tracking.track(stage, GRID)
    client, experiment = client_of(home, stage)

    def ranked(metric: str) -> list[Any]:
        order = [{"field_name": f"metrics.{metric}", "ascending": False}]
        return list(client.search_logged_models([experiment], order_by=order))

    assert [one.name for one in ranked("keep_16/average_relative")] == ["tiny-llava_css-layer_-2", "tiny-llava_layer_9"]
    best = ranked("keep_8/average_relative")[0]
    assert (best.name, best.model_type, str(best.status)) == ("tiny-llava_layer_9", "pruner", "READY")
    assert best.params == {"layer": "9", "loss": "aw_mse", "slots": "[16, 32, 48]"}
    assert {one.key: (one.value, one.dataset_name, one.dataset_digest) for one in best.metrics} == {
        "val_loss": (0.25, TOKENS.name, TOKENS.digest), "steps": (400, None, None),
        "keep_16/pope": (0.8, "pope", POPE.digest), "keep_16/average_relative": (80, None, None),
        "keep_8/pope": (0.7, "pope", POPE.digest), "keep_8/average_relative": (70, None, None),
    }  # fmt: skip
    on_pope = {"dataset_name": "pope", "dataset_digest": POPE.digest}
    order = [{"field_name": "metrics.keep_16/pope", "ascending": True, **on_pope}]
    found = client.search_logged_models([experiment], order_by=order)
    assert [one.name for one in found] == ["tiny-llava_layer_9", "tiny-llava_css-layer_-2"]


def test_settings_are_nested_and_say_what_they_were_made_from(stage: Stage, home: Path) -> None:
    tracking.track(stage, [TRAINED])
    tracking.track(stage, GRID)
    client, experiment = client_of(home, stage)
    found = {run.data.tags["fingerprint"]: run for run in client.search_runs([experiment])}
    assert set(found) == {one.fingerprint for one in (*GRID, OURS, CSS)}
    assert {run.info.status for run in found.values()} == {"FINISHED"}
    for one in GRID:
        run, parent = found[one.fingerprint], found[one.series.fingerprint]
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        (data,) = run.inputs.dataset_inputs
        assert (data.dataset.name, data.dataset.digest) == ("pope", POPE.digest)
        assert json.loads(data.dataset.source) == {"sha256": "feed"}
        assert [(tag.key, tag.value) for tag in data.tags] == [("mlflow.data.context", "evaluation")]
        used = client.get_run(run.info.run_id).inputs.model_inputs
        assert [one.model_id for one in used] == [one.model_id for one in parent.outputs.model_outputs]
        assert "mlflow.parentRunId" not in parent.data.tags
        assert one.series_metrics.items() <= parent.data.metrics.items()
    assert found[CSS.fingerprint].data.params == {"method": "css", "layer": "-2"}
    assert found[OURS.fingerprint].inputs.dataset_inputs[0].dataset.digest == TOKENS.digest


def rows(home: Path) -> dict[str, int]:
    """How many rows each table has that a run or model writes to."""
    tables = ("runs", "metrics", "params", "tags", "inputs", "input_tags", "datasets", "logged_models",
              "logged_model_metrics", "logged_model_params", "logged_model_tags")  # fmt: skip
    with sqlite3.connect(home / "mlflow.db") as store:
        return {table: store.execute(f"select count(*) from {table}").fetchone()[0] for table in tables}


def test_a_lost_ledger_makes_no_second_model_either(stage: Stage, home: Path) -> None:
    for records in ([TRAINED], GRID):
        tracking.track(stage, records)
    before = rows(home)
    assert before["logged_models"] > 0
    (home / ".ocvtp/mlflow-spool/sent.json").unlink()
    for records in ([TRAINED], GRID):
        tracking.track(stage, records)
    assert rows(home) == before


def test_the_run_of_a_pruner_that_came_later_is_the_one_that_its_settings_made(stage: Stage, home: Path) -> None:
    tracking.track(stage, GRID[:1])
    client, experiment = client_of(home, stage)
    made = runs(home, stage.params.mlflow.experiment)[OURS.fingerprint]
    assert (made["status"], made["name"], made["params"]) == ("FINISHED", PRUNER.name, {"layer": "9"})
    tracking.track(stage, [TRAINED])
    found = runs(home, stage.params.mlflow.experiment)
    assert set(found) == {OURS.fingerprint, GRID[0].fingerprint}
    run = found[OURS.fingerprint]
    assert run["run"] == made["run"]
    assert ("curve.val_loss", 10, 0.25) in run["history"]
    (model,) = client.search_logged_models([experiment])
    assert model.params == run["params"] == {"layer": "9", "loss": "aw_mse", "slots": "[16, 32, 48]"}
    assert {one.key for one in model.metrics} == {"val_loss", "steps", "keep_16/pope", "keep_16/average_relative"}


def test_a_model_that_was_cut_off_is_finished(stage: Stage, home: Path) -> None:
    tracking.track(stage, [SETTING])  # makes the experiment
    client, experiment = client_of(home, stage)
    run = client.create_run(experiment, tags={"fingerprint": PRUNER.fingerprint})
    client.create_logged_model(experiment, "tiny-llava_layer_9", run.info.run_id)
    tracking.track(stage, [TRAINED])
    (model,) = client.search_logged_models([experiment])
    assert str(model.status) == "READY"
    assert model.params["loss"] == "aw_mse"
    assert [one.model_id for one in client.get_run(run.info.run_id).outputs.model_outputs] == [model.model_id]


# --- Reports as artifacts ---------------------------------------------------------------------------------------------


def test_a_report_waits_with_its_files_as_they_were(stage: Stage, home: Path, tmp_path: Path) -> None:
    page, picture = tmp_path / "index.html", tmp_path / "accuracy.png"
    page.write_text("first")
    picture.write_bytes(b"\x89PNG")
    report = Record("4e904", "report", "report", {}, {"settings": 3.0},
                    artifacts={"index.html": page, "figures/accuracy.png": picture})  # fmt: skip
    away = at(stage, f"http://127.0.0.1:{closed_port()}", tmp_path)
    tracking.track(away, [report])
    page.write_text("second")
    spool = Spool(tmp_path)
    assert len(list(spool.files.iterdir())) == 2
    assert tracking.sync(spool, f"sqlite:///{home / 'mlflow.db'}") == 1
    assert not spool.files.exists(), "what was sent is not kept twice"
    client, experiment = client_of(home, stage)
    (run,) = client.search_runs([experiment])
    assert [one.path for one in client.list_artifacts(run.info.run_id)] == ["figures", "index.html"]
    (tmp_path / "got").mkdir()
    assert Path(client.download_artifacts(run.info.run_id, "index.html", str(tmp_path / "got"))).read_text() == "first"
    assert [one.path for one in client.list_artifacts(run.info.run_id, "figures")] == ["figures/accuracy.png"]


def test_every_kind_of_run_names_the_script_that_makes_it(stage: Stage, home: Path) -> None:
    assert latency.KIND in tracking.SCRIPTS
    kinds = [kind for kind in tracking.SCRIPTS if kind != "method"]  # which only series have
    tracking.track(stage, [Record(f"f00d{kind}", kind, kind, {}, {}) for kind in kinds])
    found = {run["tags"]["kind"]: run["tags"] for run in runs(home, stage.params.mlflow.experiment).values()}
    assert set(found) == set(kinds)
    assert all((ROOT / tags["mlflow.source.name"]).is_file() for tags in found.values())


def test_what_an_older_spool_holds_is_sent(stage: Stage, home: Path, tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.add([SETTING], f"sqlite:///{home / 'mlflow.db'}", stage.params.mlflow.experiment, tmp_path)
    (path,) = spool.waiting
    line = json.loads(path.read_text())
    for key in ("datasets", "measured_on", "series", "series_metrics", "artifacts"):
        del line["record"][key]
    path.write_text(json.dumps(line) + "\n")
    assert tracking.sync(spool) == 1
    assert set(runs(home, stage.params.mlflow.experiment)) == {SETTING.fingerprint}
