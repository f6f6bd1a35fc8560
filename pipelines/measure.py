"""Stage `measure`: what methods keep of images, without a language model. Writes `results/measures.json`.

Objects with a kept token, what the kept tokens leave unexplained of all, the distance to the nearest kept one
(`ocvtp inspect`), for each method that chooses before the LLM and reads no prompt. The report sets them against
accuracy: which of them tells a good method without asking a question?
"""

import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from cluster import Task, is_published
from ocvtp.evaluation.objects import MASKS
from ocvtp.json_files import read_json
from ocvtp.methods import REGISTRY
from ocvtp.vlms import CatalogEntry, resolve
from pipelines.grid import Cell, PrunerCell, vlm_folder
from pipelines.inputs import Input, method_code, pruners, wanted_settings, weights
from pipelines.stage import command, outputs
from pipelines.stage.context import Stage
from pipelines.stage.dry_run import Plan
from pipelines.tasks.measures import MEASURES, measures

NUMBERS = ("cover", "small", "span", "span_on", "near", "distinct")
"""Of `ocvtp.inspection.measure.Row`."""


@dataclass(frozen=True)
class Images:
    """What is measured on.

    Attributes:
        paths: of images in the store.
        sha256: of each.
        masks: path and SHA-256 of the COCO file with their objects; None where there are no masks.
    """

    paths: list[str]
    sha256: list[str]
    masks: tuple[str, str] | None


def work(run: Stage) -> None:
    """Measure what is missing, and write the output."""
    groups, tasks = _tasks(run)
    report = run.run(list(tasks.values()))
    rows = [row for key, task in tasks.items() if is_published(task.out) for row in _rows(groups[key], task)]
    outputs.write_json(run.root / outputs.RESULTS / MEASURES, list(_means(rows)))
    report.raise_if_failed()


def plan(run: Stage) -> Plan:
    """What it would measure."""
    return Plan(list(_tasks(run)[1].values()))


def _tasks(run: Stage) -> tuple[dict[Any, list[Cell]], dict[Any, Task]]:
    """Settings that differ in budget and seed alone, and the task of each group."""
    vlms = {name: resolve(name) for name in run.params.vlm}
    cells = [cell for cell in wanted_settings(run.params, vlms) if _measurable(cell)]
    trained = pruners(run, [cell.pruner for cell in cells if cell.pruner is not None])
    images = _images(run)
    groups: dict[Any, list[Cell]] = defaultdict(list)
    for cell in cells:
        groups[cell.vlm, cell.method, cell.layer, cell.pruner, cell.changes].append(cell)
    return groups, {key: _task(run, some, vlms[some[0].vlm], trained, images) for key, some in groups.items()}


def _measurable(cell: Cell) -> bool:
    entry = REGISTRY[cell.method]
    return entry.acts == "before the LLM" and not entry.needs_text


def _images(run: Stage) -> Images:
    """The benchmarks' scenes with their masks; else the first of the sampled images, of which no masks are known."""
    limit = run.params.measure.images
    place = run.input(f"{outputs.SAMPLE}/sample.json", "sample").parent
    about = read_json(place / "sample.json")["benchmarks"]
    if not about:
        images = run.sampled_images()[:limit]
        return Images([image["path"] for image in images], [image["sha256"] for image in images], None)
    folder = run.store.root / Path(next(iter(about.values()))["path"]).parent
    files = outputs.checksums(place / "benchmarks")
    run.put_back(run.in_store(folder), place / "benchmarks", files)
    run.require({folder: files}, "sample")
    chosen = sorted(path for path in files if path.startswith("images/"))[:limit]
    return Images(
        [run.in_store(folder / path) for path in chosen],
        [files[path] for path in chosen],
        (run.in_store(folder / MASKS), files[MASKS]),
    )


def _task(
    run: Stage, cells: Sequence[Cell], vlm: CatalogEntry, trained: Mapping[PrunerCell, Input], images: Images
) -> Task:
    """One method with all of its budgets and seeds."""
    first, extract = cells[0], run.params.extract
    pruner = trained[first.pruner] if first.pruner else None
    own = {name: value for name, value in first.options.items() if name != "weights_seed"}
    spec = {
        "vlm": first.vlm,
        "model": vlm.identity,
        "method": first.method,
        "method_code": method_code(first.method),
        "options": own,
        "pruner": None if pruner is None else weights(pruner),
        "keep": list(dict.fromkeys(cell.tokens or cell.share for cell in cells)),
        "seeds": list(dict.fromkeys(cell.seed or 0 for cell in cells)),
        "images": images.sha256,
        "masks": None if images.masks is None else images.masks[1],
        "layer": run.params.layer[0],
        "fit": extract.preprocessing,
        "dtype": extract.compute_dtype,
        "batch_size": extract.batch_size,
    }
    inputs = {
        "images": images.paths,
        "masks": None if images.masks is None else images.masks[0],
        "pruner": None if pruner is None else pruner.path,
    }
    name = f"{vlm_folder(first.vlm)} {first.name}"
    return run.task("measures", name, measures, spec, run.params.cluster.resources.evaluate, inputs)


def _rows(cells: Sequence[Cell], task: Task) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Each setting's axes, and what was measured of it."""
    found = {(row["keep"], row["seed"]): row for row in json.loads((task.out / MEASURES).read_bytes())}
    for cell in cells:
        yield cell.axes, found[cell.tokens or cell.share, cell.seed or 0]


def _means(rows: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """A row for each setting, means over its seeds."""
    groups: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = defaultdict(list)
    for axes, row in rows:
        groups[json.dumps(axes)].append((axes, row))
    for some in groups.values():
        known = {name: [row[name] for _, row in some if row[name] is not None] for name in NUMBERS}
        means = {name: statistics.fmean(values) if values else None for name, values in known.items()}
        yield {**some[0][0], "seeds": len(some), **means}


def main(arguments: list[str] | None = None) -> int:
    """Run the stage; returns the exit code."""
    return command.main("measure", __doc__ or "", work, plan, arguments)


if __name__ == "__main__":
    command.script("pipelines.measure")
