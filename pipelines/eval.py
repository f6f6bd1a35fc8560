"""Stage `evaluate`: every setting of the grid on every benchmark. Writes `results/` but for `efficiency.json`.

First answers, in tasks of a benchmark's questions or a shard of them, then scores of these: a score that changes asks
nothing again. `results/evaluate/<vlm>/<setting>/<benchmark>/` has the answers, `scores.json` a row for each of them,
`summary.json` one for each setting with its seeds pooled, and `metrics.json` the same in short, for DVC. If tasks fail,
the others' results are still written, and the stage ends with exit code 1.
"""

import hashlib
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from cluster import Outcome, Report, Task, is_published
from cluster.driver.plan import fault_of
from cluster.fingerprint import fingerprint
from cluster.task import canonical
from ocvtp.errors import BadInput
from ocvtp.evaluation.benchmarks import NATIVE, benchmark, benchmarks
from ocvtp.evaluation.objects import MASKS
from ocvtp.json_files import read_json
from ocvtp.vlms import CatalogEntry, resolve
from pipelines import tracking
from pipelines.grid import Cell, PrunerCell, budget_name, vlm_folder
from pipelines.inputs import Input, method_code, pruners, questions, wanted_settings, weights
from pipelines.params import ablate
from pipelines.params.ablate import ON
from pipelines.shards import Published, Speeds, count_of
from pipelines.spool import Dataset, Record, Series
from pipelines.stage import command, outputs
from pipelines.stage.context import Stage
from pipelines.stage.dry_run import Plan
from pipelines.summary import Result, metrics, score_rows, summary_rows
from pipelines.tasks.answers import answers, asked
from pipelines.tasks.scores import scored, scores

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Work:
    """One setting on one benchmark: the task that scores it, and what its answers are made of."""

    score: Task
    asking: dict[str, Any]
    inputs: dict[str, Any]
    questions: int


def work(run: Stage) -> None:
    """Evaluate what is missing, and write the output."""
    wanted, everything = _works(run)
    run.set_damaged_aside(one.score.out for one in everything.values())
    missing = [one for one in everything.values() if not is_published(one.score.out)]
    # One benchmark after the other: a worker then knows its images, and what the tower makes of them.
    missing.sort(key=lambda one: run.params.benchmark.index(one.asking["benchmark"]))
    speeds, there = _speeds(run), _published(run)
    shards = [_shards(run, one, speeds, there) for one in missing]
    with run.workers() if missing else nullcontext() as workers:
        asked_ = run.run([task for some in shards for task in some], workers) if missing else Report()
        sizes = {
            task.key: one.questions // len(some) for one, some in zip(missing, shards, strict=True) for task in some
        }
        speeds.note(asked_.done, sizes)
        unanswered = {
            one.score.key
            for one, some in zip(missing, shards, strict=True)
            if not all(is_published(task.out) for task in some)
        }
        scored_ = [one.score for one in everything.values() if one.score.key not in unanswered]
        report = run.run(scored_, workers)
    tasks = {place: one.score for place, one in everything.items()}
    results = list(_write(run, tasks))
    tracking.track(run, list(_records(run, wanted, tasks, results)))
    both = [first + second for first, second in zip(_outcomes(asked_), _outcomes(report), strict=True)]
    Report(*both).raise_if_failed()


def _outcomes(report: Report) -> list[list[Outcome]]:
    return [report.done, report.skipped, report.failed, report.cancelled]


def plan(run: Stage) -> Plan:
    """What it would evaluate."""
    works, speeds, there = _works(run)[1].values(), _speeds(run), _published(run)
    lacking = [one for one in works if not fault_of(one.score.out)[1]]
    asked_ = [task for one in lacking for task in _shards(run, one, speeds, there)]
    return Plan([*asked_, *(one.score for one in works)])


def _works(run: Stage) -> tuple[list[Cell], dict[tuple[Cell, str], Work]]:
    """Every setting, and each on each benchmark."""
    params = run.params
    vlms = {name: resolve(name) for name in params.vlm}
    wanted = wanted_settings(params, vlms)
    trained = pruners(run, [setting.pruner for setting in wanted if setting.pruner is not None])
    data = questions(run)
    works = {
        (setting, name): _work(run, setting, name, vlms[setting.vlm], trained, data.get(name))
        for setting in wanted
        for name in params.benchmark
        if setting.asks(name)
    }
    return wanted, works


