"""Ranks with intervals, and hard questions, against plain loops."""

from types import SimpleNamespace
from typing import Any

import numpy as np

from ocvtp.evaluation.scores import Average
from pipelines.standings import hard, ranks


def entry(keep: int | None, relative: float | None, draws: Any = None, changes: Any = ()) -> Any:
    cell = SimpleNamespace(vlm="v", keep=keep, changes=changes)
    return cell, Average({}, relative, None if draws is None else np.array(draws, dtype=float))


def test_ranks_are_those_of_each_resample() -> None:
    rng = np.random.default_rng(0)
    draws = rng.normal(size=(4, 200)) + np.array([[3.0], [0.0], [0.2], [-9.0]])
    found = ranks(
        [
            entry(None, 100.0, np.full(200, 100.0)),
            *[entry(8, float(row.mean()), row) for row in draws],
            entry(8, None),
            entry(8, 50.0, np.zeros(200), changes=(("layer", 2),)),
            entry(4, 1.0, np.zeros(200)),
            entry(4, 1.0, np.zeros(200)),
        ]
    )
    assert set(found) == {1, 2, 3, 4, 7, 8}
    for row, place in enumerate((1, 2, 3, 4)):
        each = sorted(1 + sum(other[r] > draws[row][r] for other in draws) for r in range(200))
        means = [float(other.mean()) for other in draws]
        assert found[place] == {
            "rank": 1 + sum(mean > means[row] for mean in means), "low": each[4], "high": each[194], "of": 4
        }  # fmt: skip
    assert found[7] == found[8] == {"rank": 1, "low": 1, "high": 1, "of": 2}


def test_hard_questions_are_those_that_fewer_tokens_alone_do_not_answer() -> None:
    def samples(*scores: float) -> list[dict[str, Any]]:
        return [{"doc_id": number, "score": score} for number, score in enumerate(scores)]

    vanilla = {"a": samples(1, 1, 1, 0, 1), "b": samples(1, 1)}
    base = {"a": [samples(0, 1, 0, 0, 0)], "b": [samples(1, 0)]}
    runs = {"a": [samples(1, 0, 0, 1, 0), samples(1, 1, 0, 1, 1)], "b": [samples(0, 1), samples(0, 1)]}
    found = hard(runs, base, vanilla, 500)
    # 0, 2 and 4 of a, 1 of b: 1, 0, a half and 1.
    assert found is not None
    assert (found["share"], found["n"]) == (0.625, 4)
    assert 0 <= found["ci_low"] < 0.625 < found["ci_high"] <= 1
    assert hard(base, base, vanilla, 10) == {"share": 0.0, "ci_low": 0.0, "ci_high": 0.0, "n": 4}
    assert hard(runs, {}, vanilla, 10) is None
    assert hard(runs, {"a": [samples(1, 1, 1, 1, 1)]}, vanilla, 10) is None
