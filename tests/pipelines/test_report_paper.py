"""The paper's tables with our numbers in them, as HTML, Markdown, CSV and LaTeX."""

import csv
import io
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from paper_results import PAPER, of_the_paper
from report_results import write_results

from ocvtp.efficiency.flops import paper_llm_flops, paper_pruner_flops, pruner_flops
from pipelines.report_html import claims, names
from pipelines.report_html.data import Results, load
from pipelines.report_html.formats import as_csv, as_latex, latex
from pipelines.report_html.page import documents, table_files
from pipelines.report_html.paper_tables import common, mean_relative, paper_tables
from pipelines.report_html.rerun import NEVER, rerun
from pipelines.report_html.tables import Block, Cell, Line, Table

MAIN = ("table1_llava_1_5_7b", "table2_llava_next_7b", "table3_qwen2_5_vl_7b", "table5_slots_top_k")
ODD = {
    ("table2_llava_next_7b", "640 Tokens (22.2%)", "HiPrune"): 100.0,
    ("table2_llava_next_7b", "640 Tokens (22.2%)", "OC-VTP"): 101.0,
}
"""Averages that the paper rounds to whole percents: its rows give 100.2 and 100.6."""


@pytest.mark.parametrize("key", MAIN)
def test_our_average_of_the_papers_numbers_is_its_column_avg(key: str) -> None:
    table = PAPER[key]
    whole = {label: table["rows"][0][label] for label in table["benchmarks"]}
    for row in table["rows"]:
        printed = row["average_relative_percent"]
        found = mean_relative({label: row[label] for label in table["benchmarks"]}, whole)
        if printed is None:
            continue
        assert found is not None
        odd = (key, row["retain"], row["method"]) in ODD
        assert (abs(found - printed) > 0.07) == odd, (row["retain"], row["method"], found, printed)


@pytest.mark.parametrize(("vlm", "number"), [("llava-1.5-7b", 1), ("llava-next-7b", 2), ("qwen2.5-vl-7b", 3)])
def test_the_papers_own_numbers_come_out_as_the_paper(vlm: str, number: int) -> None:
    table = paper_tables(of_the_paper(vlm), vlm)[0]
    theirs = PAPER[PAPER["vlms"][vlm]]
    assert table.name == f"table{number}-{vlm}"
    assert list(table.head) == ["Method", *theirs["benchmarks"], "Avg"]
    assert [(block.title, line.label) for block in table.blocks for line in block.lines] == [
        (row["retain"], row["method"]) for row in theirs["rows"]
    ]
    for block, row in zip([b for b in table.blocks for _ in b.lines], theirs["rows"], strict=True):
        line = next(line for line in block.lines if line.label == row["method"])
        compared = row["method"] in PAPER["methods"].values()
        for cell, label in zip(line.cells, theirs["benchmarks"], strict=False):
            if row[label] is None:
                assert (cell.top, cell.bottom) == (names.DASH, "")
            else:
                said = f"paper {row[label]:g}" + (" (+0.0)" if compared else "")
                assert (cell.bottom, cell.top == names.DASH) == (said, not compared)
    assert "It is the paper's VLM." in table.note


def test_pruners_trained_per_benchmark_are_one_row_and_in_no_average() -> None:
    """The second OC-VTP row of tables 1 to 3: each cell of another pruner, each tried on its own benchmark alone."""
    results = of_the_paper()
    shown = common(results, "llava-1.5-7b")
    names_of = {label: name for name, label in PAPER["benchmarks"].items()}
    more: list[dict[str, Any]] = []
    for theirs in PAPER["table1_llava_1_5_7b"]["rows"]:
        same = [
            r for r in results.summary if r["method"] == "oc-vtp" and f"{100 * r['share']:.1f}%" in theirs["retain"]
        ]
        if theirs["method"] != "OC-VTP (trained per benchmark)" or not same:
            continue
        for label in ("GQA", "VizWiz"):
            base, score = PAPER["table1_llava_1_5_7b"]["rows"][0][label], theirs[label] + 0.5
            missing = {name: {"score": None, "relative": None} for name in names_of.values()}
            cell = {names_of[label]: {"score": score, "relative": 100 * score / base}}
            more.append({**same[0], "changes": {"train.on": names_of[label]}, "benchmarks": missing | cell})
    assert len(more) == 6
    table = paper_tables(Results(Path(), [], [*results.summary, *more], paper=PAPER), "llava-1.5-7b")[0]
    head = list(table.head[1:])
    for block in table.blocks[1:4]:
        (own,) = [line for line in block.lines if line.label == "OC-VTP (trained per benchmark)"]
        cells = dict(zip(head, own.cells, strict=True))
        for label in ("GQA", "VizWiz"):
            base = PAPER["table1_llava_1_5_7b"]["rows"][0][label]
            (paper_s,) = re.findall(r"paper ([\d.]+)", cells[label].bottom)
            assert float(cells[label].top) == pytest.approx(float(paper_s) + 0.5)
            assert f"({50 / base:+.1f})" in cells[label].bottom
        assert cells["VQAv2"].top == cells["Avg"].top == names.DASH
        (once,) = [line for line in block.lines if line.label == "OC-VTP"]
        assert "(+0.0)" in once.cells[0].bottom, "the row above is what it was"
    assert common(Results(Path(), [], [*results.summary, *more], paper=PAPER), "llava-1.5-7b") == shown


