"""On Ray and on SLURM the pipeline ends in the bytes of a run on this machine alone."""

import json
import shutil
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
from pipeline_workspace import ROOT, Workspace

if TYPE_CHECKING:
    from ray_cluster import ServerInfo as Ray
    from slurm_cluster import ServerInfo as Slurm

sys.path.insert(0, str(ROOT / "tests" / "cluster"))  # where the servers are
pytest_plugins = ["ray_cluster", "slurm_cluster"]
pytestmark = [pytest.mark.pipeline, pytest.mark.nightly]
RESOURCES = {
    stage: {"cpus": 1, "gpus": 0, "memory_gb": 2.5, "minutes": 20}
    for stage in ("sample", "extract", "train", "evaluate")
}


def of(server: "Ray | Slurm", name: str, monkeypatch: pytest.MonkeyPatch) -> dict:
    """What to change in params.yaml for a run there; the environment is set."""
    for variable, value in {**server.environment, "OCVTP_EXECUTOR": name}.items():
        monkeypatch.setenv(variable, value)
    return {"cluster": {"profile": str(server.profile), "resources": RESOURCES}}


def test_slurm(
    finished: Workspace, new_workspace: Callable[..., Workspace], slurm_server: "Slurm", monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = new_workspace(**of(slurm_server, "slurm", monkeypatch))
    workspace.run("dvc", "repro")
    assert workspace.results() == finished.results()
    assert slurm_server.jobs() == []


def test_ray_and_a_job_that_is_submitted(
    finished: Workspace, new_workspace: Callable[..., Workspace], ray_server: "Ray", monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = new_workspace(**of(ray_server, "ray", monkeypatch))
    workspace.run("dvc", "repro")
    assert workspace.results() == finished.results()

    scores = (workspace.folder / "results/scores.json").read_bytes()
    shutil.rmtree(workspace.folder / "results")
    shutil.rmtree(workspace.folder / ".ocvtp/store/answers")
    monkeypatch.delenv("RAY_ADDRESS")
    environment = {"OCVTP_ROOT": str(workspace.folder), "OCVTP_EXECUTOR": "ray"}
    workspace.run(
        "ray", "job", "submit", "--address", f"http://{ray_server.dashboard}", "--working-dir", str(workspace.folder),
        "--runtime-env-json", json.dumps({"env_vars": environment}),
        "--", sys.executable, "pipelines/eval.py",
    )  # fmt: skip
    assert (workspace.folder / "results/scores.json").read_bytes() == scores
    assert any((workspace.folder / ".ocvtp/store/answers").iterdir())
