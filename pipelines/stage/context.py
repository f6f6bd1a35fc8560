"""A stage at work: its params, where things are, planning and running its tasks."""

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from cluster import (
    CorruptResult,
    Manifest,
    Report,
    Resources,
    Store,
    Task,
    is_published,
    run,
    set_aside,
    verify,
)
from cluster.driver.plan import fault_of
from cluster.host import visible_gpus
from cluster.local.executor import WORKER_LOGS, LocalExecutor
from cluster.protocol import Context, Executor
from cluster.task import Call
from ocvtp.errors import BadInput, Corrupt
from ocvtp.json_files import read_json
from pipelines.params.load import load
from pipelines.params.model import SAMPLED, Cluster, Demand, Params
from pipelines.stage.outputs import IMAGES, SAMPLE, TRAINING
from pipelines.tasks.restored import restored

log = logging.getLogger("pipelines")

ROOT = Path(__file__).resolve().parents[2]
"""Of the repository, or of the copy of it that a Ray job runs in."""
PARAMS = ROOT / "params.yaml"
_READERS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True)
class Stage:
    """A stage at work.

    Attributes:
        name: as in dvc.yaml.
        params: the entries that it may read.
        root: where the outputs of stages are.
        config: of the package `cluster`.
        dry: whether the stage is only to say what it would do: it then reads no result and changes nothing.
        notes: what it would do beside its tasks, if it is dry.
    """

    name: str
    params: Params
    root: Path
    config: Cluster
    dry: bool = False
    notes: list[str] = field(default_factory=list)

    @cached_property
    def store(self) -> Store:
        """Published results."""
        return Store(self.config.store)

    def resources(self, demand: Demand) -> Resources:
        """Of one task."""
        gpus: int | str = demand.gpus
        if not isinstance(gpus, int):
            gpus = min(1, len(visible_gpus())) if self.config.executor == "local" else 0
        return Resources(demand.cpus, gpus, demand.memory_gb, demand.minutes)

    def task(
        self,
        kind: str,
        name: str,
        call: Call,
        spec: dict[str, Any],
        demand: Demand,
        inputs: dict[str, Any] | None = None,
    ) -> Task:
        """A task of the store; its key does not depend on `inputs`, which say where its inputs lie."""
        task = self.store.task(kind, name, call, spec, resources=self.resources(demand))
        return replace(task, inputs=inputs or {})

    def in_store(self, path: Path) -> str:
        """The path relative to the store, with `/`."""
        return path.relative_to(self.store.root).as_posix()

    def input(self, path: str, made_by: str) -> Path:
        """A file or folder that an earlier stage made; `BadInput` says how to get it."""
        found = self.root / path
        if not found.exists():
            raise BadInput(
                f"{found} is not there: run `python pipelines/{made_by}.py` or `dvc repro` first"
                " (OCVTP_ROOT names the folder of the outputs, if it is another one)"
            )
        return found

    def sampled_images(self, on: str = SAMPLED) -> list[dict[str, str]]:
        """What stage `sample` listed: id, path in the store and SHA-256 of each image; `Corrupt` if it is not that.

        Args:
            on: a benchmark of whose own training images; else those of `sample.source`.
        """
        path = self.input(f"{SAMPLE}/{IMAGES if on == SAMPLED else TRAINING}", "sample")
        found: Any = read_json(path)
        if on != SAMPLED:
            if on not in found:
                raise BadInput(f"{path} has no images of {on}: run `python pipelines/sample.py` or `dvc repro` first")
            found = found[on]["images"]
        images: list[dict[str, str]] = found
        if not isinstance(images, list) or not images or any({*image} != {"id", "path", "sha256"} for image in images):
            raise Corrupt(f"{path} is not what stage sample writes: a list of objects with id, path and sha256")
        return images

    def run(self, tasks: Sequence[Task], workers: Executor | None = None) -> Report:
        """Run what is missing; results that are damaged are set aside and made again.

        The report tells what failed: nothing is raised for that.
        """
        self.set_damaged_aside(task.out for task in tasks)
        return run(tasks, workers, config=self.config, label=self.name, fail_fast=self.params.cluster.fail_fast)

    @contextmanager
    def workers(self) -> Iterator[Executor | None]:
        """Workers of this machine for several calls of `run`: what one has loaded stays loaded.

        None where tasks run elsewhere: there, starting a worker is the scheduler's business.
        """
        if self.config.executor != "local":
            yield None
            return
        logs = self.store.logs / WORKER_LOGS / f"{self.name}-{os.getpid()}"
        with closing(LocalExecutor(Context(logs.name, logs, self.config))) as executor:
            yield executor
        with suppress(OSError):  # is not there, or has something to read
            logs.rmdir()

    def set_damaged_aside(self, folders: Iterable[Path]) -> None:
        """Verify those that are published; move the damaged ones away, so that they count as missing."""

        def look(folder: Path) -> None:
            if (corrupt := set_aside(folder, remembered=True)) is not None:
                log.warning("%s: it is made again", corrupt)

        with ThreadPoolExecutor(_READERS) as pool:
            list(pool.map(look, [folder for folder in folders if is_published(folder)]))

    def require(self, wanted: Mapping[Path, Mapping[str, str]], made_by: str) -> None:
        """Make sure that folders of the store hold these files (path -> SHA-256), whole.

        Raises:
            Corrupt: one does not; names it and the command that makes it again.
        """

        def look(folder: Path) -> str | None:
            try:
                manifest = self._glance(folder) if self.dry else verify(folder, remembered=True)
                files = {file.path: file.sha256 for file in manifest.files}
            except CorruptResult as error:
                return str(error)
            wrong = [path for path, sha256 in wanted[folder].items() if files.get(path) != sha256]
            return f"{folder / wrong[0]} is not the file that was made (SHA-256 differs)" if wrong else None

        with ThreadPoolExecutor(_READERS) as pool:
            found = [problem for problem in pool.map(look, wanted) if problem]
        if found:
            said = (
                f"{len(found)} of {len(wanted)} results of stage {made_by} in the store {self.store.root} cannot be"
                f" used; make them again: `python pipelines/{made_by}.py`\n  " + "\n  ".join(found[:5])
            )
            if not self.dry:
                raise Corrupt(said)
            self.notes.append(said)

    @staticmethod
    def _glance(folder: Path) -> Manifest:
        """The manifest of a result against which nothing speaks that can be seen without reading its files."""
        fault, usable = fault_of(folder)
        if not usable:
            raise CorruptResult(fault)
        return Manifest.read(folder)

    def put_back(self, path: str, source: Path, files: Mapping[str, str]) -> None:
        """Publish an output again under the name that it had, if this store lacks it: DVC brought it from elsewhere.

        Args:
            path: in the store.
            source: the output.
            files: path -> SHA-256 of what is to be published.
        """
        out = self.store.root / path
        if self.dry:
            if not fault_of(out)[1]:
                self.notes.append(f"{path} is put back into the store from {source}")
            return
        self.set_damaged_aside([out])
        if is_published(out):
            return
        inputs = {"source": str(source.resolve())}
        task = Task(f"put back {path}", restored, {"files": dict(files)}, out, key=out.name, inputs=inputs)
        run([task], "local", config=self.config, label=f"{self.name}, put back").raise_if_failed()


