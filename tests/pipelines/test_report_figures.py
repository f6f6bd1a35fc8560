"""The paper's figures with our numbers in them: 1, accuracy against tokens, and 3, time to the first token."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from paper_results import PAPER, of_the_paper
from report_results import write_results

from ocvtp import figures
from ocvtp.errors import Corrupt
from pipelines.report_html import charts, facts, names
from pipelines.report_html.data import Results, load
from pipelines.report_html.page import documents
from pipelines.report_html.rerun import NEVER, rerun

GPU = {
    "machine": {"device": "NVIDIA H200"},
    "vlms": [{"vlm": "llava-1.5-7b", "tables": [
        {"batch": 8, "new_tokens": 1, "tokens": 576, "rows": [
            {"method": name, "kept": kept, "ms": {"first_token": ms}}
            for name, kept, ms in (("vanilla", 576, 160.0), ("random", 64, 72.0), ("random", 128, 99.0),
                                   ("oc-vtp-untrained", 64, 80.0), ("css", 64, 90.0))]},
        {"batch": 1, "new_tokens": 32, "tokens": 576, "rows": [
            {"method": "vanilla", "kept": 576, "ms": {"first_token": 1.0}}]},
    ]}],
}  # fmt: skip
"""What benchmarks/gpu.py writes, in short: one table at the paper's budget and to the first token."""


def test_figure_3_has_the_papers_bars_beside_what_was_measured(tmp_path: Path) -> None:
    place = tmp_path / "benchmarks" / "results"
    place.mkdir(parents=True)
    (place / "gpu-h200-2026-11-26.json").write_text(json.dumps(GPU))
    results = Results(tmp_path, [], of_the_paper().summary, paper=PAPER)
    table = facts.figure3_table(results)
    assert table is not None
    assert list(table.head) == ["Method", "paper, V100", "h200-2026-11-26, batch 8"]
    small, large = ({line.label: [(c.top, c.bottom) for c in line.cells] for line in b.lines} for b in table.blocks)
    dash = (names.DASH, "")
    assert small == {  # an image: an eighth of the batch
        "Vanilla": [("305.4", "100.0%"), ("20.0", "100.0%")], "Random": [dash, ("9.0", "45.0%")],
        "HiPrune": [dash, dash], "OC-VTP": [("138.2", "45.3%"), ("10.0", "50.0%")],
    }  # fmt: skip
    assert large["OC-VTP"] == [("287.3", "35.4%"), dash]
    assert "random weights" in table.note
    drawn = (facts.figure3(results, "svg") or b"").decode()
    for said in ("305.4 ms", "138.2 ms", "10.0 ms", "9.0 ms", "811.8 ms", "batch 8", "OC-VTP"):
        assert said in drawn, said
    assert "12.4 ms" not in drawn, "128 tokens are another budget"
    files = documents(results)
    assert 'id="table-figure3"' in files["index.html"].decode()
    assert "figures/figure3.png" in files["report.md"].decode()
    (measured,) = [one.measured for one in rerun(results) if one.where == "Figure 3"]
    said = "random weights: 50% of the unpruned model's time to the first token"
    assert measured[0].endswith(NEVER)
    assert measured[1:] == [f"LLaVA-1.5, 64 tokens, h200-2026-11-26, batch 8, {said}"]


def test_figure_3_says_where_nothing_was_measured_and_what_is_damaged(tmp_path: Path) -> None:
    results = Results(tmp_path, [], of_the_paper().summary, paper=PAPER)
    table = facts.figure3_table(results)
    assert table is not None
    assert list(table.head) == ["Method", "paper, V100"]
    assert "never measured" in table.note
    assert next(one.measured for one in rerun(results) if one.where == "Figure 3")[1:] == []
    place = tmp_path / "benchmarks" / "results"
    place.mkdir(parents=True)
    (place / "gpu-x.json").write_text(json.dumps({"vlms": [{"vlm": "llava-next-7b", "tables": [{"rows": []}]}]}))
    with pytest.raises(Corrupt, match=r"gpu-x.json is not what benchmarks/gpu.py writes: it has no '"):
        facts.figure3_table(results)


@pytest.mark.parametrize(("vlm", "of"), [("tiny-llava", "LLaVA-1.5-7B"), ("qwen2.5-vl-7b", "Qwen2.5-VL-7B")])
def test_figure_1_has_the_papers_averages_beside_ours(
    vlm: str, of: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = load(write_results(tmp_path))
    for row in results.summary:
        row["vlm"] = vlm
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(figures, "accuracy", lambda series, **more: drawn.update(more, series=series) or b"")
    charts.accuracy_svg(results, vlm)
    ours = next(line for line in drawn["series"] if line.label == "oc-vtp")
    row = {row["tokens"]: row["average"]["relative"] for row in results.summary if row["method"] == "oc-vtp"}
    assert (list(ours.x), [round(y, 1) for y in ours.y]) == ([16, 32, 48], [row[k] for k in (16, 32, 48)])
    assert drawn["titles"] == (f"{vlm}, here", f"{of}, in the paper")
    table = PAPER[PAPER["vlms"].get(vlm, "table1_llava_1_5_7b")]
    for name, label in PAPER["methods"].items():
        printed = [row["average_relative_percent"] for row in table["rows"][1:] if row["method"] == label]
        lines = [line for line in drawn["beside"] if line.label == name]
        assert [list(line.y) for line in lines] == ([printed[::-1]] if printed else [])
        assert all(list(line.x) == [11.1, 22.2, 33.3] for line in lines)
    assert drawn["beside"][0].label == "oc-vtp"


def test_figure_1_is_named_and_drawn_with_or_without_the_papers_numbers(tmp_path: Path) -> None:
    results = load(write_results(tmp_path))
    pages = documents(results)
    assert "The paper's Figure 1: average accuracy" in pages["report.md"].decode()
    page = pages["index.html"].decode()
    assert "The paper’s Figure 1: mean over the benchmarks" in page
    assert "The paper has no tiny-llava" in page
    svg = charts.accuracy_svg(results, "tiny-llava")
    assert svg is not None
    assert {"LLaVA-1.5-7B, in the paper", "tiny-llava, here", "HiPrune", "OC-VTP"} <= set(
        re.findall(r">([^<>]+)</text>", svg.decode())
    )
    alone = charts.accuracy_svg(replace(results, paper=None), "tiny-llava")
    assert alone is not None
    assert b"in the paper" not in alone
