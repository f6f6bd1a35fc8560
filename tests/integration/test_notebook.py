"""docs/results.ipynb runs on the store of a finished pipeline and says what its results say."""

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
from pipeline_workspace import ROOT, Workspace

NOTEBOOK = ROOT / "docs" / "results.ipynb"


def cells() -> list[dict[str, Any]]:
    """Of code."""
    return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]


def test_it_holds_no_outputs() -> None:
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells())


@pytest.mark.pipeline
def test_it_runs(finished: Workspace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mpl.use("Agg")
    monkeypatch.setenv("OCVTP_STORE", str(finished.folder / ".ocvtp" / "store"))
    monkeypatch.chdir(tmp_path)
    said: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(cells()):
        exec(compile("".join(cell["source"]), f"{NOTEBOOK.name}, cell {number}", "exec"), said)
    summary = json.loads((finished.folder / "results" / "summary.json").read_text())
    averages = {(row["vlm"], row["method"], row["tokens"]): row["average"]["relative"]
                for row in summary if row["method"] != "vanilla"}  # fmt: skip
    table = said["table"].stack().to_dict()
    assert set(averages) <= set(table), "other tests may have evaluated more"
    assert all(table[key] == pytest.approx(value) for key, value in averages.items())
    labels = {line.get_label() for line in said["axes"].get_lines()}
    assert {"oc-vtp (tiny-llava)", "random (tiny-llava)"} <= labels
    assert all(line["score"] == 0 for line in said["lost"])
