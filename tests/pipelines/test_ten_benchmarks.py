"""All ten benchmarks of the paper on tiny-llava, from scenes to the paper's Table 1."""

import csv
import json
from pathlib import Path

import pytest
from small_params import write_params

from ocvtp.evaluation.benchmarks import benchmarks
from pipelines import eval as evaluate
from pipelines import report, sample

pytestmark = [pytest.mark.pipeline, pytest.mark.nightly]


def test_table_1_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OCVTP_STORE", raising=False)
    monkeypatch.setenv("OCVTP_ROOT", str(tmp_path))
    asked = write_params(tmp_path, {"benchmark": "all", "method": ["random", "visionzip"], "keep": [48, 16]})
    for stage in (sample, evaluate):
        assert stage.main(asked) == 0
    assert report.main(tmp_path) == 0
    scores = json.loads((tmp_path / "results/scores.json").read_text())
    assert {(row["method"], row["tokens"], row["benchmark"]) for row in scores} == {
        (method, tokens, name)
        for method, tokens in (("vanilla", 144), *((m, k) for m in ("random", "visionzip") for k in (48, 16)))
        for name in benchmarks()
    }
    assert all(row["score"] is not None for row in scores)
    vanilla = {row["benchmark"]: row["score"] for row in scores if row["method"] == "vanilla"}
    assert min(vanilla[name] for name in ("gqa", "pope", "textvqa", "vqav2", "vizwiz")) > 0.4
    with (tmp_path / "reports/tables/table1-tiny-llava.csv").open() as file:
        rows = {(row["block"], row["Method"]): row for row in csv.DictReader(file)}
    labels = ("GQA", "MMBench", "MME", "POPE", "ScienceQA", "TextVQA", "VQAv2", "VizWiz", "MMMU", "SEED-Bench")
    for place in (
        ("576 Tokens (100%)", "Vanilla"),
        ("192 Tokens (33.3%)", "VisionZip"),
        ("64 Tokens (11.1%)", "Random"),
    ):
        assert all(rows[place][label] for label in labels), place