def home_of(root: Path) -> Path:
    """The repository that an experiment's copy belongs to, so that `dvc exp run --temp` shares store and tracking."""
    for parent in root.parents:
        if parent.parts[-3:] == (".dvc", "tmp", "exps"):
            return parent.parents[2]
    return root


def open_stage(
    name: str, file: Path | None = None, root: Path | None = None, *, fail_fast: bool = False, dry: bool = False
) -> Stage:
    """Read the params and find what a stage needs; `BadInput` lists what is wrong with them.

    Args:
        name: of the stage.
        file: other params than those of the repository.
        root: where outputs of stages are; the repository, or OCVTP_ROOT where no DVC runs the stage.
        fail_fast: as `cluster.fail_fast`, whatever the params say.
        dry: whether it is only to say what it would do.
    """
    if root is None:
        elsewhere = None if "DVC_STAGE" in os.environ else os.environ.get("OCVTP_ROOT")
        root = Path(elsewhere) if elsewhere else ROOT
    params = load(file or PARAMS)
    if fail_fast:
        params = params.model_copy(update={"cluster": params.cluster.model_copy(update={"fail_fast": True})})
    config = params.cluster.model_copy(update={"store": home_of(root.resolve()) / params.cluster.store})
    return Stage(name, params.seen_by(name), root, config, dry)
