"""Records for MLflow on their way: written to a file first, sent afterwards, sent once.

`.ocvtp/mlflow-spool/*.jsonl` holds what was not sent yet, `files` the artifacts of it by SHA-256, `sent.json` what was
sent, by digest, so that a stage that has nothing new to say never imports mlflow.
"""

import csv
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from cluster.task import canonical
from pipelines.stage.outputs import write_json, write_text

FOLDER = ".ocvtp/mlflow-spool"
SENT = "sent.json"
FILES = "files"
SQLITE = "sqlite:///"

Line = Mapping[str, Any]
"""`record`, its `digest`, the `uri` and `experiment` that it is for, the `time` (ms) and `tags` of what made it."""
Send = Callable[[str, Sequence[Line]], bool]
"""Sends lines to an address; False if it is away for now."""


@dataclass(frozen=True)
class Dataset:
    """What a pruner was trained on, or a setting evaluated on.

    Attributes:
        name: of the data.
        digest: of its content, at most 36 characters.
        context: `training` or `evaluation`.
        source: where it comes from, as JSON.
    """

    name: str
    digest: str
    context: str
    source: str

    @classmethod
    def of(cls, name: str, content: Any, context: str, source: Any) -> "Dataset":
        """With the digest of what stands for the content, plain values."""
        digest = hashlib.sha256(canonical(content).encode()).hexdigest()[:32]
        return cls(name, digest, context, canonical(source))


@dataclass(frozen=True)
class Series:
    """What a setting is one budget of: a trained pruner, or a method without one, with all its options.

    It has a run of its own, under which those of its budgets are nested, and a logged model that has all their metrics.

    Attributes:
        fingerprint: of all that determines it; a trained pruner's is that of its record.
        kind: `pruner` or `method`.
        name: for people.
        params: axes and options that all its budgets share.
    """

    fingerprint: str
    kind: str
    name: str
    params: Mapping[str, Any]


@dataclass(frozen=True)
class Record:
    """What a run says.

    Attributes:
        fingerprint: of all that determines it: the run is found again by it.
        kind: `pruner`, `setting`, `report` or `latency` (`pipelines.tracking.SCRIPTS`).
        name: for people.
        params: axes and options, as plain values.
        metrics: one number each.
        curves: rows of numbers with their `step`.
        tags: words.
        datasets: what it was made from.
        measured_on: of metrics, also of those of the series, the name of their dataset, where they have one.
        series: what it is one budget of.
        series_metrics: what it adds to the metrics of the series, under names of this budget.
        artifacts: files by their place below the run's artifacts.
    """

    fingerprint: str
    kind: str
    name: str
    params: Mapping[str, Any]
    metrics: Mapping[str, float]
    curves: Sequence[Mapping[str, float]] = ()
    tags: Mapping[str, str] = field(default_factory=dict)
    datasets: Sequence[Dataset] = ()
    measured_on: Mapping[str, str] = field(default_factory=dict)
    series: Series | None = None
    series_metrics: Mapping[str, float] = field(default_factory=dict)
    artifacts: Mapping[str, Path] = field(default_factory=dict)

    def spooled(self) -> dict[str, Any]:
        """As JSON, with the SHA-256 of artifacts in place of their paths."""
        files = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in self.artifacts.items()}
        return {**asdict(self), "artifacts": files}

    @classmethod
    def read(cls, spooled: Mapping[str, Any], files: Path) -> "Record":
        """From what was spooled; `files` is the folder of artifacts. What an older spool does not say is left out."""
        series = spooled.get("series")
        more = {
            "datasets": [Dataset(**one) for one in spooled.get("datasets", ())],
            "series": None if series is None else Series(**series),
            "artifacts": {name: files / sha256 for name, sha256 in spooled.get("artifacts", {}).items()},
        }
        return cls(**{**spooled, **more})


def curves(path: Path) -> list[dict[str, float]]:
    """Rows of a CSV with a column `step`; empty cells and what is not finite are left out."""
    rows = []
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            numbers = {key: float(value) for key, value in row.items() if value}
            rows.append({key: value for key, value in numbers.items() if isfinite(value)})
    return rows


