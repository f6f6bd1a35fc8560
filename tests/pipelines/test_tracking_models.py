"""MLflow: pruners as logged models, settings nested under them, data sets and reports."""

import json
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

from tracked import PRUNER, SETTING, at, closed_port, runs

from pipelines import latency, tracking
from pipelines.spool import Dataset, Record, Series, Spool
from pipelines.stage.context import ROOT, Stage

TOKENS = Dataset.of("tiny-llava, layer 9", ["shard"], "training", {"layer": 9})
POPE = Dataset.of("pope", "questions", "evaluation", {"sha256": "feed"})
TRAINED = replace(PRUNER, datasets=[TOKENS], measured_on={"val_loss": TOKENS.name})
OURS = Series(PRUNER.fingerprint, "pruner", PRUNER.name, {"layer": 9})
CSS = Series("c55" * 8, "method", "tiny-llava/css-layer_-2", {"method": "css", "layer": -2})


def setting(series: Series, keep: int, score: float) -> Record:
    """A setting of a series, better or worse."""
    return Record(
        fingerprint=f"{keep:08d}{series.fingerprint[:16]}", kind="setting", name=f"{series.name}-{keep}",
        params={"keep": keep}, metrics={"pope": score, "average_relative-pope": 100 * score}, datasets=[POPE],
        measured_on={"pope": POPE.name, f"keep_{keep}/pope": POPE.name}, series=series,
        series_metrics={f"keep_{keep}/pope": score, f"keep_{keep}/average_relative-pope": 100 * score},
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

    assert [one.name for one in ranked("keep_16/average_relative-pope")] == [
        "tiny-llava_css-layer_-2",
        "tiny-llava_layer_9",
    ]
    best = ranked("keep_8/average_relative-pope")[0]
    assert (best.name, best.model_type, str(best.status)) == ("tiny-llava_layer_9", "pruner", "READY")
    assert best.params == {"layer": "9", "loss": "aw_mse", "slots": "[16, 32, 48]"}
    assert {one.key: (one.value, one.dataset_name, one.dataset_digest) for one in best.metrics} == {
        "val_loss": (0.25, TOKENS.name, TOKENS.digest), "steps": (400, None, None),
        "keep_16/pope": (0.8, "pope", POPE.digest), "keep_16/average_relative-pope": (80, None, None),
        "keep_8/pope": (0.7, "pope", POPE.digest), "keep_8/average_relative-pope": (70, None, None),
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


def test_benchmarks_that_are_asked_later_bring_their_data_sets(stage: Stage, home: Path) -> None:
    """Two lists of benchmarks, one after the other: one run, with the data sets and averages of both."""
    (first, gqa) = (setting(CSS, 16, 0.9), Dataset.of("gqa", "others", "evaluation", {"sha256": "beef"}))
    both = {"pope": 0.9, "gqa": 0.5, "average_relative-gqa-pope": 70.0}
    later = replace(
        first, datasets=[POPE, gqa], metrics=both, measured_on={"pope": "pope", "keep_16/gqa": "gqa"},
        series_metrics={f"keep_16/{name}": value for name, value in both.items()},
    )  # fmt: skip
    for number, record in enumerate((first, later, first)):
        tracking.track(stage, [replace(record, tags={"time": str(number)})])
    client, experiment = client_of(home, stage)
    found = {run.data.tags["fingerprint"]: run for run in client.search_runs([experiment])}
    run = found[first.fingerprint]
    assert sorted(one.dataset.name for one in run.inputs.dataset_inputs) == ["gqa", "pope"]
    averages = {name: value for name, value in found[CSS.fingerprint].data.metrics.items() if "average" in name}
    assert averages == {"keep_16/average_relative-pope": 90, "keep_16/average_relative-gqa-pope": 70}
    assert len(client.get_run(run.info.run_id).inputs.model_inputs) == 1


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
    assert {one.key for one in model.metrics} == {"val_loss", "steps", "keep_16/pope", "keep_16/average_relative-pope"}


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
