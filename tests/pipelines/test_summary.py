"""Tables of scores: arithmetic done again by hand, and dashes where something is missing."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ocvtp.evaluation import listing as files
from ocvtp.methods.budget import Budget
from pipelines.grid import Cell, PrunerCell
from pipelines.summary import Result, metrics, score_rows, summary_rows

VLM, WHOLE, QUESTIONS = "tiny-llava", 144, 20
ANSWERS = {"gqa": 16, "textvqa": 10}
"""Right answers of the unpruned model."""


def setting(method: str, keep: int | None = None, seed: int | None = None, loss: str | None = None) -> Cell:
    pruner = None if loss is None else PrunerCell(VLM, 9, loss, (16, 48), seed or 0)
    budget = None if keep is None else Budget(keep, count=keep)
    layer, top_k = (9, 1) if loss else (None, None)
    return Cell(VLM, method, budget, keep or WHOLE, (keep or WHOLE) / WHOLE, seed, layer, top_k, pruner)


@pytest.fixture
def result(tmp_path: Path):
    def make(one: Cell, benchmark: str, right: int) -> Result:
        folder = tmp_path / one.name / benchmark
        samples = [
            {
                "doc_id": index, "unit": index, "question": "?", "answer": "yes", "category": "",
                "prediction": "yes" if index < right else "no", "score": float(index < right), "kept": 1,
            }
            for index in range(QUESTIONS)
        ]  # fmt: skip
        score: dict[str, Any] = {
            "score": right / QUESTIONS, "n": QUESTIONS, "tokens_kept": {"mean": one.tokens}, "protocol": "native",
            "setting": {"fingerprint": "f" * 64 if one.pruner else None}, "metrics": {"exact_match": right / QUESTIONS},
        }  # fmt: skip
        files.write(folder, score, samples)
        return Result.read(one, benchmark, folder, f"results/evaluate/{VLM}/{one.name}/{benchmark}")

    return make


@pytest.fixture
def grid(result) -> list[Result]:
    found = [result(setting("vanilla"), name, right) for name, right in ANSWERS.items()]
    for seed, lost in ((0, 2), (1, 4)):
        found += [result(setting("random", 16, seed), name, right - lost) for name, right in ANSWERS.items()]
        found += [result(setting("oc-vtp", 16, seed, "mse"), name, right - 1) for name, right in ANSWERS.items()]
    return found


def test_rows_of_scores(grid: list[Result]) -> None:
    rows = score_rows(grid, 200)
    assert len(rows) == len(grid)
    row = next(row for row in rows if (row["method"], row["seed"], row["benchmark"]) == ("random", 1, "gqa"))
    assert row["score"] == 12 / 20
    assert row["relative"] == pytest.approx(100 * 12 / 16)
    assert row["ci_low"] < 12 / 20 < row["ci_high"]
    assert (row["layer"], row["loss"], row["slots"], row["top_k"], row["fingerprint"]) == (None,) * 5
    ours = next(row for row in rows if row["method"] == "oc-vtp")
    assert (ours["layer"], ours["loss"], ours["slots"], ours["top_k"]) == (9, "mse", [16, 48], 1)
    assert ours["fingerprint"] == "f" * 64
    assert ours["path"].endswith("oc-vtp-16-layer_9-mse-slots_16_48-top_1-seed_0/gqa")
    vanilla = rows[0]
    assert (vanilla["keep"], vanilla["seed"], vanilla["relative"], vanilla["tokens"]) == (None, None, 100.0, WHOLE)


def test_the_summary_pools_seeds(grid: list[Result]) -> None:
    vanilla, random, ours = summary_rows(grid, list(ANSWERS), 500)
    assert random["seeds"] == [0, 1]
    assert random["benchmarks"]["gqa"]["relative"] == pytest.approx(100 * (14 + 12) / 2 / 16)
    assert random["benchmarks"]["textvqa"]["relative"] == pytest.approx(100 * (8 + 6) / 2 / 10)
    assert random["average"]["relative"] == pytest.approx((81.25 + 70) / 2)
    assert random["average"]["ci_low"] < (81.25 + 70) / 2 < random["average"]["ci_high"]
    assert ours["average"]["relative"] == pytest.approx(100 * (15 / 16 + 9 / 10) / 2)
    assert vanilla["average"] == {"relative": 100.0, "ci_low": None, "ci_high": None}


def test_what_is_missing_is_none_and_never_zero(grid: list[Result]) -> None:
    some = [one for one in grid if not (one.setting.method == "random" and one.benchmark == "gqa")]
    random = summary_rows(some, list(ANSWERS), 200)[1]
    assert random["benchmarks"]["gqa"] == {"score": None, "relative": None, "ci_low": None, "ci_high": None, "n": 0}
    assert random["average"]["relative"] is None
    assert random["benchmarks"]["textvqa"]["relative"] == pytest.approx(70)
    without = [one for one in grid if one.setting.method != "vanilla"]
    assert {row["relative"] for row in score_rows(without, 200)} == {None}
    assert metrics(summary_rows(some, list(ANSWERS), 200))[VLM]["random"] == {"16": {"textvqa": pytest.approx(70)}}


def test_metrics_have_one_path_whatever_the_loss_but_where_several_are_in_the_grid(grid, result) -> None:
    alone = metrics(summary_rows(grid, list(ANSWERS), 200))[VLM]
    assert set(alone) == {"vanilla", "random", "oc-vtp"}
    assert alone["vanilla"] == {"gqa": 0.8, "textvqa": 0.5}
    assert set(alone["oc-vtp"]["16"]) == {"average", "gqa", "textvqa"}
    more = [result(setting("oc-vtp", 16, 0, "aw_mse"), name, right) for name, right in ANSWERS.items()]
    both = metrics(summary_rows([*grid, *more], list(ANSWERS), 200))[VLM]
    assert set(both) == {"vanilla", "random", "oc-vtp-loss_mse", "oc-vtp-loss_aw_mse"}


def test_differences_are_of_averages_and_paired_by_question(grid: list[Result], result) -> None:
    tried = []
    for seed in (0, 1):
        one = replace(setting("oc-vtp", 16, seed, "aw_mse"), changes=(("loss", "aw_mse"),))
        tried += [result(one, name, right - 3) for name, right in ANSWERS.items()]
    _, random, ours, other = summary_rows([*grid, *tried], list(ANSWERS), 500)
    lost = 100 * (2 / 16 + 2 / 10) / 2
    assert other["difference"]["points"] == pytest.approx(-lost)
    assert (
        other["difference"]["ci_low"] < -lost < other["difference"]["ci_high"] <= 0
    )  # never right where ours is wrong
    assert other["changes"] == {"loss": "aw_mse"}
    assert (random["difference"], ours["difference"], random["against"]) == (None, None, {})
    ahead = ours["against"]["random"]["points"]
    assert other["against"]["random"]["points"] == pytest.approx(ahead - lost), "what was ablated is compared too"
    assert ours["against"]["random"]["points"] == pytest.approx(100 * (2 / 16 + 2 / 10) / 2)
    assert ours["against"]["random"]["ci_low"] >= 0
    assert set(ours["against"]) == {"random"}  # vanilla has another budget
    assert "aw_mse" in next(name for name in metrics([random, ours, other])[VLM] if "loss" in name)


def test_a_pruner_trained_on_a_benchmarks_images_is_compared_on_that_one_alone(grid: list[Result], result) -> None:
    own = []
    for seed in (0, 1):
        one = setting("oc-vtp", 16, seed, "mse")
        assert one.pruner is not None
        pruner = replace(one.pruner, changes=(("train.on", "textvqa"),))
        one = replace(one, pruner=pruner, changes=pruner.changes)
        own.append(result(one, "textvqa", ANSWERS["textvqa"] + 1))
    *_, ours, row = summary_rows([*grid, *own], list(ANSWERS), 500)
    assert (row["changes"], row["average"]["relative"]) == ({"train.on": "textvqa"}, None)
    assert row["benchmarks"]["textvqa"]["relative"] == pytest.approx(110)
    assert row["benchmarks"]["gqa"]["relative"] is None
    assert row["difference"]["points"] == pytest.approx(100 * 2 / 10)
    assert 0 <= row["difference"]["ci_low"] < 20 < row["difference"]["ci_high"], (
        "paired: never wrong where ours is right"
    )
    assert ours["difference"] is None
    assert row["rank"] is None


def test_what_was_really_kept_is_a_mean_over_benchmarks(grid: list[Result]) -> None:
    vanilla, random, _ = summary_rows(grid, list(ANSWERS), 200)
    assert (vanilla["kept"], random["kept"]) == (WHOLE, 16)


def test_where_slots_leave_gaps_metrics_say_how_many_tokens_were_kept(grid: list[Result], result) -> None:
    one = setting("oc-vtp", 16, 0, "mse")
    one = replace(one, changes=(("evaluate.options.oc-vtp.fill", "none"),))
    gaps = [result(one, name, right - 1) for name, right in ANSWERS.items()]
    for found, kept in zip(gaps, (13.0, 14.5), strict=True):
        found.score["tokens_kept"]["mean"] = kept
    rows = summary_rows([*grid, *gaps], list(ANSWERS), 200)
    assert rows[-1]["kept"] == 13.75
    found = metrics(rows)[VLM]
    assert found["oc-vtp-fill_none"]["16"]["kept"] == 13.75
    assert "kept" not in found["oc-vtp"]["16"]


def test_without_the_setting_it_was_changed_from_there_is_no_difference(grid: list[Result], result) -> None:
    one = replace(setting("oc-vtp", 9, 0, "aw_mse"), changes=(("loss", "aw_mse"),))
    rows = summary_rows([*grid, *(result(one, name, right) for name, right in ANSWERS.items())], list(ANSWERS), 200)
    assert rows[-1]["difference"] is None


def test_an_image_counts_once_for_coverage_however_often_it_is_asked_about(grid: list[Result]) -> None:
    counts = {(0, "a"): [4, 2, 2, 0], (1, "a"): [4, 4, 2, 2], (0, "b"): [1, 1, 0, 0], (1, "b"): [1, 0, 0, 0]}
    seen = []
    for one in grid:
        if one.setting.method == "random":
            names = ["a"] * (QUESTIONS - 1) + ["b"]
            samples = [
                {**sample, "image": name, "objects": counts[one.setting.seed or 0, name]}
                for sample, name in zip(one.samples, names, strict=True)
            ]
            one = replace(one, samples=samples)
        seen.append(one)
    _, random, ours = summary_rows(seen, list(ANSWERS), 500)
    assert random["coverage"]["all"]["share"] == pytest.approx((3 + 0.5) / (4 + 1))
    assert random["coverage"]["all"]["objects"] == 5
    assert random["coverage"]["small"] == {"share": 0.5, "ci_low": 0.0, "ci_high": 0.5, "objects": 2}
    assert ours["coverage"] is None
    assert metrics([random])[VLM]["random"]["16"]["coverage"] == {"all": pytest.approx(70), "small": pytest.approx(50)}
