from __future__ import annotations

import sys
from pathlib import Path

import pytest

from cluster import ClusterConfig, Store
from cluster.store import layout

# The calls of the tests are a module of their own: workers import it by name.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CLUSTER_EXECUTOR", "CLUSTER_STORE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def config(store: Store) -> ClusterConfig:
    return ClusterConfig(store=store.root, workers=2)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Back-off without the waiting."""
    monkeypatch.setattr(layout, "PAUSES", (0.0, 0.0, 0.0, 0.0))
