"""MLflow: one run for each trained pruner and each evaluated setting, found again by its fingerprint, never made twice.

The settings that a trained pruner, or a method without one, was evaluated in are nested under its run, and its logged
model has the metrics of all of them, each with the dataset that it was measured on: so pruners can be ranked. Each
report is a run, too, with its page and pictures as artifacts.

Only the driver writes, and only after the work is done; nothing that goes wrong here ends a stage. While the tracking
server is away records wait in the spool for the next run, or for `python pipelines/tracking.py sync`. The only module
that imports mlflow.
"""

import argparse
import logging
import os
import re
import shutil
import sys
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from ocvtp.errors import BadInput
from pipelines.spool import SQLITE, Dataset, Line, Record, Series, Spool
from pipelines.stage.command import script
from pipelines.stage.context import PARAMS, ROOT, Stage, home_of, open_stage

log = logging.getLogger(__name__)

PATIENCE = 1.0
"""Seconds that a server may take to say that it is there."""
MOST_METRICS, MOST_PARAMS = 800, 100
"""In one batch: a server takes 1000 metrics, params and tags together."""
KIND, MODELS = "mlflow.experimentKind", "custom_model_development"
PARENT, CONTEXT = "mlflow.parentRunId", "mlflow.data.context"
SCRIPTS = {"pruner": "train", "method": "eval", "setting": "eval", "report": "report", "latency": "latency"}
"""Kind of a run -> what makes it."""
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


def track_at(root: Path, stage: str, records: Sequence[Record]) -> None:
    """As `track`, for a stage that reads no params: those of `root` say where, and without any nothing is tracked."""
    if not (root / PARAMS.name).is_file():
        return
    try:
        run = open_stage(stage, root / PARAMS.name, root)
    except BadInput as error:
        log.warning("mlflow: %s is not tracked: %s", stage, error)
        return
    track(run, records)


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
    # Without a place of its own for artifacts, mlflow would make one in the present folder.
    files = (spool.home / "mlruns").as_uri() if uri.startswith(SQLITE) else None
    names = {str(line["experiment"]) for line in lines}
    experiments = {name: _Experiment(client, _experiment(client, name, files)) for name in names}
    for line in lines:
        experiments[line["experiment"]].send(Record.read(line["record"], spool.files), line)
    for experiment in experiments.values():
        experiment.finish()
    return True


def _experiment(client: Any, name: str, files: str | None) -> str:
    """Its id; it is made, or brought back, if need be. MLflow's UI then has pages for models, not for agents."""
    found = client.get_experiment_by_name(name)
    if found is None:
        return str(client.create_experiment(name, files, {KIND: MODELS}))
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    if KIND not in found.tags:
        client.set_experiment_tag(found.experiment_id, KIND, MODELS)
    return str(found.experiment_id)


@dataclass
class _Parent:
    """The run of a series, its logged model, and what its budgets say: name -> value, time, dataset."""

    run: Any
    model: str
    metrics: dict[str, tuple[float, int, Dataset | None]] = field(default_factory=dict)


