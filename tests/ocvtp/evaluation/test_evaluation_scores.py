"""Scores from answers, and intervals against closed forms."""

import math
import time
from typing import Any

import numpy as np
import pytest

from ocvtp.errors import BadInput
from ocvtp.evaluation.scores import counted, interval, relative, relative_average, score_of


def answers(right: list[float], **more: Any) -> list[dict[str, Any]]:
    """Answers of a benchmark whose score is a mean."""
    return [
        {"doc_id": i, "unit": i, "answer": "a", "prediction": "b", "score": s, "category": "", **more}
        for i, s in enumerate(right)
    ]


def yes_no(pairs: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """Answers of POPE: (right answer, given answer)."""
    return [
        {"doc_id": i, "unit": i, "answer": a, "prediction": p, "score": float(a == p), "category": "random"}
        for i, (a, p) in enumerate(pairs)
    ]


def mme(right: dict[str, list[tuple[float, float]]]) -> list[dict[str, Any]]:
    """Answers of MME: category -> scores of its pairs."""
    return [
        {"doc_id": 0, "unit": f"{name}/{i}", "answer": "Yes", "prediction": "", "score": score, "category": name}
        for name, pairs in right.items()
        for i, pair in enumerate(pairs)
        for score in pair
    ]


def binomial_quantile(q: float, n: int, p: float) -> int:
    total = 0.0
    for k in range(n + 1):
        total += math.comb(n, k) * p**k * (1 - p) ** (n - k)
        if total >= q:
            return k
    raise AssertionError


def test_scores_in_plain_arithmetic() -> None:
    assert score_of(answers([1.0, 0.0, 0.3, 1.0]), "textvqa") == pytest.approx(2.3 / 4)
    # 2 true positives, 1 false positive, 1 false negative; what is neither yes nor no is no false negative (lmms-eval).
    pairs = [("yes", "Yes"), ("yes", "yes "), ("no", "yes"), ("yes", "no"), ("yes", "maybe"), ("no", "no")]
    assert score_of(yes_no(pairs), "pope") == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    # A pair is worth 50 a right answer and 100 more if both are right; categories add up.
    two = {"color": [(1.0, 1.0), (1.0, 0.0)], "count": [(0.0, 0.0), (1.0, 1.0), (0.0, 1.0)]}
    assert score_of(mme(two), "mme") == pytest.approx((200 + 50) / 2 + (0 + 200 + 50) / 3)
    circular = [{**a, "unit": u} for a, u in zip(answers([1, 1, 1, 0, 1]), (7, 7, 8, 8, 9), strict=True)]
    assert score_of(circular, "mmbench") == pytest.approx(100 * 2 / 3)
    seed = answers([1, 0, 1], category="image") + answers([0, 0], category="video")
    assert score_of(seed, "seedbench") == pytest.approx(2 / 3)
    assert counted(seed, "seedbench") == 3


def test_what_is_missing_is_none() -> None:
    assert score_of([], "gqa") is None
    assert interval([], "pope") is None
    assert score_of(answers([1.0], category="video"), "seedbench") is None
    assert score_of(yes_no([("no", "no")]), "pope") == 0.0  # no positive at all: lmms-eval says 0, and so do we
    some = answers([1.0, 0.0])
    empty = {"score": None, "relative": None, "ci_low": None, "ci_high": None, "n": 0}
    assert relative(some, [], "gqa") == empty
    assert relative([], [some], "gqa") == {**empty, "score": 0.5, "n": 2}
    nothing_right = relative(answers([0.0, 0.0]), [some], "gqa")
    assert nothing_right == {**empty, "score": 0.5, "n": 2}
    average = relative_average({"gqa": some, "textvqa": some}, {"gqa": [some]}).to_dict()
    assert average["average"] == {"relative": None, "ci_low": None, "ci_high": None}
    assert average["benchmarks"]["gqa"]["relative"] == 100.0
    assert average["benchmarks"]["textvqa"]["relative"] is None
    assert average["average"]["relative"] is None, "textvqa was not evaluated"
    # What the unpruned model does not know is in no average, for no method; what it was not asked leaves none.
    none, half = answers([0.0, 0.0]), answers([1.0, 0.0])
    known = relative_average({"gqa": some, "textvqa": none}, {"gqa": [half], "textvqa": [half]}, resamples=100)
    alone = relative_average({"gqa": some}, {"gqa": [half]}, resamples=100).to_dict()["average"]
    assert known.to_dict()["average"] == alone
    assert known.rows["textvqa"]["score"] == 0.5
    guessed = answers([1.0] + 4 * [0.0], category="image")  # of four letters each fifth: worse than drawing one
    drawn = relative_average(
        {"gqa": some, "seedbench": guessed}, {"gqa": [half], "seedbench": [guessed]}, resamples=100
    )
    assert drawn.to_dict()["average"] == alone
    assert drawn.rows["seedbench"]["relative"] == 100
    assert relative_average({"textvqa": none}, {"textvqa": [half]}).relative is None
    assert relative_average({}, {}).to_dict()["average"]["relative"] is None


def test_the_interval_of_a_share_is_that_of_a_binomial() -> None:
    n, right = 200, 150
    samples = answers([1.0] * right + [0.0] * (n - right))
    found = interval(samples, "gqa", resamples=40_000)
    assert found is not None
    # The number of right answers in a resample is Binomial(n, right / n).
    expected = [binomial_quantile(q, n, right / n) / n for q in (0.025, 0.975)]
    assert found == pytest.approx(expected, abs=1.01 / n)
    assert found[0] < right / n < found[1]


def test_units_are_drawn_whole() -> None:
    # 50 groups of 4 equal answers are as good as 50 answers, not as 200.
    groups = [1.0] * 25 + [0.0] * 25
    circular = [{**a, "unit": i // 4} for i, a in enumerate(answers([s for s in groups for _ in range(4)]))]
    found = interval(circular, "mmbench", resamples=20_000)
    assert found is not None
    expected = [100 * binomial_quantile(q, 50, 0.5) / 50 for q in (0.025, 0.975)]
    assert found == pytest.approx(expected, abs=2.01)


def test_categories_of_mme_keep_their_size() -> None:
    # One pair only in "color": an unstratified resample would often leave the category empty.
    samples = mme({"color": [(1.0, 1.0)], "count": [(1.0, 1.0)] * 8 + [(0.0, 0.0)] * 8})
    found = interval(samples, "mme", resamples=20_000)
    assert found is not None
    expected = [200 + 200 * binomial_quantile(q, 16, 0.5) / 16 for q in (0.025, 0.975)]
    assert found == pytest.approx(expected, abs=200 * 1.01 / 16)


def test_a_run_that_answers_as_vanilla_is_at_100_without_width() -> None:
    rng = np.random.default_rng(0)
    vanilla = answers(rng.integers(0, 2, 100).astype(float).tolist())
    row = relative(vanilla, [list(reversed(vanilla))], "gqa")  # the order of lines does not matter
    assert (row["relative"], row["ci_low"], row["ci_high"]) == (100.0, 100.0, 100.0)


def test_pairing_with_vanilla_narrows_the_interval() -> None:
    rng = np.random.default_rng(1)
    right = (rng.random(400) < 0.7).astype(float)
    lost = right.copy()
    lost[np.flatnonzero(right)[:20]] = 0.0
    other = rng.permutation(lost)
    paired = relative(answers(right.tolist()), [answers(lost.tolist())], "gqa")
    unpaired = relative(answers(right.tolist()), [answers(other.tolist())], "gqa")
    assert paired["relative"] == unpaired["relative"] == pytest.approx(100 * lost.sum() / right.sum())
    width, wide = (row["ci_high"] - row["ci_low"] for row in (paired, unpaired))
    assert width < wide / 2
    # Given the number of right answers m, the number lost is Binomial(m, 20 / m).
    m = int(right.sum())
    assert width == pytest.approx(100 * 2 * 1.96 * math.sqrt(20 / m * (1 - 20 / m) / m), rel=0.15)


def test_seeds_share_the_questions_that_are_drawn() -> None:
    rng = np.random.default_rng(2)
    vanilla = answers([1.0] * 300)
    same = (rng.random(300) < 0.5).astype(float).tolist()
    three_times = relative(vanilla, [answers(same)] * 3, "gqa")
    once = relative(vanilla, [answers(same)], "gqa")
    assert three_times == pytest.approx(once)  # equal seeds are no more evidence than one
    # Each question is answered right by exactly one of two seeds: their mean is 50 whatever is drawn.
    opposite = [1.0 - s for s in same]
    row = relative(vanilla, [answers(same), answers(opposite)], "gqa")
    assert (row["relative"], row["ci_low"], row["ci_high"]) == pytest.approx((50.0, 50.0, 50.0))


def test_the_average_and_its_interval() -> None:
    rng = np.random.default_rng(3)
    vanilla = {"gqa": answers([1.0] * 400), "textvqa": answers([1.0] * 400)}
    runs = {name: [answers((rng.random(400) < 0.8).astype(float).tolist())] for name in vanilla}
    found = relative_average(vanilla, runs, resamples=4000).to_dict()
    rows = found["benchmarks"]
    assert found["average"]["relative"] == pytest.approx((rows["gqa"]["relative"] + rows["textvqa"]["relative"]) / 2)
    # Two independent shares: the standard error of their mean is smaller by the square root of 2.
    deviation = math.hypot(
        *(100 * math.sqrt(r["relative"] / 100 * (1 - r["relative"] / 100) / 400) for r in rows.values())
    )
    width = found["average"]["ci_high"] - found["average"]["ci_low"]
    assert width == pytest.approx(2 * 1.96 * deviation / 2, rel=0.1)
    again = relative_average(vanilla, runs, resamples=4000).to_dict()
    assert again == found
    few = [relative_average(vanilla, runs, resamples=100, seed=seed).to_dict()["average"] for seed in (0, 1)]
    assert few[0] != few[1]
    alone = relative(vanilla["gqa"], runs["gqa"], "gqa", resamples=4000)
    assert alone == rows["gqa"]  # a benchmark's draws do not depend on its neighbours


def test_other_questions_cannot_be_paired() -> None:
    with pytest.raises(BadInput, match="gqa: 3 units of a run, 4 of vanilla, and they are not the same"):
        relative(answers([1.0] * 4), [answers([1.0] * 3)], "gqa")
    with pytest.raises(BadInput, match="has 3 answers"):
        score_of(mme({"color": [(1.0, 1.0)]}) + mme({"color": [(1.0, 1.0)]})[:1], "mme")
    with pytest.raises(BadInput, match="no benchmark 'gqaa'"):
        score_of([], "gqaa")


def test_many_resamples_are_fast() -> None:
    rng = np.random.default_rng(4)

    def run() -> dict[str, list[dict[str, Any]]]:
        marks = (rng.random(400) < 0.8).astype(float).tolist()
        halves = list(zip(marks[::2], marks[1::2], strict=True))
        return {
            "gqa": answers(marks),
            "textvqa": answers(marks),
            "pope": yes_no([("yes" if i % 2 else "no", "yes" if (i % 2) == m else "no") for i, m in enumerate(marks)]),
            "mme": mme({name: halves[i::4] for i, name in enumerate(("color", "count", "existence", "OCR"))}),
        }

    vanilla, seeds = run(), [run() for _ in range(3)]
    runs = {name: [seed[name] for seed in seeds] for name in vanilla}
    started = time.perf_counter()
    found = relative_average(vanilla, runs, resamples=2000).to_dict()
    assert time.perf_counter() - started < 1.0
    assert found["average"]["ci_low"] < found["average"]["relative"] < found["average"]["ci_high"]
