"""Records that tests of MLflow track, and how its store is read."""

import socket
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipelines.params.load import load
from pipelines.spool import Record
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


def closed_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
