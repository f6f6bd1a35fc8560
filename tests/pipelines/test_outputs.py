"""Outputs are exact: nothing of an earlier grid, nothing half, nothing that differs from its checksum."""

from pathlib import Path

import pytest

from cluster import Corrupt, Store, run
from pipelines.stage import outputs
from pipelines.tasks.scenes import scenes


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_what_an_earlier_grid_left_is_gone(tmp_path: Path) -> None:
    target = tmp_path / "data" / "tokens"
    for wanted in (["a", "b/c"], ["b/c", "d"]):
        with outputs.folder(target) as fresh:
            for name in wanted:
                outputs.write_text(fresh / name, name)
        assert names(target) == wanted
    assert [path.name for path in target.parent.iterdir()] == ["tokens"]


def test_an_error_leaves_the_old_output_as_it_was(tmp_path: Path) -> None:
    target = tmp_path / "results"
    with outputs.folder(target) as fresh:
        outputs.write_text(fresh / "old", "old")

    def fail() -> None:
        with outputs.folder(target) as fresh:
            outputs.write_text(fresh / "new", "new")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert names(tmp_path) == ["results/old"]


def test_what_a_killed_stage_left_is_swept(tmp_path: Path) -> None:
    (tmp_path / ".results.fresh-0badcafe").mkdir()
    (tmp_path / ".results.fresh-0badcafe" / "half").touch()
    with outputs.folder(tmp_path / "results") as fresh:
        outputs.write_text(fresh / "whole", "")
    assert names(tmp_path) == ["results/whole"]


def test_equal_data_is_equal_text_and_not_a_number_is_refused(tmp_path: Path) -> None:
    outputs.write_json(tmp_path / "a.json", {"x": [1, 2.5, "é"]})
    outputs.write_json(tmp_path / "b.json", {"x": [1, 2.5, "é"]})
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    with pytest.raises(ValueError, match="JSON"):
        outputs.write_json(tmp_path / "a.json", float("nan"))
    assert "é" in (tmp_path / "a.json").read_text(encoding="utf-8")


@pytest.fixture
def published(tmp_path: Path) -> Path:
    task = Store(tmp_path / "store").task("scenes", "four", scenes, {"seed": 0, "first": 0, "count": 4})
    from cluster import ClusterConfig

    run([task], config=ClusterConfig(store=tmp_path / "store", workers=1)).raise_if_failed()
    return task.out


def test_a_published_result_is_copied_as_it_is_or_not_at_all(published: Path, tmp_path: Path) -> None:
    manifest = outputs.copy_published(published, tmp_path / "copy", leave=("instances.json",))
    assert names(tmp_path / "copy") == [f"images/train-{index:06d}.jpg" for index in range(4)]
    sums = {file.path: file.sha256 for file in manifest.files if file.path != "instances.json"}
    assert outputs.checksums(tmp_path / "copy") == sums
    victim = published / "images" / "train-000002.jpg"
    data = bytearray(victim.read_bytes())
    data[100] ^= 1
    victim.write_bytes(bytes(data))
    with pytest.raises(Corrupt, match=r"train-000002\.jpg has other content"):
        outputs.copy_published(published, tmp_path / "second")
    victim.unlink()
    with pytest.raises(Corrupt, match=r"train-000002\.jpg is missing"):
        outputs.copy_published(published, tmp_path / "third")
