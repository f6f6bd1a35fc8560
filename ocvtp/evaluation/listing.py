"""Writes and reads the results of one benchmark: score.json and samples.jsonl, the same bytes for the same result."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ocvtp.errors import BadInput, Corrupt

SCORE = "score.json"
SAMPLES = "samples.jsonl"
_KEYS = ("doc_id", "unit", "question", "answer", "prediction", "score", "category", "kept")


def write(folder: Path, score: Mapping[str, Any], samples: Iterable[Mapping[str, Any]]) -> None:
    """Write both files into a folder; score.json last, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(clean(sample), allow_nan=False) + "\n" for sample in samples]
    replace_text(folder / SAMPLES, "".join(lines))
    replace_text(folder / SCORE, json.dumps(clean(score), allow_nan=False, indent=1) + "\n")


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """The answers in a folder.

    Raises:
        BadInput: there is no samples.jsonl.
        Corrupt: a line is not JSON or lacks a key; names the line.
    """
    path = folder / SAMPLES
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BadInput(f"{path} does not exist: {folder} is no result of `ocvtp.evaluation.evaluate`") from None
    samples = []
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        try:
            sample = json.loads(line)
        except ValueError as error:
            raise Corrupt(f"{path}, line {number} is not JSON: {error}") from error
        missing = [key for key in _KEYS if not isinstance(sample, dict) or key not in sample]
        if missing:
            raise Corrupt(f"{path}, line {number} has no {missing[0]!r}; each line needs {', '.join(_KEYS)}")
        samples.append(sample)
    return samples


def clean(value: Any) -> Any:
    """The value as JSON has it: NumPy's numbers become Python's, and what is not finite becomes null."""
    if isinstance(value, Mapping):
        return {str(key): clean(item) for key, item in value.items()}
    if isinstance(value, str) or value is None or isinstance(value, bool | int):
        return value
    if hasattr(value, "tolist"):  # arrays and scalars of NumPy
        return clean(value.tolist())
    if isinstance(value, Sequence):
        return [clean(item) for item in value]
    number = float(value)
    return number if math.isfinite(number) else None


def replace_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
