"""How methods stand against each other at each budget: ranks with intervals, and what is left of hard questions."""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ocvtp.evaluation.scores import Average, Floats
from pipelines.grid import Cell

Row = dict[str, Any]
Sample = Mapping[str, Any]
BASELINE = "downsample"
"""Questions that it gets wrong at a budget are hard there: fewer tokens alone do not answer them (VTC-Bench)."""


def ranks(averages: Sequence[tuple[Cell, Average]]) -> dict[int, Row]:
    """{rank, low, high, of} of each setting of the grid by its place in the list, among those of its VLM and budget.

    The rank is that of the average relative accuracy, 1 the best and equal ones sharing the better; its 95 % interval
    is that of the rank in each resample, in which all settings answer the same questions.
    """
    groups: dict[Any, list[tuple[int, float, Floats]]] = {}
    for place, (cell, average) in enumerate(averages):
        if cell.keep is not None and not cell.changes and average.relative is not None and average.draws_R is not None:
            known = (place, average.relative, average.draws_R)
            groups.setdefault((cell.vlm, cell.keep), []).append(known)
    found: dict[int, Row] = {}
    for places in groups.values():
        values_M = np.array([value for _, value, _ in places])
        draws_MR = np.stack([draws_R for _, _, draws_R in places])
        for row, (place, _, _) in enumerate(places):
            above_R = (draws_MR > draws_MR[row] + 1e-9).sum(0) + 1
            low, high = np.quantile(above_R, [0.025, 0.975], method="inverted_cdf")
            rank = int((values_M > values_M[row] + 1e-9).sum()) + 1
            found[place] = {"rank": rank, "low": int(low), "high": int(high), "of": len(places)}
    return found


def hard(
    runs: Mapping[str, Sequence[Sequence[Sample]]], baseline: Mapping[str, Sequence[Sequence[Sample]]],
    vanilla: Mapping[str, Sequence[Sample]], resamples: int,
) -> Row | None:  # fmt: skip
    """Of the questions that the baseline gets wrong and the unpruned model right: the share that is answered.

    Args:
        runs: benchmark -> answers of each seed.
        baseline: likewise, of `BASELINE` at the same budget.
        vanilla: benchmark -> answers of the unpruned model.
        resamples: behind the 95 % interval, over questions; seeds are averaged.

    Returns:
        {share, ci_low, ci_high, n}; None where there is no such question, or no baseline.
    """
    shares: list[float] = []
    for benchmark, seeds in runs.items():
        if not seeds or not baseline.get(benchmark):
            continue
        right = {sample["doc_id"] for sample in vanilla.get(benchmark, ()) if sample["score"] > 0}
        wrong = {sample["doc_id"] for sample in baseline[benchmark][0] if sample["score"] <= 0} & right
        by_question: dict[Any, list[float]] = {}
        for samples in seeds:
            for sample in samples:
                if sample["doc_id"] in wrong:
                    by_question.setdefault(sample["doc_id"], []).append(float(sample["score"] > 0))
        shares += [float(np.mean(values)) for _, values in sorted(by_question.items())]
    if not shares:
        return None
    values_Q = np.array(shares)
    rng = np.random.default_rng([0, zlib.crc32(b"hard")])
    counts_RQ = rng.multinomial(len(values_Q), [1 / len(values_Q)] * len(values_Q), size=resamples)
    low, high = np.quantile(counts_RQ @ values_Q / len(values_Q), [0.025, 0.975])
    return {"share": float(values_Q.mean()), "ci_low": float(low), "ci_high": float(high), "n": len(values_Q)}
