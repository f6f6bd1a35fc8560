"""docs/architecture.md names what there is, and the rooms stay small enough to see through."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
PATHS = sorted(set(re.findall(r"`([\w./-]+(?:/|\.(?:py|yaml|md)))`", TEXT)))
MADE_BY_ROOM = {"load.py", "model.py", "crosscheck.py", "default.yaml"}
"""Named without their room, which stands beside them."""
MOST_MODULES, MOST_LINES = 15, 5000
"""Modules of a folder, and lines of `cluster`: whoever adds to it takes something away."""


@pytest.mark.parametrize("path", [path for path in PATHS if path not in MADE_BY_ROOM])
def test_a_path_that_the_page_names_is_there(path: str) -> None:
    assert (ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file()


def test_the_page_names_every_room() -> None:
    rooms = {f"pipelines/{name}/" for name in ("params", "tasks", "stage", "report_html")}
    rooms |= {f"cluster/{name}/" for name in ("driver", "store", "worker", "local", "ray", "slurm")}
    assert rooms <= set(PATHS)
    assert {f"pipelines/params/{name}" for name in MADE_BY_ROOM if name.endswith(".py")} <= {
        path.relative_to(ROOT).as_posix() for path in (ROOT / "pipelines/params").iterdir()
    }
    assert len(TEXT.splitlines()) <= 60, "a page, not a book"


def test_no_folder_has_too_many_modules() -> None:
    folders = {path.parent for package in ("ocvtp", "cluster", "pipelines") for path in (ROOT / package).rglob("*.py")}
    sizes = {folder.relative_to(ROOT).as_posix(): _modules(folder) for folder in folders}
    sizes.pop("ocvtp/methods")  # one file a method
    assert {folder: count for folder, count in sizes.items() if count > MOST_MODULES} == {}


def _modules(folder: Path) -> int:
    return sum(path.name not in ("__init__.py", "__main__.py") for path in folder.glob("*.py"))


def test_cluster_stays_small() -> None:
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in (ROOT / "cluster").rglob("*.py"))
    assert lines <= MOST_LINES


def test_workers_do_without_pydantic() -> None:
    workers = "cluster.slurm.worker, cluster.worker.attempt"
    code = f"import sys, {workers}; sys.exit('pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
