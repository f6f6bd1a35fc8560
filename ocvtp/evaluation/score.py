"""Scores answers that were given before: no VLM is loaded, nothing is asked again."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ocvtp.data.coverage import Covered
from ocvtp.errors import Corrupt, Incompatible
from ocvtp.evaluation import listing, preflight, scores
from ocvtp.evaluation.answered import Answers, joined
from ocvtp.evaluation.benchmarks import NATIVE, Benchmark
from ocvtp.evaluation.benchmarks import benchmark as named
from ocvtp.evaluation.objects import add_objects

_TOLERANCE = 1e-5
"""Between lmms-eval's number and ours, relative: MMMU rounds its own to five digits."""


def score(shards: Sequence[Answers], data: Path | None) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What stands in score.json and samples.jsonl.

    Where the question set comes with masks (`scenes.json` beside it), both also say which objects kept tokens lie on.

    Args:
        shards: all answers to one benchmark.
        data: the questions: a parquet, or a folder with `<benchmark>.parquet`; None: the official data set.

    Raises:
        BadInput: a question has no answer, or two.
        Incompatible: shards were made in different ways, or of other data.
        Corrupt: lmms-eval's number does not follow from the answers.
    """
    found = joined(shards)
    about = dict(found.about)
    entry = named(about["benchmark"], about["protocol"])
    path = None if data is None else preflight.locate(entry, data)
    _check_data(about["data"], path)
    from ocvtp.evaluation.lmms.official import opened
    from ocvtp.evaluation.lmms.outcome import primary_of, scored
    from ocvtp.evaluation.lmms.tasks import package

    package()
    answers = [one.answer for one in found.answered]
    with opened(entry, path) as questions:
        metrics, samples = scored(questions, answers)
    grid = about.pop("grid")
    covered = add_objects(samples, path, None if grid is None else tuple(grid))
    official = named(entry.name, NATIVE)
    value: float | None = _agreed(official, primary_of(official, metrics), samples)
    if entry.rule != official.rule:
        value = scores.score_of(samples, entry.name, entry.protocol)
    image_tokens = [count for answer in answers for count in answer.image_tokens]
    budgets = set(image_tokens)
    about["setting"] = {**about["setting"], "tokens": budgets.pop() if len(budgets) == 1 else None}
    result = listing.clean({
        "benchmark": entry.name,
        "task": entry.task,
        "primary": entry.primary,
        "score": value,
        "scale": entry.scale,
        "metrics": {**metrics, **_more(entry, samples, value)},
        "n": scores.counted(samples, entry.name),
        **about,
        "batch_size": found.batch_size,
        "differs_from_paper": entry.differs,
        "tokens_kept": _spread(image_tokens),
        "object_coverage": None if covered is None else _coverage(covered),
    })  # fmt: skip
    return dict(result), samples


def _check_data(about: Any, path: Path | None) -> None:
    if path is None:
        return
    with path.open("rb") as file:
        if about.get("sha256") != hashlib.file_digest(file, "sha256").hexdigest():
            raise Incompatible(f"{path} is not the question set that was answered (SHA-256 differs)")


def _agreed(entry: Benchmark, theirs: float, samples: Sequence[dict[str, Any]]) -> float:
    """The score as it follows from the answers, which lmms-eval must agree with."""
    ours = scores.score_of(samples, entry.name)
    if ours is None or abs(ours - theirs) > _TOLERANCE * max(1.0, abs(theirs)):
        raise Corrupt(f"lmms-eval scores {entry.name} {theirs}, but {ours} follows from the {len(samples)} answers")
    return ours


def _more(entry: Benchmark, samples: Sequence[dict[str, Any]], score: float | None) -> dict[str, Any]:
    """Metrics that lmms-eval does not report: what the paper's number is, and its parts by category."""
    if entry.name == "mme":
        return {"mme_score": score}
    if entry.name != "pope":
        return {}
    categories = sorted({sample["category"] for sample in samples} - {""})
    by = {name: scores.score_of([s for s in samples if s["category"] == name], "pope") for name in categories}
    known = [value for value in by.values() if value is not None]
    said = [sample["prediction"].lower().strip() for sample in samples]
    return {
        **{f"pope_f1_{name}": value for name, value in by.items()},
        "pope_f1_mean": sum(known) / len(known) if known else None,
        # lmms-eval's yes_ratio is that of the right answers.
        "pope_said_yes": said.count("yes") / len(said),
    }


def _spread(counts: Sequence[int]) -> dict[str, Any]:
    """Of the tokens kept of each image."""
    if not counts:
        return {"mean": None, "min": None, "max": None}
    return {"mean": sum(counts) / len(counts), "min": min(counts), "max": max(counts)}


def _coverage(covered: Covered) -> dict[str, Any]:
    """Share of objects, and of small ones, with a kept token on their mask."""
    return {
        "all": covered.share,
        "small": covered.small_share,
        "objects": covered.objects,
        "small_objects": covered.small_objects,
    }
