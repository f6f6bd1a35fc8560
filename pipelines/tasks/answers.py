"""A task of stage `evaluate`: answers of one setting to a shard of one benchmark's questions."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cluster import progress
from ocvtp.evaluation.answered import Shard
from ocvtp.evaluation.ask import ask
from ocvtp.evaluation.benchmarks import Protocol, benchmark
from ocvtp.evaluation.preflight import locate
from ocvtp.evaluation.setting import EvaluationSetting, ready
from pipelines.tasks.checked import check_file
from pipelines.tasks.places import check_same, device, in_store


def answers(spec: dict[str, Any], folder: Path, inputs: dict[str, Any]) -> None:
    """`answers.jsonl` and `asked.json`. An attempt that dies leaves what it was told already to the next one."""
    protocol = spec["protocol"]
    check_same(spec["benchmark"], asked(spec["benchmark"], protocol), {key: spec[key] for key in ("task", "lmms_eval")})
    pruner, data = (None if inputs[name] is None else in_store(folder, inputs[name]) for name in ("pruner", "data"))
    if pruner is not None:
        for name, sha256 in spec["pruner"].items():
            check_file(pruner / name, sha256)
    if data is not None:
        check_file(locate(benchmark(spec["benchmark"], protocol), data), spec["data"])
    with ready(
        EvaluationSetting(spec["vlm"], dtype=spec["dtype"]), device()
    ) as unpruned:  # stays loaded for what follows
        check_same(spec["vlm"], unpruned.vlm.entry.identity, spec["model"])
    setting = EvaluationSetting(
        vlm=spec["vlm"],
        method=spec["method"],
        keep=spec["keep"],
        seed=spec["seed"],
        pruner=pruner,
        options=spec["options"],
        dtype=spec["dtype"],
        batch_size=spec["batch_size"],
        max_new_tokens=spec["max_new_tokens"],
        protocol=protocol,
    )
    found = ask(
        setting,
        spec["benchmark"],
        data,
        shard=Shard(*spec["shard"]),
        limit=spec["limit"],
        device=device(),
        journal=folder / "resume" / "journal",
        progress=progress,
    )
    found.write(folder)


def asked(name: str, protocol: Protocol) -> dict[str, Any]:
    """What is asked in a benchmark, as JSON: what benchmarks.yaml says of that, and whose code asks it."""
    return {"task": json.loads(json.dumps(benchmark(name, protocol).asking)), "lmms_eval": version("lmms-eval")}
