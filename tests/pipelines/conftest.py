"""A repository with MLflow's store in a file."""

from pathlib import Path

import pytest

from cluster import ClusterConfig
from pipelines.params.load import load
from pipelines.stage.context import ROOT, Stage


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository whose sqlite store is made once: that takes mlflow many seconds. Tests use experiments of it."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def stage(home: Path, request: pytest.FixtureRequest) -> Stage:
    """A stage whose records go to an experiment of the test's own."""
    params = load(ROOT / "params.yaml")
    mlflow = params.mlflow.model_copy(update={"experiment": request.node.name})
    return Stage(
        "train",
        params.model_copy(update={"mlflow": mlflow}).seen_by("train"),
        home,
        ClusterConfig(store=home / "store"),
    )
