"""A task of stage `evaluate`: the score of one setting on one benchmark, of answers that are there already."""

import json
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ocvtp.evaluation import listing
from ocvtp.evaluation.answered import Answers
from ocvtp.evaluation.benchmarks import Protocol, benchmark
from ocvtp.evaluation.objects import MASKS
from ocvtp.evaluation.preflight import locate
from ocvtp.evaluation.score import score
from pipelines.tasks.checked import check_file
from pipelines.tasks.places import check_same, in_store


def scores(spec: dict[str, Any], folder: Path, inputs: dict[str, Any]) -> None:
    """`score.json` and `samples.jsonl`: the same whatever shards the answers came in."""
    name, protocol = spec["answers"]["benchmark"], spec["answers"]["protocol"]
    check_same(name, scored(name, protocol), {key: spec[key] for key in ("task", "lmms_eval")})
    data = None if inputs["data"] is None else in_store(folder, inputs["data"])
    if data is not None:
        questions = locate(benchmark(name, protocol), data)
        check_file(questions, spec["answers"]["data"])
        check_file(questions.with_name(MASKS), spec["masks"])
    shards = [Answers.read(in_store(folder, path)) for path in inputs["answers"]]
    result, samples = score(shards, data)
    listing.write(folder, result, samples)


def scored(name: str, protocol: Protocol) -> dict[str, Any]:
    """How a benchmark is scored, as JSON: what benchmarks.yaml says of it, and whose code scores it."""
    return {"task": json.loads(json.dumps(asdict(benchmark(name, protocol)))), "lmms_eval": version("lmms-eval")}
