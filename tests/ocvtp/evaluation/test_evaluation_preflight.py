"""Question sets that cannot be used are found before a model is loaded."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from evaluation_data import MAKERS, Row, gqa, mmbench, mme, pope, write_parquet

from ocvtp.errors import BadInput
from ocvtp.evaluation import preflight
from ocvtp.evaluation.benchmarks import benchmark, benchmarks
from ocvtp.evaluation.evaluate import EvaluationSetting, evaluate


def test_all_official_columns_pass(tmp_path: Path) -> None:
    assert set(MAKERS) == set(benchmarks())
    for name, make in MAKERS.items():
        path = write_parquet(tmp_path / f"{name}.parquet", make(8))
        assert preflight.locate(benchmark(name), tmp_path) == preflight.locate(benchmark(name), path) == path
        assert preflight.check(benchmark(name), path) == 8


def without(rows: list[Row], column: str) -> list[Row]:
    return [{key: value for key, value in row.items() if key != column} for row in rows]


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("gqa", without(gqa(4), "image"), r"gqa.parquet has no column 'image', which gqa reads; it has id, imageId"),
        ("mme", without(mme(4), "category"), "no column 'category'"),
        ("gqa", [{**row, "answer": None} for row in gqa(3)[:2]] + gqa(1), "row 0: 'answer' is empty"),
        ("pope", [*pope(3), {**pope(4)[3], "answer": "maybe"}], "row 3: 'answer' is 'maybe'; pope has yes and no"),
        ("mme", mme(5), "2.jpg has 1 questions; mme is scored in pairs"),
        ("mmbench", mmbench(4)[1:], "no row has index 0, the base of a circle"),
    ],
)
def test_unfit_questions_are_named(name: str, rows: list[Row], message: str, tmp_path: Path) -> None:
    path = write_parquet(tmp_path / f"{name}.parquet", rows)
    # A VLM that does not exist: nothing is loaded before the questions are checked.
    with pytest.raises(BadInput, match=message):
        evaluate(EvaluationSetting(vlm="no-such-vlm"), name, path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unfit_files_are_named(tmp_path: Path) -> None:
    entry = benchmark("gqa")
    with pytest.raises(BadInput, match=r"gqa.parquet does not exist: gqa needs a parquet with question, answer, image"):
        preflight.locate(entry, tmp_path)
    (tmp_path / "text.parquet").write_text("question,answer\n")
    with pytest.raises(BadInput, match=r"text.parquet is not a parquet file"):
        preflight.check(entry, tmp_path / "text.parquet")
    path = write_parquet(tmp_path / "plain.parquet", gqa(2), features=False)
    with pytest.raises(BadInput, match="column 'image' is not marked as images"):
        preflight.check(entry, path)
    pq.write_table(pq.read_table(write_parquet(tmp_path / "g.parquet", gqa(1))).slice(0, 0), path)
    with pytest.raises(BadInput, match="has no rows"):
        preflight.check(entry, path)


@pytest.mark.parametrize(
    ("rows", "limit", "expected"),
    [(mme(8), None, 8), (mme(8), 5, 4), (mme(8), 100, 8), (mme(8), 2, 2), ([*mme(8)[0::2], *mme(8)[1::2]], 7, None)],
)
def test_a_limit_leaves_pairs_whole(rows: list[Any], limit: int | None, expected: int | None, tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "mme.parquet", rows)
    if expected is not None:
        assert preflight.check(benchmark("mme"), path, limit) == expected
    else:  # all first questions stand before all second ones
        with pytest.raises(BadInput, match="limit 7 leaves no whole unit of mme"):
            preflight.check(benchmark("mme"), path, limit)


def test_a_limit_is_of_whole_units() -> None:
    pairs = [0, 0, 1, 1, 2, 2]
    assert [preflight.whole_units(benchmark("mme"), pairs, n) for n in (None, 2, 5, 9)] == [6, 2, 4, 6]
    assert preflight.whole_units(benchmark("gqa"), range(9), 7) == 7
    circles = [0, 1, 2, 0, 1, 2, 3, 3]
    with pytest.raises(BadInput, match=r"limit 4 leaves no whole unit of mmbench: .* are complete after 6"):
        preflight.whole_units(benchmark("mmbench"), circles, 4)
    with pytest.raises(BadInput, match=r"limit 1 leaves no whole unit of mme: .* are complete after 2"):
        preflight.whole_units(benchmark("mme"), pairs, 1)


@pytest.mark.parametrize("limit", [0, -2])
@pytest.mark.parametrize("data", [True, False], ids=["local", "official"])
def test_a_limit_that_leaves_nothing(limit: int, data: bool, tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "pope.parquet", pope(4)) if data else None
    with pytest.raises(BadInput, match=f"limit {limit}: at least 1 question"):
        evaluate(EvaluationSetting(vlm="no-such-vlm"), "pope", path, tmp_path / "out", limit=limit)


def changed(rows: list[Row], row: int, **values: Any) -> list[Row]:
    rows[row] = {**rows[row], **values}
    return rows


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("mmbench", changed(mmbench(4), 2, index=None), "row 2: 'index' is None; a whole number is needed"),
        ("mmbench", [{**row, "index": f"x{i}"} for i, row in enumerate(mmbench(4))], "row 0: 'index' is 'x0'"),
        ("pope", changed(pope(4), 3, question=None), "row 3: 'question' is None; a text is needed"),
        ("mme", changed(mme(4), 1, question_id=None), "row 1: 'question_id' is None; mme is scored in groups of it"),
        ("mmmu", changed(MAKERS["mmmu"](4), 1, options="red, green"), "row 1: 'options' is 'red, green'; a list"),
        ("mmmu", changed(MAKERS["mmmu"](4), 2, options=None), "row 2: 'options' is None; a list"),
        ("scienceqa", changed(MAKERS["scienceqa"](4), 2, choices=None), "row 2: 'choices' is None; a list"),
        ("gqa", changed(gqa(4), 3, image=None), "row 3: 'image' has no image"),
        ("gqa", changed(gqa(70), 68, image={"bytes": None, "path": "68.png"}), "row 68: 'image' has no image"),
        ("seedbench", changed(MAKERS["seedbench"](4), 1, image=[]), "row 1: 'image' has no image"),
        ("mmmu", changed(MAKERS["mmmu"](4), 0, image_1=None), "row 0: 'image_1' has no image"),
    ],
)  # fmt: skip
def test_values_that_no_question_can_be_made_of_are_named(
    name: str, rows: list[Row], message: str, tmp_path: Path
) -> None:
    path = write_parquet(tmp_path / f"{name}.parquet", rows)
    with pytest.raises(BadInput, match=message) as found:
        evaluate(EvaluationSetting(vlm="no-such-vlm"), name, path, tmp_path / "out")
    assert str(path) in str(found.value)


@pytest.mark.parametrize("column", ["question", "image", "fullAnswer"])
def test_a_damaged_file_with_a_whole_footer_is_named(column: str, tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "gqa.parquet", gqa(8))
    about = pq.ParquetFile(path).metadata.row_group(0)
    parts = [about.column(i) for i in range(about.num_columns)]
    part = next(one for one in parts if one.path_in_schema.split(".")[0] == column)
    data = bytearray(path.read_bytes())
    start = part.dictionary_page_offset or part.data_page_offset
    data[start : start + part.total_compressed_size] = b"\xff" * part.total_compressed_size
    path.write_bytes(data)
    with pytest.raises(BadInput, match=rf"gqa.parquet, column '{column}' cannot be read"):
        evaluate(EvaluationSetting(vlm="no-such-vlm"), "gqa", path, tmp_path / "out")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"dtype": "int8"}, "dtype 'int8': one of float32"),
        ({"method": "random"}, "random needs keep"),
        ({"keep": 16}, "vanilla keeps all tokens"),
        ({"batch_size": 0}, "batch_size 0"),
    ],
)
def test_settings_that_mean_nothing(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        EvaluationSetting(**wrong)


def test_a_pruner_that_is_none(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "gqa.parquet", gqa(2))
    setting = EvaluationSetting(vlm="no-such-vlm", method="oc-vtp", keep=16, pruner=tmp_path)
    with pytest.raises(BadInput, match=r"is no trained pruner: it has no config.json"):
        evaluate(setting, "gqa", path, tmp_path / "out")
