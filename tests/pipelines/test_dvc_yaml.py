"""dvc.yaml says of each stage what the code says: entries that it reads, and code that it runs."""

import ast
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.fingerprint import parts, source_of
from pipelines.params.model import READS, Params
from pipelines.stage.context import ROOT

STAGES: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
SCRIPTS = {name: stage["cmd"].removeprefix("python ") for name, stage in STAGES.items()}
HOW = {"pipelines.tracking", "pipelines.spool", "pipelines.stage.command", "pipelines.stage.dry_run"}
"""Change nothing that comes out."""


def test_there_are_these_seven_stages_and_each_runs_its_script() -> None:
    assert list(STAGES) == ["sample", "extract", "train", "evaluate", "measure", "efficiency", "report"]
    assert all((ROOT / script).is_file() for script in SCRIPTS.values())


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_lists_the_entries_that_it_may_read(name: str) -> None:
    listed = STAGES[name].get("params", [])
    assert sorted(listed) == sorted(READS[name])
    assert not set(listed) & {"cluster", "mlflow"}
    assert {entry.split(".")[0] for entry in listed} <= set(Params.model_fields)


@pytest.mark.parametrize("name", [name for name in STAGES if name != "report"])
def test_a_stage_reads_every_entry_that_it_lists(name: str) -> None:
    """By its own source and that of the grid, which reads the axes for it."""
    read = _attributes_of(ROOT / SCRIPTS[name], "params")
    grid = ("settings", "_of_method")
    used = {
        "sample": ("trained_on",), "extract": ("token_sets",), "train": ("pruner_cells",), "evaluate": grid,
        "measure": grid,
    }.get(name)  # fmt: skip
    if used:
        read |= _attributes_of(ROOT / "pipelines/grid.py", "params", inside=used)
    assert set(READS[name]) - read == set()
    sections = {entry.split(".")[0] for entry in READS[name]}
    assert (read & set(Params.model_fields)) - sections <= {"cluster", "mlflow"}


def _attributes_of(path: Path, owner: str, inside: tuple[str, ...] = ()) -> set[str]:
    """x, and x.y, of every `params.x.y` or `run.params.x.y` in a file, or in some of its functions."""
    tree: Any = ast.parse(path.read_text())
    parts = (
        [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in inside] if inside else [tree]
    )
    found = set()
    for node in (node for part in parts for node in ast.walk(part)):
        if isinstance(node, ast.Attribute):
            value = node.value
            if getattr(value, "id", getattr(value, "attr", "")) == owner:
                found.add(node.attr)
            above = getattr(value, "value", None)
            if getattr(above, "id", getattr(above, "attr", "")) == owner:
                found.add(f"{value.attr}.{node.attr}")
    return found


def _covered(path: str, deps: list[str]) -> bool:
    return any(path == dep or path.startswith(f"{dep}/") for dep in deps)


def _file(module: str) -> str:
    source = source_of(module)
    assert source is not None, module
    return source.resolve().relative_to(ROOT).as_posix()


def _imported(script: str) -> set[str]:
    """First-party modules that a script imports by itself."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / script).read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in ("ocvtp", "pipelines"):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if source_of(name) else node.module for name in names}
    return found


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_depends_on_all_code_that_makes_its_output(name: str) -> None:
    direct = _imported(SCRIPTS[name])
    behind = {inner for module in direct if module.startswith("pipelines.tasks.") for inner in parts(module)}
    shared = {inner for module in direct - HOW if module.startswith("pipelines.") for inner in parts(module)}
    wanted = direct | behind | {module for module in shared if module.startswith("pipelines.")}
    ignored = HOW | {"ocvtp", "pipelines", "pipelines.tasks", "ocvtp.errors"}
    files = {_file(module) for module in wanted - ignored} | {SCRIPTS[name]}
    assert sorted(path for path in files if not _covered(path, STAGES[name]["deps"])) == []


@pytest.mark.parametrize("name", STAGES)
def test_every_dependency_is_there_or_comes_from_an_earlier_stage(name: str) -> None:
    before = list(STAGES)[: list(STAGES).index(name)]
    made = [out for stage in before for out in STAGES[stage]["outs"]]
    for dep in STAGES[name]["deps"]:
        assert (ROOT / dep).exists() or _covered(dep, made), dep
    assert STAGES[name]["deps"] == sorted(STAGES[name]["deps"])
    assert not any(_covered(dep, ["cluster", ".ocvtp", "params.yaml"]) for dep in STAGES[name]["deps"])
    assert not {"pipelines/tracking.py", "pipelines/spool.py"} & set(STAGES[name]["deps"])


def test_outputs_are_not_in_git_but_for_the_metrics() -> None:
    outs = [out if Path(out).suffix else f"{out}/x" for stage in STAGES.values() for out in stage["outs"]]
    done = subprocess.run(["git", "check-ignore", *outs], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr  # DVC itself needs the git repository
    assert done.stdout.split() == outs
    metrics = subprocess.run(["git", "check-ignore", "results/metrics.json"], cwd=ROOT, check=False)
    assert metrics.returncode == 1
