"""Scores answers by the official functions of lmms-eval; what they say of a question in ours: a score from 0 to 1."""

import argparse
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ocvtp.errors import BadInput, Corrupt
from ocvtp.evaluation.answered import Answer
from ocvtp.evaluation.benchmarks import Benchmark
from ocvtp.evaluation.lmms.official import Questions, cause_of

Logged = Mapping[str, Any]


def scored(questions: Questions, answers: Sequence[Answer]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """lmms-eval's own metrics, and the lines of samples.jsonl.

    Args:
        questions: as `ocvtp.evaluation.lmms.official.opened` gives them.
        answers: to the first rows, in their order.
    """
    from lmms_eval.evaluator_utils import TaskOutput
    from tenacity import RetryError

    task = questions.task
    # Submission files and the like go to the temporary folder.
    task.args = argparse.Namespace(output_path=str(questions.folder), process_with_media=False, reasoning_tags=None)
    outcome = TaskOutput.from_taskdict(task.config.task, task)
    logged = []
    for row, answer in enumerate(answers):
        doc = task.eval_docs_no_media[row]  # no image is decoded again
        # Some tasks draw where an answer cannot be read: always the same, whatever is answered to other questions.
        random.seed(str(row))
        try:
            values = task.process_results(doc, [answer.text])
        except RetryError as error:
            raise cause_of(questions.benchmark, error) from error
        except Exception as error:  # whatever the official function comes across
            what = f"{type(error).__name__}: {error}"
            raise BadInput(f"the answer to question {row} of {questions.where} cannot be scored: {what}") from error
        for metric, value in values.items():
            outcome.sample_metrics[metric, "none"].append(value)
        logged.append({**values, "doc_id": row, "doc": doc})
    try:
        outcome.calculate_aggregate_metric(bootstrap_iters=0)
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise BadInput(
            f"lmms-eval makes no score of the {len(answers)} answers to {questions.where}: {what}"
        ) from error
    return _metrics(outcome.agg_metrics), _samples(questions.benchmark, logged, answers)


def _samples(benchmark: Benchmark, logged: Sequence[Logged], answers: Sequence[Answer]) -> list[dict[str, Any]]:
    score = _SCORES.get(benchmark.name, _exact_match)
    lines = []
    for entry, answer in zip(logged, answers, strict=True):
        doc_id, doc = entry["doc_id"], entry["doc"]
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


def _metrics(results: Mapping[str, Any]) -> dict[str, Any]:
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


def _kept(answer: Answer) -> Any:
    """The indices kept of one image, lists of them for several; unpruned: how many tokens there were."""
    if all(isinstance(kept, int) for kept in answer.kept):
        return sum(answer.image_tokens)
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