def test_what_is_kept_without_filling_stands_in_its_row_with_the_mean() -> None:
    """Of the settings without filling, the one that has slots for 11.1 % of the tokens."""
    results = of_the_paper()
    path = "evaluate.options.oc-vtp.fill"
    points = {"points": -1.5, "ci_low": -2.5, "ci_high": -0.5}
    more = [
        {**row, "tokens": 64 if kept < 64 else 192, "changes": {path: fill}, "kept": kept, "difference": points}
        for row in results.summary if row["method"] == "oc-vtp"
        for fill, kept in (("none", 50.4 if row["share"] < 0.2 else 150.0), ("random", 64.0))
    ]  # fmt: skip
    found = replace(results, summary=[*results.summary, *more])
    block = paper_tables(found, "llava-1.5-7b")[0].blocks[-1]
    (line,) = block.lines
    assert line.label == "OC-VTP (unpadded), here 50.4 of 64 Tokens (11.1%)"
    ours = next(row for row in results.summary if row["method"] == "oc-vtp" and row["share"] < 0.2)
    assert line.cells[0].top == f"{ours['benchmarks']['gqa']['score']:.1f}"
    assert line.cells[0].bottom.startswith("paper 55.3 (")
    (measured,) = [one.measured for one in rerun(found) if "unpadded" in one.claim]
    assert "holds" in measured[0]
    assert "64 Tokens (11.1%), 50.4 without: +1.5 points [0.5, 2.5]".replace("Tokens", "tokens") in measured[0]


def test_averages_are_over_what_all_rows_have() -> None:
    results = of_the_paper()  # VisionZip has no VizWiz, PyramidDrop no MMMU
    shown = common(results, "llava-1.5-7b")
    assert shown == [n for n in results.benchmarks if n not in ("vizwiz", "mmmu")]
    table = paper_tables(results, "llava-1.5-7b")[0]
    averages = {line.label: line.cells[-1] for line in table.blocks[1].lines}
    row = next(r for r in results.summary if r["method"] == "fastv")
    assert averages["FastV"].value == pytest.approx(sum(row["benchmarks"][n]["relative"] for n in shown) / 8)
    assert averages["FastV"].bottom == "paper 89.7% (+0.0)"
    assert "VizWiz" not in table.note.split("Avg here")[1]


def test_a_benchmark_that_the_unpruned_model_cannot_do_is_in_no_average() -> None:
    results = of_the_paper()
    for row in results.summary:
        row["benchmarks"]["seedbench"]["score"] /= 1000  # 5.9 % where one of four options is right
        row["benchmarks"]["pope"]["score"] /= 100
    assert "seedbench" not in common(results, "llava-1.5-7b")
    assert "pope" in common(results, "llava-1.5-7b")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return load(write_results(tmp_path_factory.mktemp("report"), losses=("aw_mse", "mse"), layers=(9, 10)))


def mean(results: Results, **axis: Any) -> str:
    """Of OC-VTP with 48 tokens at this value of an axis and the paper's choice of the others."""
    wanted = {"layer": 9, "loss": "aw_mse", "tokens": 48, "method": "oc-vtp", **axis}
    (row,) = [row for row in results.summary if all(row[key] == value for key, value in wanted.items())]
    known = [found["relative"] for found in row["benchmarks"].values()]
    return names.percent(sum(known) / len(known))


