"""`ocvtp explain`: runs held against each other for one question."""

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ocvtp.cli import main
from ocvtp.errors import BadInput
from ocvtp.evaluation import listing, traces

RIGHT = {"vanilla": [1, 1, 1, 0], "css-16": [1, 0, 0, 0], "random-16-seed_0": [0, 1, 1, 1], "fps-8": [1, 1, 1, 1],
         "qr-16": [1, 1, 0, 0]}  # fmt: skip


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for name, scores in RIGHT.items():
        method, _, rest = name.partition("-")
        keep = None if method == "vanilla" else int(rest.split("-")[0])
        samples = [
            {"doc_id": number, "unit": number, "question": f"How many {number}?", "answer": "two", "score": score,
             "prediction": "two" if score else "three", "category": "", "kept": list(range(keep)) if keep else 144}
            for number, score in enumerate(scores)
        ]  # fmt: skip
        score = {"benchmark": "gqa", "setting": {"vlm": "tiny-llava", "method": method, "keep": keep}}
        listing.write(tmp_path / "tiny-llava" / name / "gqa", score, samples)
    images = []
    for number in range(4):
        path = tmp_path / "image.png"
        Image.new("RGB", (96, 96), (40 * number, 90, 200)).save(path)
        images.append({"bytes": path.read_bytes(), "path": ""})
    pq.write_table(pa.table({"image": images}), tmp_path / "gqa.parquet")
    return tmp_path / "tiny-llava"


def test_runs_are_found_beside_each_other(runs: Path) -> None:
    one = traces.read(runs / "css-16/gqa")
    unpruned, rival = traces.unpruned(one), traces.rival(one)
    assert unpruned is not None
    assert rival is not None
    assert (unpruned.name, rival.name, one.benchmark) == ("vanilla", "random-16-seed_0", "gqa")
    assert traces.lost(one, unpruned) == 1
    assert traces.lost(traces.read(runs / "random-16-seed_0/gqa"), None) == 0
    assert traces.lost(traces.read(runs / "fps-8/gqa"), unpruned) == 0
    assert traces.rival(traces.read(runs / "fps-8/gqa")) is None


def test_a_question_is_explained(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "one.png"
    arguments = ["explain", str(runs / "css-16/gqa"), "--data", str(tmp_path), "--out", str(out)]
    assert main([*arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["doc_id"], told["question"], told["answer"]) == (1, "How many 1?", "two")
    assert [(run["run"], run["prediction"], run["tokens"]) for run in told["runs"]] == [
        ("vanilla", "two", 144), ("css-16", "three", 16), ("random-16-seed_0", "two", 16)
    ]  # fmt: skip
    with Image.open(out) as drawn:
        assert drawn.width > 2 * drawn.height
    first = out.read_bytes()
    assert main([*arguments, "--question", "3", "--against", str(runs / "qr-16/gqa")]) == 0
    said = capsys.readouterr().out
    assert "Question 3: How many 3?" in said
    assert "qr-16: three (wrong, 16 tokens)" in said
    assert out.read_bytes() != first


def test_bad_input(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases: list[tuple[list[str], str]] = [
        ([str(runs / "nothing/gqa")], "does not exist"),
        ([str(runs / "css-16/gqa"), "--question", "9"], "has no question 9: it has 4, from 0 to 3"),
        ([str(runs / "css-16/gqa"), "--data", str(runs)], "gqa.parquet is not there: give --data"),
        ([str(runs / "css-16/gqa"), "--out", str(tmp_path / "no/where.png")], "the folder .*no does not exist"),
    ]
    for arguments, message in cases:
        assert main(["explain", *arguments]) == 2
        error = capsys.readouterr().err
        assert re.search(message, error.replace("\n", " ")), error
    with pytest.raises(BadInput, match="has no row 7: it has 4"):
        traces.image(tmp_path, "gqa", 7)
