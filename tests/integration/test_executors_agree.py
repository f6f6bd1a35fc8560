"""On Ray and on SLURM the pipeline ends in the bytes of a run on this machine alone, interrupted or not."""

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
from pipeline_workspace import ROOT, Workspace

if TYPE_CHECKING:
    from ray_cluster import ServerInfo as Ray
    from slurm_cluster import ServerInfo as Slurm

sys.path.insert(0, str(ROOT / "tests" / "cluster"))  # where the servers are
pytest_plugins = ["ray_cluster", "slurm_cluster"]
pytestmark = pytest.mark.pipeline
RESOURCES = {
    stage: {"cpus": 1, "gpus": 0, "memory_gb": 2.5, "minutes": 20}
    for stage in ("sample", "extract", "train", "evaluate")
}


def of(server: "Ray | Slurm", name: str, monkeypatch: pytest.MonkeyPatch) -> dict:
    """What to change in params.yaml for a run there; the environment is set."""
    for variable, value in {**server.environment, "OCVTP_EXECUTOR": name}.items():
        monkeypatch.setenv(variable, value)
    return {"cluster": {"profile": str(server.profile), "resources": RESOURCES}}


def answers(workspace: Workspace, methods: list[str]) -> dict[str, bytes]:
    """Of each setting and benchmark all answers, whatever the tasks that they came in."""
    found: dict[str, dict[int, bytes]] = {}
    for path in (workspace.folder / ".ocvtp/store/answers").iterdir():
        spec = json.loads((path / "manifest.json").read_text())["spec"]
        if spec["method"] in methods:
            name = f"{spec['method']} {spec['keep']} {spec['benchmark']}"
            found.setdefault(name, {})[spec["shard"][0]] = (path / "answers.jsonl").read_bytes()
    return {name: b"".join(text for _, text in sorted(shards.items())) for name, shards in found.items()}


def evaluate_in_shards(workspace: Workspace, finished: Workspace) -> None:
    """Evaluate anew what the finished run evaluated in one task a benchmark: in 1, 3 and 7 each, to the same bytes."""
    for made in ("data", "models", ".ocvtp/store"):
        shutil.copytree(finished.folder / made, workspace.folder / made)
    store, methods = workspace.folder / ".ocvtp/store", ["vanilla", "random"]
    keys = {path.name for path in (store / "scores").iterdir()}
    for count in (1, 3, 7):
        for kind in ("answers", "scores"):
            shutil.rmtree(store / kind)
        workspace.change(method=methods, evaluate={"shards": count})
        workspace.run("python", "pipelines/eval.py")
        assert len(list((store / "answers").iterdir())) == 6 * count
        assert answers(workspace, methods) == answers(finished, methods)
        assert {path.name for path in (store / "scores").iterdir()} < keys
        ours, theirs = (
            {name: digest for name, digest in one.results().items() if name.startswith("results/evaluate/")}
            for one in (workspace, finished)
        )
        assert len(ours) == 12
        assert ours.items() < theirs.items()


def hurt(workspace: Workspace, finished: Workspace, how: Callable[[int], object]) -> list[str]:
    """Train anew, and call `how` with the pid of the training once there is a checkpoint: how attempts ended."""
    for made in ("data", ".ocvtp/store/tokens"):
        shutil.copytree(finished.folder / made, workspace.folder / made)
    store = workspace.folder / ".ocvtp/store"
    process = workspace.start("python", "pipelines/train.py")
    while not (begun := list(store.glob("pruners/.*/result/resume/step-*.json"))) and process.poll() is None:
        time.sleep(0.05)
    assert begun, process.communicate()[0]
    how(json.loads((begun[0].parents[2] / "owner.json").read_text())["process"]["pid"])
    output = process.communicate()[0]
    assert process.returncode == 0, output
    (path,) = store.glob("logs/*/attempts.jsonl")
    return [json.loads(line)["cause"] for line in path.read_text().splitlines()]