# --- Tasks -----------------------------------------------------------------------------------------------------------


def _work(
    run: Stage,
    setting: Cell,
    name: str,
    vlm: CatalogEntry,
    trained: Mapping[PrunerCell, Input],
    data: Input | None,
) -> Work:
    evaluate = run.params.evaluate
    pruner = trained[setting.pruner] if setting.pruner else None
    asking = {
        **_of_setting(run, setting, vlm, pruner),
        "benchmark": name,
        **asked(name, evaluate.protocol),
        "data": None if data is None else data.files[name],
        "limit": evaluate.limit,
        "batch_size": evaluate.batch_size,
    }
    spec = {
        "answers": asking,
        "answers_code": fingerprint(answers),
        **scored(name, evaluate.protocol),
        "masks": None if data is None else data.files[MASKS],
    }
    inputs = {"pruner": None if pruner is None else pruner.path, "data": None if data is None else data.path}
    path = f"{vlm_folder(setting.vlm)} {setting.name} {name}"
    demand = run.params.cluster.resources.evaluate.model_copy(update={"gpus": 0})
    count = benchmark(name).questions if data is None or data.questions is None else data.questions
    count = count if evaluate.limit is None else min(count, evaluate.limit)
    return Work(run.task("scores", f"{path}, score", scores, spec, demand, inputs), asking, inputs, count)


def _shards(run: Stage, work: Work, speeds: Speeds, there: Published) -> list[Task]:
    """The tasks whose answers a score is made of; the score is told where these will be."""

    def key_of(number: int, count: int) -> str:
        return _shard(run, work, number, count).out.name

    # What is answered is never asked again for the sake of another cut.
    count = there.cut(key_of, whole=True) or _given(run, work) or there.cut(key_of, whole=False)
    count = count or count_of(work.questions, speeds.of(work.asking), run.params.evaluate.minutes_per_task)
    tasks = [_shard(run, work, number, count) for number in range(count)]
    work.score.inputs["answers"] = [run.in_store(task.out) for task in tasks]
    return tasks


def _given(run: Stage, work: Work) -> int | None:
    """Into how many tasks the params say to cut the questions, if they do."""
    count = run.params.evaluate.shards
    if count is not None and count > work.questions:
        raise BadInput(f"evaluate.shards: {count} tasks of {work.questions} questions of {work.asking['benchmark']}")
    return count


def _shard(run: Stage, work: Work, number: int, count: int) -> Task:
    spec = {**work.asking, "shard": [number, count]}
    name = work.score.name.removesuffix(", score") + (f" {number + 1}/{count}" if count > 1 else "")
    return run.task("answers", name, answers, spec, run.params.cluster.resources.evaluate, work.inputs)


def _speeds(run: Stage) -> Speeds:
    return Speeds(run.store.logs, run.config.executor)


def _published(run: Stage) -> Published:
    return Published(run.store.root / "answers")


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
        "protocol": evaluate.protocol,
    }


# --- Output ----------------------------------------------------------------------------------------------------------


