"""A package outside the repository adds a method by an entry point; keys hold the code of their own method alone."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from small_params import write_params

from cluster import fingerprint
from ocvtp.methods import REGISTRY
from pipelines.inputs import method_code
from pipelines.stage.context import ROOT

SMALL: dict[str, Any] = {
    "method": ["vanilla", "corners", "corners+fastv"],
    "keep": [60],
    "benchmark": ["pope"],
    "seed": 0,
    "sample": {"images": 8, "questions": 4},
    "evaluate": {"bootstrap": 100},
    "mlflow": {"enabled": False},
}
METHOD = """
    import torch
    from ocvtp.methods import Entry, Kept, Method

    class Corners(Method):
        def choose(self, encoded):
            count, keep = encoded.count, encoded.keep
            numbers = torch.cat([torch.arange(keep - keep // 2), torch.arange(count - keep // 2, count)])
            return Kept(numbers.expand(len(encoded.members), -1))

    ENTRY = Entry(name="corners", build=lambda family, pruner, options: Corners(), source="a test")
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """As pip leaves it: the package, and beside it what its metadata say."""
    site = tmp_path / "site"
    (site / "corner_pruning").mkdir(parents=True)
    (site / "corner_pruning/__init__.py").write_text('FIRST_PARTY = ("ocvtp",)\n')
    (site / "corner_pruning/method.py").write_text(textwrap.dedent(METHOD))
    about = site / "corner_pruning-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: corner-pruning\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[ocvtp.methods]\ncorners = corner_pruning.method:ENTRY\n")
    return site


def run(package: Path, root: Path, script: str, *more: str) -> str:
    environment = {**os.environ, "OCVTP_ROOT": str(root), "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"}
    environment.pop("DVC_STAGE", None)
    arguments = [sys.executable, str(ROOT / "pipelines" / script), *write_params(root, {}, SMALL), *more]
    done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.mark.pipeline
def test_its_method_is_evaluated_and_only_its_own_evaluations_run_again(package: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    run(package, root, "sample.py")
    run(package, root, "eval.py")
    rows = {row["method"]: row for row in json.loads((root / "results/summary.json").read_text())}
    assert set(rows) == {"vanilla", "corners", "corners+fastv"}
    (samples,) = (root / "results/evaluate").glob("*/corners-60/pope/samples.jsonl")
    kept = json.loads(samples.read_text().splitlines()[0])["kept"]
    assert kept == [*range(30), *range(114, 144)]
    path = package / "corner_pruning/method.py"
    path.write_text(path.read_text().replace("numbers = ", "numbers = 0 + "))
    told = run(package, root, "eval.py", "--dry-run")
    assert "2 of 3" in told or "1 published" in told.replace("\n", " "), told


def test_a_key_holds_the_code_of_its_own_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change in one method changes its own code and that of pairs with it."""
    names = ["css", "scope", "holov", "fastv", "holov+fastv", "vscan", "random"]
    before = {name: method_code(name) for name in names}
    source = fingerprint.source_of
    changed = tmp_path / "holov.py"
    changed.write_text((ROOT / "ocvtp/methods/holov.py").read_text() + "\nMORE = 1\n")
    fingerprint.forget()
    monkeypatch.setattr(
        fingerprint, "source_of", lambda name: changed if name == "ocvtp.methods.holov" else source(name)
    )
    after = {name: method_code(name) for name in names}
    monkeypatch.undo()
    fingerprint.forget()
    assert {name for name in names if before[name] != after[name]} == {"holov", "holov+fastv"}
    assert before["vscan"].keys() == {"vscan"}


def test_no_task_imports_every_method() -> None:
    for task in ("answers", "measures", "pruners"):
        covered = {part.rpartition(".")[2] for part in fingerprint.parts(f"pipelines.tasks.{task}")
                   if part.startswith("ocvtp.methods.")}  # fmt: skip
        own = {module.rpartition(".")[2] for name in REGISTRY for module in REGISTRY.modules(name).values()}
        assert not covered & own
    # A pruner's own file of options for editors is in no key either.
    assert "ocvtp.pruning.options" not in fingerprint.parts("pipelines.tasks.answers")
