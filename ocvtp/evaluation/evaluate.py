"""`evaluate`: one setting on one benchmark, with the answers to every question.

The result is a function of the setting, the data and the versions that it names: it holds no times and no paths.
"""

import hashlib
import threading
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ocvtp.data.coverage import Covered
from ocvtp.errors import Corrupt
from ocvtp.evaluation import listing, preflight, scores
from ocvtp.evaluation.benchmarks import Benchmark
from ocvtp.evaluation.benchmarks import benchmark as named
from ocvtp.evaluation.generate import Answerer
from ocvtp.evaluation.objects import add_objects
from ocvtp.evaluation.setting import EvaluationSetting, forget, pruner_fingerprint, ready

__all__ = ["EvaluationSetting", "evaluate", "forget"]
_PACKAGES = ("ocvtp", "torch", "transformers", "tokenizers", "lmms-eval", "datasets", "numpy", "pillow", "torchvision")
_TOLERANCE = 1e-5
"""Between lmms-eval's number and ours, relative: MMMU rounds its own to five digits."""
_ALONE = threading.Lock()
"""lmms-eval has settings of the whole process: one evaluation at a time."""


def evaluate(
    setting: EvaluationSetting,
    benchmark: str,
    data: Path | None,
    out: Path,
    *,
    limit: int | None = None,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Ask a VLM the questions of a benchmark, score its answers, and write score.json and samples.jsonl.

    Where the question set comes with masks (`scenes.json` beside it), both also say which objects kept tokens lie on.

    Args:
        setting: the VLM and how it is pruned.
        benchmark: a name of benchmarks.yaml.
        data: a parquet with the official columns, or a folder with `<benchmark>.parquet`; None: the official data set.
        out: folder for the results.
        limit: ask at most so many of the first questions; pairs stay whole.
        device: cpu, cuda, ...
        progress: called with (questions answered, questions) after each batch.

    Returns:
        What stands in score.json.

    Raises:
        BadInput: unknown benchmark or method, unfit data or pruner; before the VLM is loaded where that can be known.
        NotAvailable: lmms-eval, the VLM or the official data set is not on this machine.
        Corrupt: lmms-eval's number does not follow from the answers.
    """
    entry = named(benchmark)
    path = None if data is None else preflight.locate(entry, data)
    rows = preflight.unseen(entry, limit) if path is None else preflight.check(entry, path, limit)
    fingerprint = pruner_fingerprint(setting.pruner)
    from ocvtp.evaluation.lmms.ask import ask
    from ocvtp.evaluation.lmms.tasks import package

    package()
    with _ALONE, ready(setting, device) as answerer:
        outcome = ask(entry, answerer, data=path, batch_size=setting.batch_size, limit=rows, progress=progress)
        made = _made_by(setting, answerer, outcome.image_tokens, fingerprint)
        covered = add_objects(outcome.samples, path, answerer.vlm.entry.grid)
    score = _agreed(entry, outcome.primary, outcome.samples)
    result = listing.clean({
        "benchmark": benchmark,
        "task": entry.task,
        "primary": entry.primary,
        "score": score,
        "scale": entry.scale,
        "metrics": {**outcome.metrics, **_more(entry, outcome.samples, score)},
        "n": scores.counted(outcome.samples, benchmark),
        **made,
        "data": _data(entry, path),
        "limit": limit,
        "tokens_kept": _spread(outcome.image_tokens),
        "object_coverage": None if covered is None else _coverage(covered),
        "versions": _versions(),
    })  # fmt: skip
    listing.write(out, result, outcome.samples)
    return dict(result)


def _made_by(
    setting: EvaluationSetting, answerer: Answerer, image_tokens: Sequence[int], fingerprint: str | None
) -> dict[str, Any]:
    vlm, name = answerer.vlm, setting.vlm
    budgets = set(image_tokens)
    return {
        "setting": {
            "vlm": Path(name).name if Path(name).is_dir() else name,
            "revision": vlm.revision or None,
            "weights": vlm.weights,
            "method": setting.method,
            "keep": setting.keep,
            "tokens": budgets.pop() if len(budgets) == 1 else None,
            "seed": setting.seed,
            "options": dict(setting.options),
            "fingerprint": fingerprint,
            "max_new_tokens": setting.max_new_tokens,
        },
        "prompt_template": answerer.prompt_template,
        "dtype": setting.dtype,
        "attn_implementation": vlm.model.config._attn_implementation,
        "image_backend": _image_backend(vlm.processor.image_processor),
    }


def _image_backend(processor: Any) -> str:
    """Which library resizes images: the two differ in the last digits of a pixel."""
    return "pil" if type(processor).__name__.endswith("Pil") or find_spec("torchvision") is None else "torchvision"


def _agreed(entry: Benchmark, theirs: float, samples: Sequence[dict[str, Any]]) -> float:
    """The score as it follows from the answers, which lmms-eval must agree with."""
    ours = scores.score_of(samples, entry.name)
    if ours is None or abs(ours - theirs) > _TOLERANCE * max(1.0, abs(theirs)):
        raise Corrupt(f"lmms-eval scores {entry.name} {theirs}, but {ours} follows from the {len(samples)} answers")
    return ours


def _more(entry: Benchmark, samples: Sequence[dict[str, Any]], score: float) -> dict[str, Any]:
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


def _data(entry: Benchmark, path: Path | None) -> dict[str, Any]:
    if path is None:
        return {"hub": entry.hub, "config": entry.config, "split": entry.split}
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