def test_a_vlm_that_the_paper_has_not_stands_in_the_layout_of_table_1(tiny: Results) -> None:
    found = {table.name: table for table in paper_tables(tiny, "tiny-llava")}
    assert list(found) == [f"table{n}-tiny-llava" for n in (1, 4, 5, 6, 7)]
    first = found["table1-tiny-llava"]
    assert "The paper has no tiny-llava" in first.note
    (ours,) = [line for line in first.blocks[1].lines if line.label == "OC-VTP"]
    cells = dict(zip(first.head[1:], ours.cells, strict=True))
    assert (cells["GQA"].top, cells["GQA"].bottom) == ("83.3", "paper 59.5 (+1.9)")
    assert (cells["MMBench"].top, cells["MMBench"].bottom) == (names.DASH, "paper 63.4")
    assert "Random" in [line.label for line in first.blocks[1].lines], "what the paper lacks stands below it"
    layers = found["table6-tiny-llava"].blocks[0].lines[0].cells
    assert [cell.top for cell in layers] == [mean(tiny, layer=9), mean(tiny, layer=10), names.DASH]
    assert layers[2].bottom == "paper 98.1%"
    losses = found["table7-tiny-llava"].blocks[0].lines[0].cells
    assert [cell.top for cell in losses] == [mean(tiny, loss="mse"), mean(tiny, loss="aw_mse")]
    assert len({cell.top for cell in (*layers, *losses)}) == 4
    assert {line.cells[0].top for line in found["table4-tiny-llava"].blocks[0].lines} == {names.DASH}


def cost(vlm: str, tokens: int, kept: int, width: int = 1024) -> list[dict[str, Any]]:
    """What stage `efficiency` says of a 7B model, pruned and not."""
    llm = {n: paper_llm_flops(n + 32) for n in (tokens, kept)}
    ours = {"pruner": pruner_flops(tokens, width, kept), "total": 1}
    return [
        {"vlm": vlm, "method": "vanilla", "tokens": tokens, "flops": {"pruner": 0, "total": 1},
         "paper_flops": llm[tokens], "paper_pruner_flops": 0},
        {"vlm": vlm, "method": "oc-vtp", "tokens": kept, "flops": ours,
         "paper_flops": llm[kept], "paper_pruner_flops": paper_pruner_flops(tokens, width)},
    ]  # fmt: skip


def test_table_4_by_the_papers_own_count() -> None:
    rows = [*cost("llava-1.5-7b", 576, 64), *cost("llava-next-7b", 2880, 160), *cost("llava-1.5-13b", 576, 64)]

    def table(vlm: str) -> dict[str, list[Cell]]:
        results = Results(Path(), [], of_the_paper().summary, efficiency={"rows": rows}, paper=PAPER)
        (found,) = [one for one in paper_tables(results, vlm) if one.name == f"table4-{vlm}"]
        return {line.label: list(line.cells) for line in found.blocks[0].lines}

    small, large = "LLaVA-1.5, 64 tokens", "LLaVA-NeXT, 160 tokens"
    for vlm, mine, other in (("llava-1.5-7b", small, large), ("llava-next-7b", large, small)):
        found = table(vlm)
        for cell in found[mine]:
            assert cell.bottom.startswith(f"paper {cell.top} (") or mine == small, (cell.top, cell.bottom)
            assert abs(float(re.findall(r"\(([+-][\d.]+)%\)", cell.bottom)[0])) <= 0.3, "as the paper"
        assert {cell.top for cell in found[other]} == {names.DASH}
    assert {cell.top for cells in table("llava-1.5-13b").values() for cell in cells} == {names.DASH}, "no 7B model"


def test_files_for_other_programs_hold_the_same_cells(tiny: Results) -> None:
    files = documents(tiny) | table_files(paper_tables(tiny, "tiny-llava"))
    for table in paper_tables(tiny, "tiny-llava"):
        rows = list(csv.reader(io.StringIO(files[f"tables/{table.name}.csv"].decode())))
        lines = [(block, line) for block in table.blocks for line in block.lines]
        assert len(rows) == 1 + len(lines)
        assert {len(row) for row in rows} == {2 * len(table.head)}
        for row, (block, line) in zip(rows[1:], lines, strict=True):
            assert row[:2] == [block.title, line.label]
            assert row[2::2] == [cell.top.replace(names.DASH, "") for cell in line.cells]
        page, text = files["index.html"].decode(), files["report.md"].decode()
        assert f'id="table-{table.name}"' in page
        assert f"**{table.caption}**" in text
    assert "Rerun against paper" in files["index.html"].decode()


