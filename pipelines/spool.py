"""Records for MLflow on their way: written to a file first, sent afterwards, sent once.

`.ocvtp/mlflow-spool/*.jsonl` holds what was not sent yet, `sent.json` what was, by digest, so that a stage that has
nothing new to say never imports mlflow.
"""

import csv
import fcntl
import hashlib
import json
import os
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
SQLITE = "sqlite:///"

Line = Mapping[str, Any]
"""`record`, its `digest`, the `uri` and `experiment` that it is for, the `time` (ms) and `tags` of what made it."""
Send = Callable[[str, Sequence[Line]], bool]
"""Sends lines to an address; False if it is away for now."""


@dataclass(frozen=True)
class Record:
    """What a run says.

    Attributes:
        fingerprint: of all that determines it: the run is found again by it.
        kind: `pruner` or `setting`.
        name: for people.
        params: axes and options, as plain values.
        metrics: one number each.
        curves: rows of numbers with their `step`.
        tags: words.
    """

    fingerprint: str
    kind: str
    name: str
    params: Mapping[str, Any]
    metrics: Mapping[str, float]
    curves: Sequence[Mapping[str, float]] = ()
    tags: Mapping[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Of all that it says."""
        return hashlib.sha256(canonical(asdict(self)).encode()).hexdigest()[:24]


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
        new = [record for record in records if known.get(record.fingerprint) != record.digest]
        if not new:
            return
        about = {"time": int(time.time() * 1000), "uri": uri, "experiment": experiment, "tags": _made_by(root)}
        lines = [json.dumps({**about, "digest": record.digest, "record": asdict(record)}) + "\n" for record in new]
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
        return sent

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
