"""What lmms-eval's log of a question says in ours: its score from 0 to 1, by the official functions."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ocvtp.errors import Corrupt
from ocvtp.evaluation.benchmarks import Benchmark
from ocvtp.evaluation.generate import Answer

Logged = Mapping[str, Any]


def samples_of(
    benchmark: Benchmark, logged: Sequence[Logged], answers: Mapping[tuple[str, int], Answer], task: str
) -> list[dict[str, Any]]:
    """The lines of samples.jsonl, by row."""
    score = _SCORES.get(benchmark.name, _exact_match)
    lines = []
    for entry in sorted(logged, key=lambda entry: int(entry["doc_id"])):
        doc_id, doc = int(entry["doc_id"]), entry["doc"]
        answer = answers[task, doc_id]
        lines.append({
            "doc_id": doc_id,
            "unit": benchmark.unit_of(doc, doc_id),
            "question": str(doc["question"]),
            "answer": benchmark.answer_of(doc),
            "prediction": answer.text,
            "score": float(score(entry)),
            "category": benchmark.category_of(doc),
            "kept": _kept(answer),
        })  # fmt: skip
    return lines


def metrics_of(results: Mapping[str, Any]) -> dict[str, Any]:
    """lmms-eval's own metrics, without its error bars."""
    found = {key.removesuffix(",none"): value for key, value in results.items() if key.endswith(",none")}
    return {key: value for key, value in found.items() if "_stderr" not in key and isinstance(value, int | float)}


def primary_of(benchmark: Benchmark, metrics: Mapping[str, Any]) -> float:
    """The number of lmms-eval that stands for the benchmark.

    Raises:
        Corrupt: lmms-eval did not report it.
    """
    if benchmark.rule == "pairs":
        parts = [value for key, value in metrics.items() if key in ("mme_perception_score", "mme_cognition_score")]
        if parts:
            return float(sum(parts))
    elif benchmark.primary in metrics:
        return float(metrics[benchmark.primary])
    raise Corrupt(f"lmms-eval reported {', '.join(metrics) or 'nothing'} of {benchmark.name}, not {benchmark.primary}")


def image_tokens(answers: Iterable[Answer]) -> list[int]:
    """How many tokens were kept of each image."""
    return [kept if isinstance(kept, int) else len(kept) for answer in answers for kept in answer.kept]


def _kept(answer: Answer) -> Any:
    """The indices kept of one image, lists of them for several; unpruned: how many tokens there were."""
    if all(isinstance(kept, int) for kept in answer.kept):
        return sum(image_tokens([answer]))
    return answer.kept[0] if len(answer.kept) == 1 else answer.kept


def _exact_match(entry: Logged) -> float:
    return float(entry["exact_match"])


def _mme(entry: Logged) -> float:
    return float((entry.get("mme_perception_score") or entry["mme_cognition_score"])["score"])


def _seedbench(entry: Logged) -> float:
    found = entry["seed_all"]
    return float(found["pred"].lower().strip() == found["answer"].lower().strip())


def _mmmu(entry: Logged) -> float:
    from lmms_eval.tasks.mmmu.utils import evaluate_mmmu

    return float(evaluate_mmmu([entry["mmmu_acc"]])[1]["acc"])


def _mmbench(entry: Logged) -> float:
    """Whether this one row is answered right; the benchmark counts circles of rows that all are."""
    import pandas as pd
    from lmms_eval.tasks.mmbench.en_utils import mmbench_evaluator

    row = dict(entry["gpt_eval_score"])
    frame = pd.DataFrame([{**row, "prediction": str(row["prediction"])}])
    return float(mmbench_evaluator.eval_sub_data(frame, {row["index"]: row["answer"]}, static_only=True))


_SCORES: dict[str, Callable[[Logged], float]] = {
    "pope": lambda entry: float(entry["pope_accuracy"]["score"]),
    "mme": _mme,
    "seedbench": _seedbench,
    "mmmu": _mmmu,
    "mmbench": _mmbench,
}
