"""The task of stage `evaluate`: one setting on one benchmark."""

from pathlib import Path
from typing import Any

from cluster import progress
from ocvtp.evaluation.evaluate import EvaluationSetting, evaluate
from pipelines.tasks.places import device, in_store


def answers(spec: dict[str, Any], folder: Path) -> None:
    """`score.json` and `samples.jsonl`."""
    pruner, data = spec["at"]["pruner"], spec["at"]["data"]
    setting = EvaluationSetting(
        vlm=spec["vlm"],
        method=spec["method"],
        keep=spec["keep"],
        seed=spec["seed"],
        pruner=None if pruner is None else in_store(folder, pruner),
        options=spec["options"],
        dtype=spec["dtype"],
        batch_size=spec["batch_size"],
        max_new_tokens=spec["max_new_tokens"],
    )
    evaluate(
        setting,
        spec["benchmark"],
        None if data is None else in_store(folder, data),
        folder,
        limit=spec["limit"],
        device=device(),
        progress=progress,
    )
