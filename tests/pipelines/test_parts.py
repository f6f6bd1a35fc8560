"""Parts of a published folder live on as results of their own, and are read once."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from cluster import CorruptResult, Store, drop, verify
from cluster.store import verdicts
from cluster.store.layout import new_attempt
from cluster.store.publish import About, publish
from cluster.store.workspace import Workspace
from pipelines.stage.parts import adopt, remember_linked


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def whole(store: Store) -> Path:
    out = store.path("passes", "whole")
    workspace = Workspace.claim(out, new_attempt())
    (workspace.folder / "deep" / "er").mkdir(parents=True)
    (workspace.folder / "deep" / "er" / "data.bin").write_bytes(bytes(range(250)) * 4)
    (workspace.folder / "rest").write_text("of no layer")
    assert publish(workspace, About("whole", "passes", "module:call", {"x": 3}, "code"))
    time.sleep(0.05)
    return out


def contents(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_adopting_shares_the_bytes_and_outlives_the_source(store: Store, whole: Path) -> None:
    out = store.path("layer", "abc")
    adopt(whole / "deep", out)
    assert (out / "er" / "data.bin").stat().st_ino == (whole / "deep" / "er" / "data.bin").stat().st_ino
    before = contents(out)
    adopt(whole / "deep", out)
    drop(whole)
    assert contents(out) == before
    manifest = verify(out)
    assert (manifest.about.part, manifest.about.spec, manifest.about.key) == ("deep", {"x": 3}, "abc")
    assert [path for path in out.parent.iterdir() if path != out] == []


def test_adopting_a_corrupt_file_fails_and_leaves_nothing(store: Store, whole: Path) -> None:
    (whole / "deep" / "er" / "data.bin").write_bytes(b"?" * 1000)
    out = store.path("layer", "abc")
    with pytest.raises(CorruptResult, match=r"er/data.bin"):
        adopt(whole / "deep", out)
    assert list(out.parent.iterdir()) == []


def test_links_made_and_dropped_are_not_read_again_but_a_change_meanwhile_is(whole: Path, tmp_path: Path) -> None:
    for change in (False, True):
        before = verdicts.marks(whole)
        verify(whole)
        other = tmp_path / "other"
        os.link(whole / "rest", other)
        if change:
            other.write_text("OF no layer")
        other.unlink()
        verdicts.remember(whole, [])
        remember_linked({whole: before})
        assert verdicts.recall(whole) == ([] if change else verdicts.marks(whole))
    with pytest.raises(CorruptResult, match="other content"):
        verify(whole, remembered=True)