def pruners(workspace: Workspace) -> dict[str, str]:
    """Digests of all that stage `train` puts out."""
    return {name: digest for name, digest in workspace.results().items() if name.startswith("models")}


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


@pytest.mark.nightly  # test_slurm.py has a task that takes too long, test_pruner_checkpoints.py a training that goes on
def test_a_training_whose_time_is_over_ends_in_the_same_bytes_on_slurm(
    finished: Workspace, new_workspace: Callable[..., Workspace], slurm_server: "Slurm", monkeypatch: pytest.MonkeyPatch
) -> None:
    def over(_: int) -> None:
        (job,) = slurm_server.jobs()
        slurm_server.command("scancel", "--signal=USR2", job)  # as SLURM does before the limit

    workspace = new_workspace(**of(slurm_server, "slurm", monkeypatch))
    assert hurt(workspace, finished, over) == ["timeout", "done"]
    assert pruners(workspace) == pruners(finished)


@pytest.mark.nightly
def test_a_training_that_is_killed_ends_in_the_same_bytes_on_ray(
    finished: Workspace, new_workspace: Callable[..., Workspace], ray_server: "Ray", monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = new_workspace(**of(ray_server, "ray", monkeypatch))
    assert hurt(workspace, finished, kill) == ["crashed", "done"]
    assert pruners(workspace) == pruners(finished)


@pytest.mark.nightly
def test_a_training_that_is_killed_ends_in_the_same_bytes_here(
    finished: Workspace, new_workspace: Callable[..., Workspace]
) -> None:
    workspace = new_workspace()
    assert hurt(workspace, finished, kill) == ["crashed", "done"]
    assert pruners(workspace) == pruners(finished)


@pytest.mark.nightly
def test_answers_in_one_three_and_seven_shards_end_in_the_same_bytes_on_slurm(
    finished: Workspace, new_workspace: Callable[..., Workspace], slurm_server: "Slurm", monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate_in_shards(new_workspace(**of(slurm_server, "slurm", monkeypatch)), finished)
    assert slurm_server.jobs() == []


@pytest.mark.nightly
def test_answers_in_one_three_and_seven_shards_end_in_the_same_bytes_on_ray(
    finished: Workspace, new_workspace: Callable[..., Workspace], ray_server: "Ray", monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate_in_shards(new_workspace(**of(ray_server, "ray", monkeypatch)), finished)


@pytest.mark.nightly
def test_slurm(
    finished: Workspace, new_workspace: Callable[..., Workspace], slurm_server: "Slurm", monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = new_workspace(**of(slurm_server, "slurm", monkeypatch))
    workspace.run("dvc", "repro")
    assert workspace.results() == finished.results()
    assert slurm_server.jobs() == []


@pytest.mark.nightly
def test_ray_and_a_job_that_is_submitted(
    finished: Workspace, new_workspace: Callable[..., Workspace], ray_server: "Ray", monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = new_workspace(**of(ray_server, "ray", monkeypatch))
    workspace.run("dvc", "repro")
    assert workspace.results() == finished.results()

    scores = (workspace.folder / "results/scores.json").read_bytes()
    shutil.rmtree(workspace.folder / "results")
    for kind in ("answers", "scores"):
        shutil.rmtree(workspace.folder / ".ocvtp/store" / kind)
    monkeypatch.delenv("RAY_ADDRESS")
    environment = {"OCVTP_ROOT": str(workspace.folder), "OCVTP_EXECUTOR": "ray"}
    workspace.run(
        "ray", "job", "submit", "--address", f"http://{ray_server.dashboard}", "--working-dir", str(workspace.folder),
        "--runtime-env-json", json.dumps({"env_vars": environment}),
        "--", sys.executable, "pipelines/eval.py",
    )  # fmt: skip
    assert (workspace.folder / "results/scores.json").read_bytes() == scores
    assert any((workspace.folder / ".ocvtp/store/answers").iterdir())
