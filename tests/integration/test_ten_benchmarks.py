"""The preset of the README: ten benchmarks on tiny-llava, from scenes to Table 1 of the paper, with averages."""

import csv
import json
import resource
import shlex
from pathlib import Path

import pytest
from pipeline_workspace import ROOT, Workspace

from ocvtp.evaluation.benchmarks import benchmarks

pytestmark = [pytest.mark.pipeline, pytest.mark.nightly, pytest.mark.timeout(3600)]
METHODS = {"random": "Random", "visionzip": "VisionZip", "css": "Column subset", "oc-vtp": "OC-VTP"}
BLOCKS = {48: "192 Tokens (33.3%)", 32: "128 Tokens (22.2%)", 16: "64 Tokens (11.1%)"}
MINUTES = 15
"""Of CPU, that the preset may take."""


def preset() -> list[str]:
    """The command as the README gives it."""
    lines = [line for line in (ROOT / "README.md").read_text().splitlines() if "benchmark=all" in line]
    assert len(lines) == 1, "the README gives the preset once"
    return shlex.split(lines[0], comments=True)


def cpu() -> float:
    """Seconds of all that was started here and has ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_table_1_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OCVTP_STORE", raising=False)
    workspace, before = Workspace(tmp_path, {}), cpu()
    workspace.run(*preset())
    minutes = (cpu() - before) / 60
    print(f"{minutes:.1f} minutes of CPU")
    scores = json.loads((tmp_path / "results/scores.json").read_text())
    assert {(row["method"], row["tokens"], row["benchmark"]) for row in scores} == {
        (method, tokens, name)
        for method, tokens in (("vanilla", 144), *((method, keep) for method in METHODS for keep in BLOCKS))
        for name in benchmarks()
    }
    assert all(row["score"] is not None for row in scores)
    vanilla = {row["benchmark"]: row["score"] for row in scores if row["method"] == "vanilla"}
    assert min(vanilla[name] for name in ("gqa", "pope", "textvqa", "vqav2", "vizwiz")) > 0.4
    with (tmp_path / "reports/tables/table1-tiny-llava.csv").open() as file:
        rows = {(row["block"], row["Method"]): row for row in csv.DictReader(file)}
    labels = [*(entry.label for entry in benchmarks().values()), "Avg"]
    for place in (("576 Tokens (100%)", "Vanilla"), *((b, m) for b in BLOCKS.values() for m in METHODS.values())):
        assert all(rows[place][label] for label in labels), place
    summary = json.loads((tmp_path / "results/summary.json").read_text())
    assert all(row["average"]["relative"] is not None for row in summary), "over what the unpruned model knows"
    assert (tmp_path / "reports/figures/tiny-llava-accuracy.png").is_file()
    assert minutes < MINUTES
