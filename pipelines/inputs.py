"""What evaluated settings need of earlier stages: which can be run at all, their pruners, the questions.

Shared by the stages that run methods on a VLM.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.fingerprint import fingerprint
from ocvtp.errors import BadInput
from ocvtp.evaluation.objects import MASKS
from ocvtp.json_files import read_json
from ocvtp.methods import REGISTRY
from ocvtp.vlms import CatalogEntry
from pipelines.grid import Cell, PrunerCell, settings
from pipelines.params.fitting import lacking, unreachable
from pipelines.params.model import Params
from pipelines.stage import outputs
from pipelines.stage.context import Stage

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Input:
    """A folder of the store, or one file of it, that tasks read, and the checksums of its files.

    `questions` counts those of a question set.
    """

    path: str
    files: dict[str, str]
    questions: int | None = None


def wanted_settings(params: Params, vlms: Mapping[str, CatalogEntry]) -> list[Cell]:
    """Of the grid, without those whose method has no meaning on the VLM, or cannot keep so few tokens there.

    Tables have a dash for them.
    """
    kept = []
    for setting in settings(params, REGISTRY, {name: entry.tokens for name, entry in vlms.items()}):
        method, vlm = REGISTRY[setting.method], vlms[setting.vlm]
        why = lacking(method, vlm, setting.options) or unreachable(method, vlm, setting.keep, setting.options)
        if why is None:
            kept.append(setting)
        else:
            log.warning("%s is left out on %s: %s", setting.name, setting.vlm, why)
    return kept


def method_code(name: str) -> dict[str, str]:
    """Fingerprints of the code of a method, and of what it imports, wherever it is installed.

    The register finds methods by itself, so that no task imports them all: a task's key holds the code of the method
    that it runs, and of no other.
    """
    return {part: fingerprint(module) for part, module in REGISTRY.modules(name).items()}


def pruners(run: Stage, cells: Sequence[PrunerCell]) -> dict[PrunerCell, Input]:
    """Where the store has each pruner; those that it lacks are put back from stage `train`'s output."""
    if not cells:
        return {}
    path = run.input(outputs.PRUNERS, "train")
    index = read_json(path)
    found = {}
    for cell in dict.fromkeys(cells):
        if cell.folder not in index:
            raise BadInput(f"{path} has no {cell.folder}: run `python pipelines/train.py` or `dvc repro` first")
        about = index[cell.folder]
        found[cell] = Input(about["path"], about["files"])
        run.put_back(about["path"], run.root / outputs.MODELS / cell.folder, about["files"])
    run.require({run.store.root / one.path: one.files for one in found.values()}, "train")
    return found


def questions(run: Stage) -> dict[str, Input]:
    """Where the store has each question set of ours; empty where the official ones are asked."""
    if run.params.evaluate.data != "scenes":
        return {}
    place = run.input(f"{outputs.SAMPLE}/sample.json", "sample").parent
    about = read_json(place / "sample.json")["benchmarks"]
    missing = [name for name in run.params.benchmark if name not in about]
    if missing:
        raise BadInput(f"{place} has no questions of {', '.join(missing)}: run `python pipelines/sample.py` first")
    files = outputs.checksums(place / "benchmarks")
    for folder in {Path(one["path"]).parent for one in about.values()}:
        run.put_back(folder.as_posix(), place / "benchmarks", files)
        run.require({run.store.root / folder: files}, "sample")
    return {
        name: Input(about[name]["path"], {name: about[name]["sha256"], MASKS: files[MASKS]}, about[name]["questions"])
        for name in run.params.benchmark
    }


def weights(pruner: Input) -> dict[str, str]:
    """What of a pruner determines what it keeps."""
    return {name: pruner.files[name] for name in ("config.json", "model.safetensors")}