def test_latex_is_sound(tiny: Results, tmp_path: Path) -> None:
    tables = [*paper_tables(tiny, "tiny-llava"), *paper_tables(of_the_paper(), "llava-1.5-7b")]
    for table in tables:
        text = as_latex(table).decode()
        body = text[text.index(r"\toprule") : text.index(r"\bottomrule")]
        rows = [line for line in body.splitlines() if line.endswith(r"\\") and "multicolumn" not in line]
        assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {len(table.head) - 1}
        plain = re.sub(r"\\[a-z]+\{\}|\\.", "", text)
        assert plain.count("{") == plain.count("}")
        assert re.search(r"[%#_]", re.sub(r"\\label\{.*\}", "", plain)) is None
        assert re.findall(r"\\begin\{(\w+)\}", text) == re.findall(r"\\end\{(\w+)\}", text)[::-1]
    assert latex(r"50% & a_b {x} ~\^") == (
        r"50\% \& a\_b \{x\} \textasciitilde{}\textbackslash{}\textasciitilde{}".rsplit(r"\text", 1)[0]
        + r"\textasciicircum{}"
    )
    if (program := shutil.which("pdflatex") or shutil.which("tectonic")) is not None:
        whole = b"".join(map(as_latex, tables)).decode()
        source = tmp_path / "tables.tex"
        source.write_text(rf"\documentclass{{article}}\usepackage{{booktabs}}\begin{{document}}{whole}\end{{document}}")
        subprocess.run([program, source.name], cwd=tmp_path, check=True, capture_output=True, timeout=120)
        assert (tmp_path / "tables.pdf").stat().st_size > 0


def test_what_is_missing_is_empty_in_csv() -> None:
    table = Table("t", "c", ["A", "B"], [Block("", [Line("x", [Cell(names.DASH)])])])
    assert as_csv(table) == b'block,A,B,"B, below"\n,x,,\n'


def test_claims_that_nothing_was_measured_of_say_so(tiny: Results) -> None:
    found = {one.claim: one.measured for one in rerun(tiny)}
    (own,) = [measured for claim, measured in found.items() if "own images" in claim]
    assert own == [NEVER]
    row = next(row for row in tiny.summary if (row["method"], row["layer"], row["loss"]) == ("oc-vtp", 9, "aw_mse"))
    points = {"points": 2.5, "ci_low": 0.5, "ci_high": 4.5}
    more = {**row, "changes": {"train.on": "gqa"}, "difference": points}
    measured = {one.claim: one.measured for one in rerun(replace(tiny, summary=[*tiny.summary, more]))}
    (own,) = [some for claim, some in measured.items() if "own images" in claim]
    assert own[0].startswith(
        "tiny-llava (not a VLM of the paper): holds. On GQA a pruner trained on its own images keeps"
    )
    assert "+2.5 points [0.5, 4.5]" in own[0]
    rivals = found["OC-VTP keeps more accuracy than every other method at equal budget"]
    assert rivals[0].startswith("tiny-llava (not a VLM of the paper): holds. OC-VTP keeps more accuracy than Random")
    assert rivals[-1] == f"on the weights of any VLM of the paper: {NEVER}"
    assert len(found) == 9


def test_findings_are_joined_to_claims_by_key_whatever_their_words(
    tiny: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = [(one.claim, len(one.measured), one.measured == [NEVER]) for one in rerun(tiny)]
    real = claims.findings
    monkeypatch.setattr(
        "pipelines.report_html.rerun.findings",
        lambda results, vlm: [replace(one, claim=f"In other words, {i}") for i, one in enumerate(real(results, vlm))],
    )
    assert [(one.claim, len(one.measured), one.measured == [NEVER]) for one in rerun(tiny)] == before


def test_without_the_papers_numbers_there_are_no_such_tables(tiny: Results) -> None:
    bare = Results(tiny.root, tiny.scores, tiny.summary)
    assert paper_tables(bare, "tiny-llava") == []
