"""A task of stage `sample`: questions about scenes that no pruner and no VLM learns from."""

from pathlib import Path
from typing import Any

from ocvtp.data.question_sets import write_benchmarks
from ocvtp.data.scenes import Style


def questions(spec: dict[str, Any], folder: Path) -> None:
    """`<benchmark>.parquet` of each benchmark, and the scenes that they ask about."""
    write_benchmarks(folder, spec["questions"], spec["seed"], Style(**spec["style"]))