@dataclass(frozen=True)
class Spool:
    """The records of one repository. Paths of sqlite stores are relative to `home`."""

    home: Path

    @property
    def folder(self) -> Path:
        """Where records wait."""
        return self.home / FOLDER

    @property
    def files(self) -> Path:
        """Artifacts of what waits, by SHA-256."""
        return self.folder / FILES

    @property
    def waiting(self) -> list[Path]:
        """Files of records that were not sent, the oldest first."""
        return sorted(self.folder.glob("*.jsonl"))

    def address(self, uri: str) -> str:
        """The same wherever it is used from."""
        inside = uri.startswith(SQLITE) and not uri.startswith(SQLITE + "/")
        return f"{SQLITE}{self.home / uri.removeprefix(SQLITE)}" if inside else uri

    def add(self, records: Sequence[Record], uri: str, experiment: str, root: Path) -> None:
        """Write down what that place does not have yet.

        Args:
            records: of runs.
            uri: where they are to go.
            experiment: and under which name.
            root: a folder of the git repository that made them.
        """
        uri = self.address(uri)
        known = self._sent().get(_place(uri, experiment), {})
        said = [(record, record.spooled()) for record in records]
        new = [(record, it, _digest(it)) for record, it in said if known.get(record.fingerprint) != _digest(it)]
        if not new:
            return
        about = {"time": int(time.time() * 1000), "uri": uri, "experiment": experiment, "tags": _made_by(root)}
        with self._alone():  # else another process could clear away files before they are named
            for record, it, _ in new:
                for name, path in record.artifacts.items():
                    self._keep(path, it["artifacts"][name])
            lines = [json.dumps({**about, "digest": digest, "record": it}) + "\n" for _, it, digest in new]
            write_text(self.folder / f"{about['time']}-{uuid.uuid4().hex[:8]}.jsonl", "".join(lines))

    def deliver(self, send: Send, uri: str | None = None) -> int:
        """Hand what waits to `send`, file by file; returns how many records went out.

        Args:
            send: is not called again with an address that was away.
            uri: instead of the addresses that records were meant for.
        """
        if not self.waiting:
            return 0
        sent, away = 0, set[str]()
        with self._alone():
            for path in self.waiting:
                lines: list[Line] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
                target = self.address(uri or str(lines[0]["uri"]))
                if target in away or not send(target, lines):
                    away.add(target)
                    continue
                self._note(target, lines)
                path.unlink()
                sent += len(lines)
            if not self.waiting:
                shutil.rmtree(self.files, ignore_errors=True)
        return sent

    def _keep(self, path: Path, sha256: str) -> None:
        """A copy of an artifact, which may change before it is sent."""
        target = self.files / sha256
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_suffix(f".{os.getpid()}")
            shutil.copyfile(path, part)
            part.replace(target)

    def _sent(self) -> dict[str, dict[str, str]]:
        """Place -> fingerprint -> digest; without places whose store is gone."""
        try:
            data: dict[str, dict[str, str]] = json.loads((self.folder / SENT).read_bytes())
        except (FileNotFoundError, ValueError):  # then all is sent again, to the runs that there are
            return {}
        return {place: sent for place, sent in data.items() if _exists(place.partition(" ")[2])}

    def _note(self, uri: str, lines: Sequence[Line]) -> None:
        sent = self._sent()
        for line in lines:
            sent.setdefault(_place(uri, line["experiment"]), {})[line["record"]["fingerprint"]] = line["digest"]
        write_json(self.folder / SENT, sent)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One process sends at a time: two that open a new sqlite store at once break it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _digest(spooled: Mapping[str, Any]) -> str:
    """Of all that a record says."""
    return hashlib.sha256(canonical(spooled).encode()).hexdigest()[:24]


def _place(uri: str, experiment: str) -> str:
    return f"{experiment} {uri}"


def _exists(uri: str) -> bool:
    return not uri.startswith(SQLITE) or Path(uri.removeprefix(SQLITE)).is_file()


def _made_by(root: Path) -> dict[str, str]:
    """Commit and experiment, as tags."""
    commit = os.environ.get("DVC_EXP_BASELINE_REV", "")
    if not commit:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
        commit = done.stdout.strip() if done.returncode == 0 else ""
    experiment = os.environ.get("DVC_EXP_NAME", "")
    tags = {"git_commit": commit, "mlflow.source.git.commit": commit, "dvc_experiment": experiment}
    return {key: value for key, value in tags.items() if value}
