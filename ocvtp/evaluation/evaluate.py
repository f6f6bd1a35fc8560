"""`evaluate`: one setting on one benchmark, with the answers to every question.

The result is a function of the setting, the data and the versions that it names: it holds no times and no paths.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ocvtp.evaluation import listing
from ocvtp.evaluation.ask import ask
from ocvtp.evaluation.score import score
from ocvtp.evaluation.setting import EvaluationSetting, forget

__all__ = ["EvaluationSetting", "evaluate", "forget"]


def evaluate(
    setting: EvaluationSetting,
    benchmark: str,
    data: Path | None,
    out: Path,
    *,
    limit: int | None = None,
    device: str = "cpu",
    journal: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Ask a VLM the questions of a benchmark, score its answers, and write score.json and samples.jsonl.

    Args:
        setting: the VLM and how it is pruned.
        benchmark: a name of benchmarks.yaml.
        data: a parquet with the official columns, or a folder with `<benchmark>.parquet`; None: the official data set.
        out: folder for the results.
        limit: ask at most so many of the first questions; what is scored together, such as pairs, stays whole.
        device: cpu, cuda, ...
        journal: a file that keeps answers through a kill, see `ocvtp.evaluation.ask.ask`.
        progress: called with (questions answered, questions) after each batch.

    Returns:
        What stands in score.json.

    Raises:
        BadInput, Incompatible, NotAvailable, Corrupt: as `ocvtp.evaluation.ask.ask` and
            `ocvtp.evaluation.score.score` do.
    """
    answers = ask(setting, benchmark, data, limit=limit, device=device, journal=journal, progress=progress)
    result, samples = score([answers], data)
    listing.write(out, result, samples)
    return result
