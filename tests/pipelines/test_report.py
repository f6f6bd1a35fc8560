"""The report says what the results say: read back from its HTML and Markdown, cell by cell."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_results import ABLATED, QUESTIONS, write_results

from ocvtp.errors import BadInput, Corrupt
from pipelines.report import main
from pipelines.report_html import charts, names
from pipelines.report_html.ablation_tables import ablations
from pipelines.report_html.claims import findings
from pipelines.report_html.data import Results, load
from pipelines.report_html.headline import headline
from pipelines.report_html.leaderboard import leaderboard
from pipelines.report_html.measures import measures_tables
from pipelines.report_html.page import documents, render
from pipelines.report_html.tables import chosen_rows, coverage_table, main_table, reference
from pipelines.spool import FILES, FOLDER
from pipelines.tracking import track_at


class Page(HTMLParser):
    """Tables by id, as rows of cells; a cell is (text, small text, bold). Also counts what a page may not have."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[tuple[str, str, bool]]]] = {}
        self.outside: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self._rows: list[list[tuple[str, str, bool]]] | None = None
        self._cell: list[str] | None = None
        self._small = self._bold = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        about = dict(attrs)
        self.ids += [about["id"]] if about.get("id") else []
        for name in ("src", "href", "xlink:href"):
            if (about.get(name) or "#").startswith(("#", "data:")) is False:
                self.outside.append(str(about[name]))
        if tag in ("script", "link", "iframe"):
            self.outside.append(tag)
        if tag == "table":
            self._rows = self.tables.setdefault(str(about["id"]), [])
        elif tag == "tr" and self._rows is not None:
            self._rows.append([])
        elif tag in ("td", "th"):
            self._cell, self._bold, self._small = ["", ""], False, False
        elif tag == "b":
            self._bold = True
        elif tag == "small":
            self._small = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th") and self._rows is not None and self._cell is not None:
            self._rows[-1].append((self._cell[0].strip(), self._cell[1].strip(), self._bold))
            self._cell = None
        elif tag == "small":
            self._small = False
        elif tag == "table":
            self._rows = None

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._cell is not None:
            self._cell[self._small] += data


def _page(root: Path) -> Page:
    return Page(documents(load(root))["index.html"].decode())


