"""params.yaml of the stages on a few images."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

SMALL: Mapping[str, Any] = {
    "method": ["vanilla", "random", "oc-vtp"],
    "keep": [48, 16],
    "benchmark": ["pope"],
    "seed": 0,
    "sample": {"images": 40, "questions": 12},
    "extract": {"shard_images": 16, "batch_size": 8},
    "train": {"steps": 6, "batch_size": 8, "eval_every": 3},
    "evaluate": {"bootstrap": 200},
    "mlflow": {"enabled": False},
}


def write_params(root: Path, changes: Mapping[str, Any], small: Mapping[str, Any] = SMALL) -> list[str]:
    """Write params.yaml, nested entries merged into the small ones; returns the arguments that name it."""
    merged = {k: {**small.get(k, {}), **v} if isinstance(v, dict) else v for k, v in changes.items()}
    path = root / "params.yaml"
    path.write_text(yaml.safe_dump({**small, **merged}))
    return ["--params", str(path)]
