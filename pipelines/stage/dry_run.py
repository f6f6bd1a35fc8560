"""`--dry-run` of a stage: what it would run and why. Nothing is run, and nothing is written or changed.

A stage plans with what earlier stages have put out; where that is not what they would put out now, it says so first.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from cluster import Task
from cluster.driver.plan import explain, fault_of
from cluster.store.publish import About
from ocvtp.errors import OcvtpError
from pipelines.stage import outputs
from pipelines.stage.context import Stage, open_stage

SCRIPTS = {"sample": "sample", "extract": "extract", "train": "train", "evaluate": "eval", "measure": "measure"}
"""Stages with tasks, in their order, each with its script."""
LISTINGS = {"sample": f"{outputs.SAMPLE}/*.json", "extract": f"{outputs.TOKENS}/*/*.json", "train": outputs.PRUNERS}
"""Where outputs name the results of the store that they stand for."""
OTHERS, NOTHING = "has put out what other parameters, data or code asked for", "has put out nothing"
WHOLE = ("questions", "pruners")
"""Kinds that an output holds whole: stages put them back if the store lacks them."""


@dataclass(frozen=True)
class Plan:
    """What a stage would do.

    Attributes:
        tasks: whose results it puts out.
        ready: keys of those that it publishes without running them.
        spec_of: as for `cluster.driver.plan.explain`.
        last: what it would do beside or after them.
    """

    tasks: list[Task]
    ready: frozenset[str] = frozenset()
    spec_of: Callable[[About], dict[str, Any]] = lambda about: about.spec
    last: list[str] = field(default_factory=list)


def say(run: Stage, plan: Callable[[Stage], Plan], file: Path | None) -> Iterator[str]:
    """The lines of a dry run.

    Raises:
        BadInput: the output of an earlier stage is missing; names the command that makes it.
    """
    yield from behind(run.name, file, run.root)
    found = plan(run)
    for kind in explain((task for task in found.tasks if task.key not in found.ready), run.store, found.spec_of):
        yield from kind.lines()
    yield from run.notes
    yield from found.last


def behind(name: str, file: Path | None, root: Path) -> Iterator[str]:
    """Of each earlier stage whose output is not what it would put out now, why, and the command for it.

    Only of the first that has put out nothing: later ones have nothing to plan with.
    """
    stages = [*SCRIPTS, "report"]
    for earlier in stages[: stages.index(name)] if name in stages else ():
        run = open_stage(earlier, file, root, dry=True)
        command = f"`python pipelines/{SCRIPTS[earlier]}.py`"
        if earlier == "sample" and run.params.sample.source == "coco":
            yield f"stage sample is not looked at (it reads the whole data set): {command} --dry-run does that"
            continue
        try:
            why = _why_behind(run, import_module(f".{SCRIPTS[earlier]}", "pipelines").plan(run))
        except OcvtpError as error:
            why = f"cannot be planned ({error})"
        if why:
            yield f"stage {earlier} {why}: run {command} or `dvc repro` first"
        if why == NOTHING:
            return


def _why_behind(run: Stage, plan: Plan) -> str:
    if run.name in LISTINGS:
        texts = [path.read_text(encoding="utf-8") for path in run.root.glob(LISTINGS[run.name])]
        kinds = "|".join({task.kind for task in plan.tasks})
        listed = {key for text in texts for key in re.findall(rf"\b(?:{kinds})/([0-9a-f]{{24}})\b", text)}
        if listed != {task.key for task in plan.tasks}:
            return OTHERS if texts else NOTHING
    lacking = [task for task in plan.tasks if task.kind not in WHOLE and not fault_of(task.out)[1]]
    return f"lacks {len(lacking)} of its {len(plan.tasks)} results in the store" if lacking else ""