def _row(page: Page, table: str, label: str, nth: int = 0) -> list[tuple[str, str, bool]]:
    return [row for row in page.tables[table] if row[0][0] == label][nth]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_results(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grid")
    return write_results(folder, losses=("mse", "aw_mse"), layers=(10, 9, -2), top_ks=(1, 2))


@pytest.fixture(scope="module")
def files(root: Path) -> dict[str, bytes]:
    return render(load(root))


@pytest.fixture(scope="module")
def page(root: Path) -> Page:
    return _page(root)


def test_the_main_table_has_the_layout_of_the_papers_table_1(page: Page) -> None:
    table = page.tables["table-main-tiny-llava"]
    assert [cell[0] for cell in table[0]] == ["Method", "GQA", "MME", "POPE", "TextVQA", "Avg"]
    assert [row[0][0] for row in table[1:]] == [
        "Vanilla, 144 Tokens (100%)", "Vanilla",
        "Retain 48 Tokens (33.3%)", "Random", "OC-VTP",
        "Retain 32 Tokens (22.2%)", "Random", "OC-VTP",
        "Retain 16 Tokens (11.1%)", "Random", "OC-VTP",
    ]  # fmt: skip


def test_cells_hold_the_score_and_its_percent_of_vanilla(page: Page) -> None:
    vanilla = _row(page, "table-main-tiny-llava", "Vanilla")
    assert [cell[:2] for cell in vanilla[1:4]] == [("85.0", "100%"), ("1500", "100%"), ("90.0", "100%")]
    ours = _row(page, "table-main-tiny-llava", "OC-VTP", 2)
    # 92.5 % of 0.85, 93.5 % of 1500 points, 94.5 % of 0.9, 95.5 % of 0.8
    assert [cell[:2] for cell in ours[1:]] == [
        ("78.6", "92.5%"), ("1402", "93.5%"), ("85.0", "94.5%"), ("76.4", "95.5%"), ("94.0%", "[92.5, 95.5]"),
    ]  # fmt: skip


def test_bold_is_only_what_is_best_beyond_its_interval(root: Path, tmp_path: Path) -> None:
    assert all(cell[2] for cell in _row(_page(root), "table-main-tiny-llava", "OC-VTP", 2)[1:])
    assert not any(cell[2] for cell in _row(_page(root), "table-main-tiny-llava", "Random", 2))
    wide = _page(write_results(tmp_path, half_width=20.0))
    assert not any(cell[2] for row in wide.tables["table-main-tiny-llava"] for cell in row)


def test_a_missing_result_is_a_dash_never_zero(root: Path, tmp_path: Path) -> None:
    write_results(tmp_path)
    path = tmp_path / "results" / "summary.json"
    summary = json.loads(path.read_text())
    row = next(r for r in summary if r["method"] == "random" and r["tokens"] == 16)
    del row["benchmarks"]["mme"]
    row["benchmarks"]["pope"]["score"] = None
    row["average"] = {"relative": None, "ci_low": None, "ci_high": None}
    next(r for r in summary if r["method"] == "oc-vtp" and r["tokens"] == 16)["against"] = {"random": None}
    path.write_text(json.dumps(summary))
    cells = _row(_page(tmp_path), "table-main-tiny-llava", "Random", 2)
    assert [cell[0] for cell in cells] == ["Random", "59.5", "–", "–", "58.4", "–"]
    assert "were not both evaluated" not in headline(load(tmp_path), "tiny-llava").claim
    assert "32 of tiny-llava" in headline(load(tmp_path), "tiny-llava").claim


def test_ablations_vary_one_axis_around_the_papers_choice(grid: Path) -> None:
    results = load(grid)
    assert reference(results, "tiny-llava") == {"layer": 9, "loss": "aw_mse", "slots": [16, 32, 48], "top_k": 1}
    page = _page(grid)
    loss = page.tables["table-loss-tiny-llava"]
    assert [cell[0] for cell in loss[0]] == ["Tokens", "MSE", "AW-MSE"]
    assert [cell[0] for cell in loss[3]] == ["16 Tokens (11.1%)", "91.0%", "94.0%"]
    layer = page.tables["table-layer-tiny-llava"]
    assert [cell[0] for cell in layer[0]] == ["Tokens", "Layer 10", "Layer 9", "Layer -2"]
    top_k = page.tables["table-top-k-tiny-llava"]
    assert [row[0][0] for row in top_k[1:4]] == ["Retain 48 Tokens (33.3%)", "24 Slots - Top 2", "48 Slots - Top 1"]
    assert len([row for row in page.tables["table-main-tiny-llava"] if row[0][0] == "OC-VTP"]) == 3


def test_there_are_no_ablation_tables_without_a_grid(page: Page) -> None:
    assert set(page.tables) <= {
        "table-main-tiny-llava", "table-efficiency-tiny-llava", "table-pruners", "table-paper", "findings-tiny-llava",
        "table-coverage-tiny-llava", "table-measures-tiny-llava", "table-correlation-tiny-llava",
        "table-leaderboard-tiny-llava", "findings-paper", "table-figure3",
        *(f"table-table{n}-tiny-llava" for n in range(1, 8)),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("gain", "half", "verdict", "words"),
    [
        (0.0, 1.5, "yes", "OC-VTP beats random by 22.5 points [21.0, 24.0]."),
        (-22.0, 1.5, "open", "OC-VTP is 0.5 points ahead of random [-1.0, 2.0]: not settled"),
        (-25.0, 3.5, "open", "OC-VTP is 2.5 points behind random [-6.0, 1.0]"),
        (-40.0, 1.5, "no", "OC-VTP loses to random by 17.5 points [-19.0, -16.0]"),
    ],
)
def test_the_headline_says_it_plainly(tmp_path: Path, gain: float, half: float, verdict: str, words: str) -> None:
    write_results(tmp_path, half_width=half)
    path = tmp_path / "results" / "summary.json"
    summary = json.loads(path.read_text())
    for row in summary:
        if row["method"] == "oc-vtp":
            row["average"] = {key: value + gain for key, value in row["average"].items()}
            row["against"]["random"] = {key: value + gain for key, value in row["against"]["random"].items()}
    path.write_text(json.dumps(summary))
    said = headline(load(tmp_path), "tiny-llava")
    assert said.verdict == verdict
    assert words in said.claim
    assert said.claim.startswith("With 16 of tiny-llava’s 144 vision tokens (11.1%)")


def test_the_page_needs_nothing_else_and_has_no_id_twice(grid: Path) -> None:
    page = _page(grid)
    assert page.outside == []
    assert len(page.ids) == len(set(page.ids))
    html = documents(load(grid))["index.html"].decode()
    charts_there = re.findall(r"<svg[^>]*>", html)
    assert sum('class="chart' in tag and "width=" not in tag for tag in charts_there) == 3
    assert not re.search(r"url\((?![\"']?(data:|#))|@import", html)


def test_kept_tokens_are_drawn_where_they_are(root: Path) -> None:
    html = documents(load(root))["index.html"].decode()
    shots = re.findall(r'<path class="veil" d="([^"]*)"/><path class="frame" d="([^"]*)"/>', html)
    assert len(shots) == 3 * 2 * 6  # budgets, methods, scenes
    for veil, frames in shots:
        dropped = sum(int(run) for run in re.findall(r"h(\d+)v1", veil))
        kept = frames.count("M")
        assert dropped + kept == 144
    budgets = [frames.count("M") for _, frames in shots]
    assert budgets == [48] * 12 + [32] * 12 + [16] * 12
    sample = json.loads((root / "results/evaluate/tiny-llava/random-48-None-None-None-None-0/gqa/samples.jsonl")
                        .read_text().splitlines()[0])  # fmt: skip
    assert shots[0][1] == "".join(f"M{k % 12} {k // 12}h1v1h-1z" for k in sample["kept"])
    assert QUESTIONS > 6  # so that six scenes are a choice


def test_equal_results_give_equal_bytes(files: dict[str, bytes], tmp_path: Path) -> None:
    assert render(load(write_results(tmp_path))) == files


def test_markdown_has_the_same_cells_and_its_pictures(files: dict[str, bytes]) -> None:
    text = files["report.md"].decode()
    assert "| OC-VTP | **78.6**<br>92.5% | **1402**<br>93.5% |" in text
    assert "| ***Retain 16 Tokens (11.1%)*** |" in text
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert len(pictures) == 6
    assert all(name in files for name in pictures)
    table = text[text.index("| Method") :].split("\n\n")[0].splitlines()
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1


def test_plots_hold_every_setting_and_step(grid: Path) -> None:
    results = load(grid)
    accuracy = charts.accuracy_csv(results).decode().splitlines()
    assert accuracy[0].split(",")[:2] == ["vlm", "method"]
    assert len(accuracy) == 1 + 1 + 3 + 3 * 2 * 3 * 2
    curves = charts.curves_csv(results.pruners).decode().splitlines()
    assert len(curves) == 1 + 40 * 3 * 2 * 2
    assert curves[2].split(",")[-2:] == ["", ""]  # not measured at step 10


def test_it_works_with_the_barest_results(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    row = {"vlm": "v", "method": "vanilla", "tokens": None, "share": None, "layer": None, "loss": None, "slots": None,
           "top_k": None, "changes": {}, "difference": None, "against": {}, "coverage": None,
           "benchmarks": {"gqa": {"score": 0.5, "relative": 100.0, "n": 9}},
           "average": {"relative": 100.0}, "seeds": []}  # fmt: skip
    score = {**row, "benchmark": "gqa", "seed": None, "score": 0.5, "relative": 100.0, "path": "results/nowhere"}
    (tmp_path / "results/summary.json").write_text(json.dumps([row]))
    (tmp_path / "results/scores.json").write_text(json.dumps([score]))
    page = _page(tmp_path)
    assert _row(page, "table-main-v", "Vanilla")[1][0] == "50.0"
    for sentence in ("was not counted", "no pruner was trained", "No pictures of kept tokens", "cannot be compared"):
        assert sentence in page.text


def test_no_results_is_an_error_that_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"results/scores.json does not exist: run `python pipelines/eval.py`"):
        load(tmp_path)
    assert main(tmp_path) != 0
    assert not (tmp_path / "reports").exists()


def test_broken_files_are_named(tmp_path: Path) -> None:
    write_results(tmp_path)
    (tmp_path / "results/efficiency.json").write_text("{")
    with pytest.raises(Corrupt, match=r"efficiency\.json is not JSON"):
        load(tmp_path)
    (tmp_path / "results/efficiency.json").unlink()
    (tmp_path / "results/scores.json").write_text('[{"vlm": "v"}]')
    with pytest.raises(BadInput, match=r"results/scores.json, row 0 has no 'method'"):
        load(tmp_path)


def test_the_stage_leaves_exactly_its_files(files: dict[str, bytes], tmp_path: Path) -> None:
    write_results(tmp_path)
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports" / "left over").write_text("from an earlier grid")
    assert main(tmp_path) == 0
    made = {p.relative_to(tmp_path / "reports").as_posix() for p in (tmp_path / "reports").rglob("*") if p.is_file()}
    assert made == set(files)


def test_text_from_answers_cannot_become_markup(tmp_path: Path) -> None:
    write_results(tmp_path)
    for path in tmp_path.glob("results/evaluate/*/*/gqa/samples.jsonl"):
        path.write_text(path.read_text().replace('"prediction": "yes"', '"prediction": "<script>alert(1)</script>"'))
    assert "<script>" not in documents(load(tmp_path))["index.html"].decode()


def test_rows_of_other_settings_do_not_enter_the_main_table(grid: Path) -> None:
    table = main_table(load(grid), "tiny-llava")
    averages = [line.cells[-1].top for block in table.blocks for line in block.lines if line.label == "OC-VTP"]
    assert averages == ["99.5%", "97.0%", "94.0%"]


def test_a_method_on_a_layer_of_its_own_is_in_the_main_table(grid: Path) -> None:
    results = load(grid)
    random = next(row for row in results.summary if row["method"] == "random")
    results.summary.append({**random, "method": "css", "layer": -2})
    assert [row["layer"] for row in chosen_rows(results, "tiny-llava") if row["method"] == "css"] == [-2]
    assert {row["layer"] for row in chosen_rows(results, "tiny-llava") if row["method"] == "oc-vtp"} == {9}


@pytest.fixture(scope="module")
def ablated(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return load(write_results(tmp_path_factory.mktemp("ablated"), ablated=True))


def test_claims_are_judged_by_paired_intervals(ablated: Results) -> None:
    found = {finding.claim.split(" (")[0]: finding for finding in findings(ablated, "tiny-llava")}
    assert found["OC-VTP keeps more accuracy than Random"].verdict == "holds"
    assert found["AW-MSE trains a better pruner than MSE"].verdict == "holds"
    assert "48 tokens (33.3%): +3.0 points [1.5, 4.5]" in found["AW-MSE trains a better pruner than MSE"].evidence
    assert found["Layer 9 is a better place to look than layer 10"].verdict == "cannot be told"
    assert found["train.steps: what the grid has is better than 50"].verdict == "does not hold"


def test_what_was_ablated_has_its_tables_and_stays_out_of_the_others(ablated: Results) -> None:
    tables = {table.name: table for table in ablations(ablated, "tiny-llava")}
    steps = "train-steps-oc-vtp-tiny-llava"
    assert list(tables) == ["layer-tiny-llava", "loss-tiny-llava", "together-tiny-llava", steps]
    together = tables["together-tiny-llava"].blocks[0].lines
    assert [line.label for line in together] == [
        "OC-VTP: layer 11, loss span, steps 800", "points to the grid's own", "points to the best without training",
    ]  # fmt: skip
    assert [cell.top for cell in together[0].cells] == ["102.0%", "99.5%", "96.5%"]
    assert {(cell.top, cell.bottom) for cell in together[1].cells} == {("+2.5", "[1.0, 4.0]")}
    assert [cell.top for cell in together[2].cells] == ["+10.5 Random", "+16.0 Random", "+25.0 Random"]
    assert tables["layer-tiny-llava"].head == ["Tokens", "Layer 9", "Layer 10"]
    steps = tables["train-steps-oc-vtp-tiny-llava"]
    assert steps.head == ["Tokens", "as in the grid", "50", "800"]
    first, covered = steps.blocks[0].lines[:2]
    assert [cell.top for cell in first.cells] == ["99.5%", "101.5%", "99.5%"]
    assert covered.label == "objects covered"
    assert covered.cells[1].top == f"{101.5 / 1.2:.1f}%"
    assert len([row for row in chosen_rows(ablated, "tiny-llava") if row["method"] == "oc-vtp"]) == 3


def test_measures_have_a_table_and_their_rank_correlation_with_accuracy(ablated: Results) -> None:
    shown, correlation = measures_tables(ablated, "tiny-llava")
    budgets = ["48 Tokens (33.3%)", "32 Tokens (22.2%)", "16 Tokens (11.1%)"]
    assert [block.title for block in shown.blocks] == [f"Retain {budget}" for budget in budgets]
    assert [line.label for line in shown.blocks[0].lines] == ["Random", "OC-VTP"]
    assert shown.blocks[0].lines[1].cells[0].top == f"{(98 + 1.5) / 110:.3f}"
    assert correlation.head == ["Measure", "All settings", *budgets]
    found = {line.label: [(cell.top, cell.bottom) for cell in line.cells] for line in correlation.blocks[0].lines}
    each = len(ABLATED) + 2
    assert found["objects covered"] == [("+1.00", str(3 * each)), *[("+1.00", str(each))] * 3]
    assert found["unexplained variance"][0] == ("-1.00", str(3 * each))
    assert found["small objects covered"] == [(names.DASH, "")] * 4, "there are no masks"
    assert found["distance to the nearest kept"] == [(names.DASH, "")] * 4, "all are equal"


def test_without_measures_there_is_no_table(tmp_path: Path) -> None:
    (write_results(tmp_path) / "results/measures.json").unlink()
    assert measures_tables(load(tmp_path), "tiny-llava") == []


def test_object_coverage_has_a_table(ablated: Results) -> None:
    table = coverage_table(ablated, "tiny-llava")
    assert table is not None
    assert table.head == ["Method", "All 900 objects", "400 small ones"]
    assert [line.label for line in table.blocks[0].lines] == ["Random", "OC-VTP"]


def test_the_leaderboard_has_ranks_hard_questions_true_means_and_milliseconds(root: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(root, tmp_path / "again")
    times = {"method": "oc-vtp", "keep": "11.1%", "batch_8": {"ms": 47.25}}
    place = folder / "benchmarks/results/methods-cpu-2026-01-02.json"
    place.parent.mkdir(parents=True)
    place.write_text(json.dumps({"models": [{"model": "tiny-llava", "rows": [times]}]}))
    results = load(folder)
    table = leaderboard(results, "tiny-llava")
    assert table is not None
    assert [block.title.split()[1] for block in table.blocks] == ["48", "32", "16"]
    for block in table.blocks:
        assert [line.cells[0].top for line in block.lines] == [str(n + 1) for n in range(len(block.lines))]
        assert all(line.cells[2].top == "50.0%" and "of 77" in line.cells[2].bottom for line in block.lines)
    ours = next(line for line in table.blocks[2].lines if line.label == "OC-VTP")
    assert [cell.top for cell in ours.cells[3:]] == ["16.0", "47.2"]
    assert "No conclusion about methods inside the LLM follows from tiny-llava: its LLM has 4 layers" in table.note
    assert "Leaderboard" in render(results)["report.md"].decode()
    summary = json.loads((folder / "results/summary.json").read_text())
    for row in summary:
        row.pop("rank", None)
    (folder / "results/summary.json").write_text(json.dumps(summary))
    assert leaderboard(load(folder), "tiny-llava") is None


def test_a_report_is_tracked_where_params_say_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_results(tmp_path)
    params = tmp_path / "params.yaml"
    params.write_text("mlflow: {uri: 'http://127.0.0.1:9'}")  # where nobody answers: it waits
    assert main(tmp_path) == 0
    (spooled,) = (tmp_path / FOLDER).glob("*.jsonl")
    record = json.loads(spooled.read_text())["record"]
    assert (record["kind"], record["params"]["vlm"]) == ("report", ["tiny-llava"])
    made = {path.relative_to(tmp_path / "reports").as_posix(): path for path in (tmp_path / "reports").rglob("*.*")}
    assert set(record["artifacts"]) == set(made) > {"index.html", "report.md", "figures/figure3.png"}
    assert all((tmp_path / FOLDER / FILES / sha256).read_bytes() == made[name].read_bytes()
               for name, sha256 in record["artifacts"].items())  # fmt: skip
    params.write_text("mlflow: {url: x}")
    track_at(tmp_path, "report", [])
    assert "report is not tracked: " in caplog.text
    assert len(list((tmp_path / FOLDER).glob("*.jsonl"))) == 1
