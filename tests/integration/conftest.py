"""Fixtures that run the pipeline."""

import time
from collections.abc import Callable

import pytest
from pipeline_workspace import SMALL, Workspace


@pytest.fixture(scope="session")
def new_workspace(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Workspace]:
    """Make workspaces: `new_workspace(**changes of params.yaml)`."""

    def make(**changes: object) -> Workspace:
        return Workspace(tmp_path_factory.mktemp("workspace"), {**SMALL, **changes})

    return make


@pytest.fixture(scope="session")
def finished(new_workspace: Callable[..., Workspace]) -> Workspace:
    """A workspace in which `dvc repro` has run undisturbed."""
    workspace = new_workspace()
    started = time.monotonic()
    workspace.run("dvc", "repro")
    workspace.seconds = time.monotonic() - started
    return workspace
