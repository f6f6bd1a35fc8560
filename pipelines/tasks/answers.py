"""The task of stage `evaluate`: one setting on one benchmark."""

import json
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cluster import progress
from ocvtp.evaluation.benchmarks import benchmark
from ocvtp.evaluation.evaluate import EvaluationSetting, evaluate
from ocvtp.evaluation.setting import ready
from pipelines.tasks.places import check_same, device, in_store


def answers(spec: dict[str, Any], folder: Path, inputs: dict[str, Any]) -> None:
    """`score.json` and `samples.jsonl`."""
    check_same(spec["benchmark"], asked(spec["benchmark"]), {key: spec[key] for key in ("task", "lmms_eval")})
    with ready(
        EvaluationSetting(spec["vlm"], dtype=spec["dtype"]), device()
    ) as unpruned:  # stays loaded for what follows
        check_same(spec["vlm"], unpruned.vlm.entry.identity, spec["model"])
    pruner, data = inputs["pruner"], inputs["data"]
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


def asked(name: str) -> dict[str, Any]:
    """What is asked in a benchmark, as JSON: what benchmarks.yaml says of it, and whose code scores it."""
    return {"task": json.loads(json.dumps(asdict(benchmark(name)))), "lmms_eval": version("lmms-eval")}
