"""The pipeline as its users run it: dvc repro, killed and resumed, with ablations, and with mistakes."""

import json
import os
import random
import re
import signal
import time
from collections.abc import Callable

import pytest
import yaml
from pipeline_workspace import Workspace

pytestmark = pytest.mark.pipeline


def test_a_finished_run_is_clean_and_its_table_is_whole(finished: Workspace) -> None:
    assert "up to date" in finished.run("dvc", "status")
    started = time.monotonic()
    assert "up to date" in finished.run("dvc", "repro")
    assert time.monotonic() - started < 60
    scores = json.loads((finished.folder / "results/scores.json").read_text())
    settings = {(row["method"], row["tokens"], row["benchmark"]) for row in scores}
    assert settings == {
        (method, tokens, benchmark)
        for method, budgets in {"vanilla": [144], "random": [48, 16], "oc-vtp": [48, 16]}.items()
        for tokens in budgets
        for benchmark in ("pope", "textvqa")
    }
    assert all(row["n"] >= 24 and row["kept_mean"] == row["tokens"] for row in scores)
    report = (finished.folder / "reports/report.md").read_text()
    assert "Retain 16 Tokens (11.1%)" in report


@pytest.mark.parametrize("moment", [pytest.param(0.25, marks=pytest.mark.nightly), 0.7])
def test_killed_at_a_random_moment_it_ends_in_the_same_bytes(
    moment: float, finished: Workspace, new_workspace: Callable[..., Workspace]
) -> None:
    workspace = new_workspace()
    process = workspace.start("dvc", "repro")
    delay = finished.seconds * (moment + random.SystemRandom().uniform(-0.2, 0.2))
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    print(f"killed after {delay:.1f} s")
    workspace.run("dvc", "repro")
    assert workspace.results() == finished.results()
    leftovers = [path for path in (workspace.folder / ".ocvtp/store").rglob("*") if ".tmp-" in path.name]
    assert leftovers == []


@pytest.mark.parametrize(
    ("setting", "untouched", "axis", "values"),
    [
        pytest.param(
            "keep=[48,32,16]", {"sample", "extract", "train"}, "tokens", {144, 48, 32, 16}, marks=pytest.mark.nightly
        ),
        ("loss=mse", {"sample", "extract"}, "loss", {None, "mse"}),
        pytest.param("layer=-2", {"sample"}, "layer", {None, -2}, marks=pytest.mark.nightly),
    ],
)
def test_another_value_runs_only_what_depends_on_it_and_going_back_runs_nothing(
    setting: str, untouched: set[str], axis: str, values: set[object], finished: Workspace
) -> None:
    before = finished.results()
    printed = finished.run("dvc", "exp", "run", "-S", setting)
    ran = set(re.findall(r"Running stage '(\w+)'", printed))
    assert ran & {"sample", "extract", "train"} == {"sample", "extract", "train"} - untouched
    assert "evaluate" in ran
    rows = json.loads((finished.folder / "results/scores.json").read_text())
    assert {row[axis] for row in rows} == values
    finished.run("git", "checkout", "--", "params.yaml")
    assert "Running stage 'train'" not in finished.run("dvc", "repro"), "DVC's run cache has the earlier outputs"
    assert finished.results() == before


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"kep": 16}, ["kep", "keep"]),
        ({"keep": [400]}, ["keep", "400", "144"]),
        ({"loss": "mae"}, ["loss", "mae", "aw_mse"]),
        ({"layer": 40}, ["layer", "40"]),
    ],
)
def test_a_mistake_in_params_is_named_before_any_work(changes: dict, messages: list[str], finished: Workspace) -> None:
    path = finished.folder / "params.yaml"
    kept, before = path.read_text(), finished.results()
    path.write_text(yaml.safe_dump({**yaml.safe_load(kept), **changes}, sort_keys=False))
    try:
        printed = finished.run("python", "pipelines/eval.py", code=2)
    finally:
        path.write_text(kept)
    assert all(message in printed for message in messages), printed
    assert "Traceback" not in printed
    assert finished.results() == before