class _Experiment:
    """An experiment of a tracking server, and the runs of series that were looked up there."""

    def __init__(self, client: Any, identity: str) -> None:
        self._client, self._id, self._parents = client, identity, dict[str, _Parent]()

    def send(self, record: Record, line: Line) -> None:
        """Make the run, or bring the one that there is up to date; one that was cut off is finished."""
        when = line["time"]
        parent = None if record.series is None else self._parent(record.series, line)
        tags = {**record.tags, PARENT: parent.run.info.run_id if parent else ""}
        run, new = self._run(record, line, tags)
        model = self._model(run, record, new=new) if record.kind == "pruner" else None
        data = {one.name: one for one in record.datasets}
        on = {key: data[name] for key, name in record.measured_on.items()}
        metrics = [
            self._metric(key, value, when, model, on.get(key))
            for key, value in record.metrics.items()
            if run.data.metrics.get(key) != value
        ]
        unfinished = run.info.status != "FINISHED"
        if unfinished or not any(key.startswith("curve.") for key in run.data.metrics):
            metrics += [
                self._metric(f"curve.{key}", value, when, step=int(row["step"]))
                for row in record.curves
                for key, value in row.items()
                if key != "step"
            ]
        self._log(run, record.params, metrics, tags)
        there = {(one.dataset.name, one.dataset.digest) for one in run.inputs.dataset_inputs} if run.inputs else set()
        if new_ones := [one for one in record.datasets if (one.name, one.digest) not in there]:
            self._inputs(run, new_ones, parent)
        if unfinished and record.artifacts:
            self._artifacts(run, record.artifacts)
        if unfinished:
            self._client.set_terminated(run.info.run_id, "FINISHED", end_time=when)
        if parent is not None:
            parent.metrics |= {key: (value, when, on.get(key)) for key, value in record.series_metrics.items()}

    def finish(self) -> None:
        """Give the logged models the metrics of their budgets."""
        for parent in self._parents.values():
            known = parent.run.data.metrics
            self._log(parent.run, {}, [
                self._metric(key, value, when, parent.model, dataset)
                for key, (value, when, dataset) in parent.metrics.items()
                if known.get(key) != value
            ], {})  # fmt: skip

    def _parent(self, series: Series, line: Line) -> _Parent:
        """The run and the model of a series; looked up once."""
        if series.fingerprint not in self._parents:
            run, new = self._run(series, line, {})
            self._log(run, series.params, [], {})
            model = self._model(run, series, new=new)
            if run.info.status != "FINISHED":
                self._client.set_terminated(run.info.run_id, "FINISHED", end_time=line["time"])
            self._parents[series.fingerprint] = _Parent(run, model)
        return self._parents[series.fingerprint]

    def _run(self, about: Record | Series, line: Line, tags: Mapping[str, str]) -> tuple[Any, bool]:
        """The run of a fingerprint, and whether there was none before."""
        wanted = f"tags.fingerprint = '{about.fingerprint}'"
        found = self._client.search_runs([self._id], wanted, max_results=1)
        if found:
            return found[0], False
        tags = {
            "fingerprint": about.fingerprint,
            "kind": about.kind,
            "mlflow.source.name": f"pipelines/{SCRIPTS[about.kind]}.py",
            **line["tags"],
            **{key: value for key, value in tags.items() if value},
        }
        return self._client.create_run(self._id, start_time=line["time"], tags=tags, run_name=about.name), True

    def _model(self, run: Any, about: Record | Series, *, new: bool) -> str:
        """The id of the logged model of a run."""
        from mlflow.entities import LoggedModelOutput, LoggedModelStatus

        params = {key: str(value) for key, value in about.params.items()}
        identity, source = run.info.run_id, f"source_run_id = '{run.info.run_id}'"
        found = [] if new else self._client.search_logged_models([self._id], source, max_results=1)
        if found:
            missing = {key: value for key, value in params.items() if key not in found[0].params}
            if missing:
                self._client.log_model_params(found[0].model_id, missing)
        model = found[0] if found else self._client.create_logged_model(
            self._id, re.sub(r"[/:.%\"']+", "_", about.name), identity, {"fingerprint": about.fingerprint}, params,
            about.kind,
        )  # fmt: skip
        if model.status != LoggedModelStatus.READY:
            if not run.outputs or not run.outputs.model_outputs:
                self._client.log_outputs(identity, [LoggedModelOutput(model.model_id, 0)])
            self._client.finalize_logged_model(model.model_id, "READY")
        return str(model.model_id)

    def _metric(
        self, key: str, value: float, when: int, model: str | None = None, dataset: Dataset | None = None, step: int = 0
    ) -> Any:
        from mlflow.entities import Metric

        data = (dataset.name, dataset.digest) if model and dataset else (None, None)
        return Metric(key, value, when, step, model, *data)

    def _log(self, run: Any, params: Mapping[str, Any], metrics: list[Any], tags: Mapping[str, str]) -> None:
        """What the run does not have yet, but for metrics, of which all are logged."""
        from mlflow.entities import Param, RunTag

        new = [Param(key, str(value)) for key, value in params.items() if key not in run.data.params]
        words = [RunTag(key, value) for key, value in tags.items() if value and run.data.tags.get(key) != value]
        while new or metrics or words:
            self._client.log_batch(run.info.run_id, metrics[:MOST_METRICS], new[:MOST_PARAMS], words)
            metrics, new, words = metrics[MOST_METRICS:], new[MOST_PARAMS:], []

    def _inputs(self, run: Any, datasets: Sequence[Dataset], parent: _Parent | None) -> None:
        from mlflow.entities import Dataset as Data
        from mlflow.entities import DatasetInput, InputTag, LoggedModelInput

        inputs = [
            DatasetInput(Data(one.name, one.digest, "ocvtp", one.source), [InputTag(CONTEXT, one.context)])
            for one in datasets
        ]
        models = [] if parent is None else [LoggedModelInput(parent.model)]
        self._client.log_inputs(run.info.run_id, inputs, models)

    def _artifacts(self, run: Any, artifacts: Mapping[str, Path]) -> None:
        with TemporaryDirectory() as folder:
            for name, path in artifacts.items():
                place = Path(folder, name)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, place)
            self._client.log_artifacts(run.info.run_id, folder)


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
