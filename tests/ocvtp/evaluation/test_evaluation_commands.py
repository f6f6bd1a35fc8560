"""`ocvtp eval`, `ocvtp results` and `ocvtp.results()`: one's own model without the pipeline."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

import ocvtp
from ocvtp import cli
from ocvtp.errors import BadInput, Corrupt
from ocvtp.evaluation.generate import Answerer
from ocvtp.evaluation.lmms.official import Questions
from ocvtp.evaluation.results import answers
from ocvtp.evaluation.scores import interval


@pytest.fixture(scope="module")
def place(vlm_folder: Path, question_sets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Vanilla and random tokens on two benchmarks."""
    out = tmp_path_factory.mktemp("evaluations")
    for more in ([], ["--method", "random", "--keep", "16", "--seed", "1"]):
        assert cli.main(arguments(vlm_folder, question_sets, out, *more)) == 0
    return out


def arguments(vlm: Path, data: Path, out: Path, *more: str, benchmark: str = "gqa,mme") -> list[str]:
    return ["eval", "--vlm", str(vlm), "--benchmark", benchmark, "--data", str(data), "--limit", "4", "--out", str(out),
            "--max-new-tokens", "4", "--device", "cpu", *more]  # fmt: skip


def test_what_was_answered_is_not_asked_again(
    place: Path, vlm_folder: Path, question_sets: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    before = {path: path.read_bytes() for path in place.rglob("*.json*")}
    monkeypatch.setattr(Answerer, "answer_prepared", lambda *_: pytest.fail("a question was asked again"))
    assert cli.main(arguments(vlm_folder, question_sets, place, "--json")) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [(row["benchmark"], row["n"], row["kept"]) for row in printed["rows"]] == [("gqa", 4, 144), ("mme", 4, 144)]
    assert {path: path.read_bytes() for path in place.rglob("*.json*")} == before


def test_a_benchmark_that_fails_takes_no_other_with_it(
    place: Path, vlm_folder: Path, question_sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gqa.parquet").write_bytes((question_sets / "gqa.parquet").read_bytes())
    asked = arguments(vlm_folder, tmp_path, tmp_path / "out", benchmark="mme,gqa")
    assert cli.main(asked) == 1
    printed = capsys.readouterr()
    assert "gqa" in printed.out
    assert "mme: " in printed.err
    assert "mme.parquet does not exist" in printed.err
    assert cli.main(arguments(vlm_folder, tmp_path, tmp_path / "out", benchmark="pope")) == 2
    assert cli.main(arguments(vlm_folder, tmp_path, tmp_path / "out", benchmark="pop")) == 2
    assert "no benchmark 'pop'" in capsys.readouterr().err
    assert cli.main(arguments(vlm_folder, tmp_path, tmp_path / "out", "--set", "top_k")) == 2


def test_an_error_that_nobody_foresaw_takes_no_other_benchmark_with_it(
    vlm_folder: Path, question_sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    length = Questions.length

    def fails(self: Questions, row: int) -> int:
        if self.benchmark.name == "mme":
            raise ZeroDivisionError("division by zero")
        return length(self, row)

    monkeypatch.setattr(Questions, "length", fails)
    monkeypatch.delenv("OCVTP_TRACEBACK", raising=False)
    asked = arguments(vlm_folder, question_sets, tmp_path, "--json", benchmark="mme,gqa")
    assert cli.main(asked) == 1
    printed = capsys.readouterr()
    assert [row["benchmark"] for row in json.loads(printed.out)["rows"]] == ["gqa"]
    assert printed.err == "ocvtp: mme: ZeroDivisionError: division by zero\n"
    monkeypatch.setenv("OCVTP_TRACEBACK", "1")
    assert cli.main(asked) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_results_that_cannot_be_written_are_named_at_once(
    question_sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for out in ("/proc/x", str(tmp_path / "file" / "x")):
        assert cli.main(arguments(Path("no-such-vlm"), question_sets, Path(out))) == 2
        assert f"--out {out}: no results can be written there" in capsys.readouterr().err


def test_results_are_one_data_frame(place: Path) -> None:
    frame = ocvtp.results(place)
    assert sorted(zip(frame["method"], frame["benchmark"], strict=True)) == [
        ("random", "gqa"), ("random", "mme"), ("vanilla", "gqa"), ("vanilla", "mme"),
    ]  # fmt: skip
    by = {(row["method"], row["benchmark"]): row for row in frame.to_dict("records")}
    whole, pruned = by["vanilla", "mme"], by["random", "mme"]
    assert (whole["kept"], pruned["kept"], pruned["tokens"], pruned["seed"]) == (144, 16, 16, 1)
    assert [line["doc_id"] for line in answers(pruned)] == [0, 1, 2, 3]
    few = ocvtp.results(place, {"method": "random", "keep": 16, "benchmark": ["mme", "pope"]}, intervals=True)
    (row,) = few.to_dict("records")
    assert (row["ci_low"], row["ci_high"]) == interval(answers(row), "mme")
    assert len(ocvtp.results(place, {"method": "css"})) == 0


def test_results_are_percentages_of_the_one_unpruned_result_made_alike(place: Path, tmp_path: Path) -> None:
    (source,) = ocvtp.results(place, {"method": "random", "benchmark": "gqa"})["path"]
    written = json.loads((Path(source) / "score.json").read_text())

    def write(name: str, score: float, **changes: Any) -> None:
        setting = {**written["setting"], **changes.pop("setting", {})}
        (tmp_path / name).mkdir()
        (tmp_path / name / "score.json").write_text(
            json.dumps({**written, "score": score, "setting": setting, **changes})
        )

    def relative() -> float | None:
        (found,) = ocvtp.results(tmp_path, {"method": "random"})["relative"].astype(object)
        return None if found != found else found

    write("pruned", 0.3)
    assert relative() is None
    write("whole", 0.4, setting={"method": "vanilla"})
    assert relative() == pytest.approx(75)
    write("older", 0.5, setting={"method": "vanilla"}, versions={**written["versions"], "torch": "2.0"})
    write("sdpa", 0.6, setting={"method": "vanilla"}, attn_implementation="flash")
    write("asked", 0.6, setting={"method": "vanilla"}, protocol="paper")
    assert relative() == pytest.approx(75), "made by others"
    write("again", 0.4, setting={"method": "vanilla"})
    assert relative() == pytest.approx(75)
    write("disagrees", 0.45, setting={"method": "vanilla"})
    assert relative() is None


def test_results_stand_in_order_whatever_their_folders_are_called(place: Path, tmp_path: Path) -> None:
    (source,) = ocvtp.results(place, {"method": "random", "benchmark": "gqa"})["path"]
    written = json.loads((Path(source) / "score.json").read_text())
    for name, kept, seed, method in (
        ("a", 8, 1, "random"), ("b", 16, 2, "random"), ("c", 16, 1, "random"), ("d", 4, None, "css"),
    ):  # fmt: skip
        (tmp_path / name).mkdir()
        setting = {**written["setting"], "seed": seed, "method": method}
        tokens = {**written["tokens_kept"], "mean": kept}
        (tmp_path / name / "score.json").write_text(json.dumps({**written, "setting": setting, "tokens_kept": tokens}))
    assert [Path(path).name for path in ocvtp.results(tmp_path)["path"]] == ["d", "c", "b", "a"]


@pytest.mark.parametrize("wanted", [1234568, 1234568.0, "1234568", "1234568.0"])
def test_numbers_are_compared_as_numbers(place: Path, tmp_path: Path, wanted: Any) -> None:
    (source,) = ocvtp.results(place, {"method": "random", "benchmark": "gqa"})["path"]
    written = json.loads((Path(source) / "score.json").read_text())
    for seed in (1234567, 1234568):
        (tmp_path / str(seed)).mkdir()
        setting = {**written["setting"], "seed": seed}
        (tmp_path / str(seed) / "score.json").write_text(json.dumps({**written, "setting": setting}))
    assert list(ocvtp.results(tmp_path, {"seed": wanted})["seed"]) == [1234568]


def test_results_are_printed(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def printed(*more: str) -> str:
        assert cli.main(["results", str(place), *more]) == 0
        return capsys.readouterr().out

    assert "2 results" in printed("--where", "method=random")
    rows = list(csv.DictReader(io.StringIO(printed("--where", "method=random", "benchmark=gqa", "--csv"))))
    assert [(row["method"], row["benchmark"], row["scale"]) for row in rows] == [("random", "gqa", "share")]
    found: list[dict[str, Any]] = json.loads(printed("--json"))
    assert {row["seed"] for row in found} == {None, 1}


def test_rows_that_look_alike_show_what_they_differ_in(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    (source,) = ocvtp.results(place, {"method": "random", "benchmark": "gqa"})["path"]
    written = json.loads((Path(source) / "score.json").read_text())
    for name, fingerprint, budget in (("a", "12345678abc", 1), ("b", "87654321abc", 1), ("c", "87654321abc", [2, 3])):
        (tmp_path / name).mkdir()
        setting = {**written["setting"], "fingerprint": fingerprint, "options": {"budget": budget}}
        (tmp_path / name / "score.json").write_text(json.dumps({**written, "setting": setting}))
    assert cli.main(["results", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert [word in printed for word in ("12345678 ", "87654321 ", "abc", "option.budget", "[2, 3]")] == [
        True, True, False, True, True,
    ]  # fmt: skip
    assert cli.main(["results", str(place), "--where", "method=random"]) == 0
    printed = capsys.readouterr().out
    assert not any(word in printed for word in ("fingerprint", "option.", "dtype"))


def test_what_cannot_be_read_is_named(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["results", str(tmp_path / "nowhere")]) == 2
    assert cli.main(["results", str(tmp_path)]) == 2
    assert cli.main(["results", str(place), "--where", "method"]) == 2
    assert "COLUMN=VALUE" in capsys.readouterr().err
    with pytest.raises(BadInput, match="there is no column 'metod'; there are: vlm"):
        ocvtp.results(place, {"metod": "random"})
    (tmp_path / "score.json").write_text('{"setting": {}}')
    with pytest.raises(Corrupt, match="is no result of an evaluation: it has no 'benchmark'"):
        ocvtp.results(tmp_path)
    (tmp_path / "score.json").write_text("{")
    with pytest.raises(Corrupt, match=r"score\.json is not JSON"):
        ocvtp.results(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"setting": []}, "list"),
        ({"setting": "css"}, "str"),
        ({"setting": None}, "NoneType"),
        ({"setting": {"vlm": "tiny-llava"}}, "it has no 'method'"),
        ({"setting": {"vlm": "tiny-llava", "method": "css", "seed": "0"}}, "its seed is '0'"),
        ({"score": "0.5"}, "its score is '0.5'"),
        ({"score": [0.5]}, r"its score is \[0.5\]"),
        ({"n": None}, "its n is None"),
        ({"data": None}, "NoneType"),
        (None, "list"),
    ],
)
def test_a_score_that_is_none_is_named(changes: Any, message: str, place: Path, tmp_path: Path) -> None:
    (source,) = ocvtp.results(place, {"method": "random", "benchmark": "gqa"})["path"]
    written = json.loads((Path(source) / "score.json").read_text())
    (tmp_path / "score.json").write_text(json.dumps([] if changes is None else {**written, **changes}))
    with pytest.raises(Corrupt, match=rf"score.json is no result of an evaluation: .*{message}"):
        ocvtp.results(tmp_path)


def test_what_is_said_twice_is_refused(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["results", str(place), "--where", "benchmark=gqa", "benchmark=mme"]) == 2
    assert "benchmark is given twice; benchmark=gqa,mme takes rows with any of these" in capsys.readouterr().err
    assert cli.main(["results", str(place), "--where", "benchmark=gqa", "--where", "method=random", "--json"]) == 0
    assert [row["method"] for row in json.loads(capsys.readouterr().out)] == ["random"], "both conditions hold"
    asked = arguments(Path("no-such-vlm"), tmp_path, tmp_path, "--method", "oc-vtp", "--keep", "4")
    assert cli.main([*asked, "--set", "top_k=1", "top_k=2"]) == 2
    assert "--set top_k=2: top_k is given twice, before as 1" in capsys.readouterr().err