def _write(run: Stage, tasks: Mapping[tuple[Cell, str], Task]) -> Iterator[Result]:
    """Copy what is published, and write the tables; yields the results."""
    place = run.root / outputs.RESULTS
    found = []
    with outputs.folder(place / "evaluate") as folder:
        for (setting, name), task in tasks.items():
            if is_published(task.out):
                path = f"{vlm_folder(setting.vlm)}/{setting.name}/{name}"
                outputs.copy_published(task.out, folder / path)
                found.append(Result.read(setting, name, folder / path, f"{outputs.RESULTS}/evaluate/{path}"))
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
    sets = {name: task.spec["answers"]["data"] for (_, name), task in tasks.items()}
    for setting, found in by.items():
        task = tasks[setting, next(iter(found))]
        shared = {k: v for k, v in task.spec["answers"].items() if k not in ("benchmark", "task", "data", "batch_size")}
        shared |= {"masks": task.spec["masks"], "code": task.spec["answers_code"]}
        identity = canonical({"setting": shared, "data": _data_identity(run, sets), "code": task.code})
        values = {name: result.score["score"] for name, result in found.items()}
        relative = {name: found[name].relative_to(vanilla[setting.vlm].get(name)) for name in found}
        if len(found) == len(run.params.benchmark):
            base = {name: result.score["score"] for name, result in vanilla[setting.vlm].items()}
            values |= _average({
                name: value for name, value in relative.items() if benchmark(name).means_something(base.get(name))
            })  # fmt: skip
        score = next(iter(found.values())).score
        budget = _budget(setting, score["protocol"])
        of_budget = {f"{budget}/{name}": value for name, value in values.items()}
        on = {key: name for name in found for key in (name, f"{name}_relative", f"{budget}/{name}")}
        values |= {f"{name}_relative": value for name, value in relative.items()}
        axes = {**setting.axes, "keep": setting.tokens or setting.share, "seed": setting.seed}
        axes |= {ON: None if setting.pruner is None else setting.pruner.on}
        axes |= {f"option.{name}": value for name, value in setting.options.items() if name not in axes}
        alike = {"setting": {k: v for k, v in shared.items() if k != "keep"}, "code": task.code}
        yield Record(
            fingerprint=hashlib.sha256(identity.encode()).hexdigest()[:24],
            kind="setting",
            name=f"{vlm_folder(setting.vlm)}/{setting.name}",
            params={key: value for key, value in axes.items() if value is not None},
            metrics={key: value for key, value in values.items() if value is not None},
            tags={"pruner": str(score["setting"].get("fingerprint") or ""), "protocol": score["protocol"]},
            datasets=[_dataset(one) for one in found.values()],
            measured_on=on,
            series=None if setting.keep is None else _series(setting, task, axes, canonical(alike)),
            series_metrics={key: value for key, value in of_budget.items() if value is not None},
        )


def _average(relative: Mapping[str, float | None]) -> dict[str, float]:
    """The mean, under a name that says of which benchmarks: a run gets one for each set that it was ever asked."""
    known = {name: value for name, value in relative.items() if value is not None}
    name = "-".join(["average_relative", *(name for name in benchmarks() if name in known)])
    return {name: sum(known.values()) / len(known)} if known else {}


def _dataset(result: Result) -> Dataset:
    """The questions of one benchmark that were asked."""
    asked_ = {"data": result.score["data"], "limit": result.score["limit"]}
    return Dataset.of(result.benchmark, asked_, "evaluation", asked_)


def _series(setting: Cell, task: Task, axes: Mapping[str, Any], alike: str) -> Series:
    """Its trained pruner, or its method with all options: what it shares with the settings of other budgets."""
    pruner = setting.pruner
    if pruner is not None:
        params = {"vlm": pruner.vlm, "layer": pruner.layer, "loss": pruner.loss, "slots": list(pruner.slots)}
        params |= {"seed": pruner.seed, ON: pruner.on, "method": setting.method}
        return Series(Path(task.inputs["pruner"]).name, "pruner", pruner.folder, params)
    params = {key: value for key, value in axes.items() if key not in ("keep", "tokens", "share") and value is not None}
    name = f"{vlm_folder(setting.vlm)}/{replace(setting, keep=None).name}"
    return Series(hashlib.sha256(alike.encode()).hexdigest()[:24], "method", name, params)


def _budget(setting: Cell, protocol: str) -> str:
    """`keep_16`; `keep_16-top_2` where a trained pruner is used otherwise than by `oc-vtp` with one token a slot, and
    `keep_16-paper` where questions are asked as the paper does.
    """
    if setting.keep is None:
        return ""
    words = [f"keep_{setting.tokens or budget_name(setting.keep)}"]
    if setting.pruner is not None:
        words += [] if setting.method == "oc-vtp" else [setting.method]
        words += [] if setting.top_k in (None, 1) else [f"top_{setting.top_k}"]
        words += [ablate.word(change) for change in setting.changes if change[0].startswith(ablate.OPTIONS)]
    return "-".join(words if protocol == NATIVE else [*words, protocol])


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
