"""MLflow: one run for each trained pruner and each evaluated setting, found again by its fingerprint, never made twice.

Only the driver writes, and only after the work is done; nothing that goes wrong here ends a stage. While the tracking
server is away records wait in the spool for the next run, or for `python pipelines/tracking.py sync`. The only module
that imports mlflow.
"""

import argparse
import logging
import os
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from pipelines.spool import SQLITE, Line, Record, Spool
from pipelines.stage.command import script
from pipelines.stage.context import ROOT, Stage, home_of

log = logging.getLogger(__name__)

PATIENCE = 1.0
"""Seconds that a server may take to say that it is there."""
MOST_METRICS, MOST_PARAMS = 1000, 100
"""What a server takes in one batch."""
SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
}
"""Of mlflow's client, which else waits for minutes; the environment may say otherwise."""


def track(run: Stage, records: Sequence[Record]) -> None:
    """Record runs: those that say something new are spooled and sent. Never raises for what goes wrong there."""
    if not run.params.mlflow.enabled:
        return
    spool = Spool(home_of(run.root.resolve()))
    try:
        spool.add(records, run.params.mlflow.uri, run.params.mlflow.experiment, run.root)
        sync(spool)
    except Exception as error:  # whatever goes wrong in tracking, the results are there
        log.warning("mlflow: %s; runs wait in %s", " ".join(str(error).split())[:300], spool.folder)
        log.debug("mlflow", exc_info=True)


def sync(spool: Spool, uri: str | None = None) -> int:
    """Send what waits; returns how many records went out."""
    return spool.deliver(lambda target, lines: _send(target, lines, spool), uri)


def reachable(uri: str) -> bool:
    """Whether a server answers soon. A store in a file always does."""
    if not uri.startswith(("http://", "https://")):
        return True
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=PATIENCE) as answer:  # noqa: S310 - http only
            return bool(answer.status == 200)
    except (OSError, ValueError):  # refused, no such host, too slow, an error of the server
        return False


def _send(uri: str, lines: Sequence[Line], spool: Spool) -> bool:
    """Send records; False if the server is away."""
    if not reachable(uri):
        log.warning("mlflow: %s does not answer; runs wait in %s for the next run to send them", uri, spool.folder)
        return False
    for key, value in SETTINGS.items():
        os.environ.setdefault(key, value)
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    # Nothing is stored as a file; without a place of its own, mlflow would make one in the present folder.
    files = (spool.home / "mlruns").as_uri() if uri.startswith(SQLITE) else None
    experiments = {name: _experiment(client, name, files) for name in {str(line["experiment"]) for line in lines}}
    for line in lines:
        _send_one(client, experiments[line["experiment"]], line)
    return True


def _experiment(client: Any, name: str, files: str | None) -> str:
    """Its id; it is made, or brought back, if need be."""
    found = client.get_experiment_by_name(name)
    if found is None:
        return str(client.create_experiment(name, artifact_location=files))
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return str(found.experiment_id)


def _send_one(client: Any, experiment: str, line: Line) -> None:
    """Make the run, or bring the one that there is up to date; one that was cut off is finished."""
    from mlflow.entities import Metric, Param

    record, when = line["record"], line["time"]
    run = _run(client, experiment, line)
    unfinished = run.info.status != "FINISHED"
    params = [Param(key, str(value)) for key, value in record["params"].items() if key not in run.data.params]
    metrics = [
        Metric(key, value, when, 0) for key, value in record["metrics"].items() if run.data.metrics.get(key) != value
    ]
    if unfinished:
        metrics += [
            Metric(f"curve.{key}", value, when, int(row["step"]))
            for row in record["curves"]
            for key, value in row.items()
            if key != "step"
        ]
    for start in range(0, len(params), MOST_PARAMS):
        client.log_batch(run.info.run_id, params=params[start : start + MOST_PARAMS])
    for start in range(0, len(metrics), MOST_METRICS):
        client.log_batch(run.info.run_id, metrics=metrics[start : start + MOST_METRICS])
    if unfinished:
        client.set_terminated(run.info.run_id, "FINISHED", end_time=when)


def _run(client: Any, experiment: str, line: Line) -> Any:
    """The run of a fingerprint, a new one if there is none."""
    record = line["record"]
    found = client.search_runs([experiment], f"tags.fingerprint = '{record['fingerprint']}'", max_results=1)
    if found:
        return found[0]
    tags = {
        "fingerprint": record["fingerprint"],
        "kind": record["kind"],
        "mlflow.source.name": f"pipelines/{'train' if record['kind'] == 'pruner' else 'eval'}.py",
        **line["tags"],
        **{key: value for key, value in record["tags"].items() if value},
    }
    return client.create_run(experiment, start_time=line["time"], tags=tags, run_name=record["name"])


def main(arguments: Sequence[str] | None = None) -> int:
    """`python pipelines/tracking.py sync`; returns 0 if nothing waits any more, else 1."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("sync", help="send the runs that wait because the tracking server was away")
    command.add_argument("--uri", help="send them there, instead of to where they were meant to go")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    spool = Spool(home_of(ROOT))
    sent = sync(spool, options.uri)
    left = len(spool.waiting)
    log.info("mlflow: %d runs sent%s", sent, f"; {left} files of runs still wait in {spool.folder}" if left else "")
    return 1 if left else 0


if __name__ == "__main__":
    script("pipelines.tracking")
