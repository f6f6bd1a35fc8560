"""Stage `evaluate`: every setting of the grid on every benchmark. Writes `results/` but for `efficiency.json`.

`results/evaluate/<vlm>/<setting>/<benchmark>/` has the answers, `scores.json` a row for each of them, `summary.json`
one for each setting with its seeds pooled, and `metrics.json` the same in short, for DVC. If tasks fail, the others'
results are still written, and the stage ends with exit code 1.
"""

import hashlib
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from cluster import Task, is_published
from cluster.task import canonical
from ocvtp.evaluation.objects import MASKS
from ocvtp.json_files import read_json
from ocvtp.vlms import CatalogEntry, resolve
from pipelines import tracking
from pipelines.grid import Cell, PrunerCell, vlm_folder
from pipelines.inputs import Input, method_code, pruners, questions, wanted_settings, weights
from pipelines.spool import Record
from pipelines.stage import command, outputs
from pipelines.stage.context import Stage
from pipelines.stage.dry_run import Plan
from pipelines.summary import Result, metrics, score_rows, summary_rows
from pipelines.tasks.answers import answers, asked

log = logging.getLogger(__name__)


def work(run: Stage) -> None:
    """Evaluate what is missing, and write the output."""
    wanted, tasks = _tasks(run)
    report = run.run(list(tasks.values()))
    results = list(_write(run, tasks))
    tracking.track(run, list(_records(run, wanted, tasks, results)))
    report.raise_if_failed()


def plan(run: Stage) -> Plan:
    """What it would evaluate."""
    return Plan(list(_tasks(run)[1].values()))


def _tasks(run: Stage) -> tuple[list[Cell], dict[tuple[Cell, str], Task]]:
    """Every setting, and the task of each on each benchmark."""
    params = run.params
    vlms = {name: resolve(name) for name in params.vlm}
    wanted = wanted_settings(params, vlms)
    trained = pruners(run, [setting.pruner for setting in wanted if setting.pruner is not None])
    data = questions(run)
    tasks = {
        (setting, name): _task(run, setting, name, vlms[setting.vlm], trained, data.get(name))
        for setting in wanted
        for name in params.benchmark
    }
    return wanted, tasks


# --- Tasks -----------------------------------------------------------------------------------------------------------


def _task(
    run: Stage,
    setting: Cell,
    benchmark: str,
    vlm: CatalogEntry,
    trained: Mapping[PrunerCell, Input],
    data: Input | None,
) -> Task:
    evaluate = run.params.evaluate
    pruner = trained[setting.pruner] if setting.pruner else None
    spec = {
        **_of_setting(run, setting, vlm, pruner),
        "benchmark": benchmark,
        **asked(benchmark),
        "data": None if data is None else data.files[benchmark],
        "masks": None if data is None else data.files[MASKS],
        "limit": evaluate.limit,
        "batch_size": evaluate.batch_size,
    }
    inputs = {"pruner": None if pruner is None else pruner.path, "data": None if data is None else data.path}
    name = f"{vlm_folder(setting.vlm)} {setting.name} {benchmark}"
    return run.task("answers", name, answers, spec, run.params.cluster.resources.evaluate, inputs)


def _of_setting(run: Stage, setting: Cell, vlm: CatalogEntry, pruner: Input | None) -> dict[str, Any]:
    """The part of a spec that all benchmarks share."""
    evaluate = run.params.evaluate
    # The count where all images have as many tokens, so that 0.333 and 48 of 144 are one and the same.
    keep = setting.tokens or setting.share if setting.keep is not None else None
    return {
        "vlm": setting.vlm,
        "model": vlm.identity,
        "method": setting.method,
        "method_code": method_code(setting.method),
        "keep": keep,
        "seed": setting.seed,
        "options": setting.options,
        "pruner": None if pruner is None else weights(pruner),
        "dtype": evaluate.dtype,
        "max_new_tokens": evaluate.max_new_tokens,
    }


# --- Output ----------------------------------------------------------------------------------------------------------


def _write(run: Stage, tasks: Mapping[tuple[Cell, str], Task]) -> Iterator[Result]:
    """Copy what is published, and write the tables; yields the results."""
    place = run.root / outputs.RESULTS
    found = []
    with outputs.folder(place / "evaluate") as folder:
        for (setting, benchmark), task in tasks.items():
            if is_published(task.out):
                path = f"{vlm_folder(setting.vlm)}/{setting.name}/{benchmark}"
                outputs.copy_published(task.out, folder / path)
                found.append(Result.read(setting, benchmark, folder / path, f"{outputs.RESULTS}/evaluate/{path}"))
    resamples = run.params.evaluate.bootstrap
    summary = summary_rows(found, run.params.benchmark, resamples)
    outputs.write_json(place / "scores.json", score_rows(found, resamples))
    outputs.write_json(place / "summary.json", summary)
    outputs.write_json(place / "metrics.json", metrics(summary))
    yield from found


def _records(
    run: Stage, wanted: Sequence[Cell], tasks: Mapping[tuple[Cell, str], Task], results: Sequence[Result]
) -> Iterator[Record]:
    """Of each setting with any result, for MLflow."""
    by: dict[Cell, dict[str, Result]] = {}
    for result in results:
        by.setdefault(result.setting, {})[result.benchmark] = result
    vanilla = {setting.vlm: by.get(setting, {}) for setting in wanted if setting.keep is None}
    sets = {name: task.spec["data"] for (_, name), task in tasks.items()}
    for setting, found in by.items():
        task = tasks[setting, next(iter(found))]
        shared = {k: v for k, v in task.spec.items() if k not in ("benchmark", "task", "data", "batch_size")}
        identity = canonical({"setting": shared, "data": _data_identity(run, sets), "code": task.code})
        scores = {name: result.score["score"] for name, result in found.items()}
        relative = {name: found[name].relative_to(vanilla[setting.vlm].get(name)) for name in found}
        known = [value for value in relative.values() if value is not None]
        if known and len(known) == len(run.params.benchmark):
            scores["average_relative"] = sum(known) / len(known)
        scores |= {f"{name}_relative": value for name, value in relative.items()}
        axes = {**setting.axes, "keep": setting.tokens or setting.share, "seed": setting.seed}
        yield Record(
            fingerprint=hashlib.sha256(identity.encode()).hexdigest()[:24],
            kind="setting",
            name=f"{vlm_folder(setting.vlm)}/{setting.name}",
            params={key: value for key, value in axes.items() if value is not None},
            metrics={key: value for key, value in scores.items() if value is not None},
            tags={"pruner": str(next(iter(found.values())).score["setting"].get("fingerprint") or "")},
        )


def _data_identity(run: Stage, sets: Mapping[str, Any]) -> Any:
    """What tells these questions from others, whichever of the benchmarks are in the grid."""
    if run.params.evaluate.data != "scenes":
        return "official"
    about = read_json(run.root / outputs.SAMPLE / "sample.json")["benchmarks"]
    return {name: one["sha256"] for name, one in about.items()} or dict(sets)


def main(arguments: list[str] | None = None) -> int:
    """Run the stage; returns the exit code."""
    return command.main("evaluate", __doc__ or "", work, plan, arguments)


if __name__ == "__main__":
    command.script("pipelines.eval")
