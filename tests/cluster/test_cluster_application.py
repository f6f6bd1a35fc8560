"""What `cluster` knows of the application that uses it: what it is told, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path
from typing import ClassVar

import pytest

import cluster
from cluster import BadConfig, ClusterConfig


class Mine(ClusterConfig):
    """Of an application."""

    application: ClassVar[str] = "mine"


def test_an_application_has_variables_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLUSTER_STORE", "/not this")
    monkeypatch.setenv("MINE_STORE", "/this")
    assert Mine.from_params({"tries": 5}) == Mine(store=Path("/this"), tries=5)
    monkeypatch.setenv("MINE_EXECUTOR", "nowhere")
    with pytest.raises(BadConfig, match=r"cluster.executor: 'nowhere' \(MINE_EXECUTOR\) is no executor"):
        Mine.from_params()


def test_cluster_names_no_application() -> None:
    """It is told what it needs to know of one, so that another can use it as it is."""
    home = Path(cluster.__file__).parent
    files = [path for path in home.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert len(files) > 30
    named = re.compile(r"ocvtp|pipelines|params\.yaml", re.IGNORECASE)
    assert [str(path) for path in files if named.search(f"{path.relative_to(home)} {path.read_text()}")] == []
