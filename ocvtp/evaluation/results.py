"""All results of a folder as one data frame: a store, the output of stage `evaluate`, or what `ocvtp eval` wrote."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ocvtp.errors import BadInput, Corrupt, NotAvailable
from ocvtp.evaluation.benchmarks import NATIVE
from ocvtp.evaluation.listing import SCORE, read_samples
from ocvtp.evaluation.scores import RESAMPLES, interval
from ocvtp.json_files import read_json

if TYPE_CHECKING:
    import pandas as pd

_HOW = ("prompt_template", "image_backend", "attn_implementation")
_COMPARED = ("vlm", "revision", "weights", "dtype", "max_new_tokens", "benchmark", "data", "limit", "protocol", *_HOW)
"""What a result shares with the unpruned model's that it is a percentage of."""
_ORDER = {"vlm": True, "method": True, "kept": False, "seed": True, "benchmark": True, "path": True}
"""By what rows are sorted, and whether from the least on."""
_NUMBER = int | float | None
_KINDS = {"vlm": str, "method": str, "seed": int | None, "benchmark": str, "score": _NUMBER, "n": int, "kept": _NUMBER}
"""Of what rows are sorted and reckoned by."""
Where = Mapping[str, Any]


def results(place: Path | str | None = None, where: Where | None = None, *, intervals: bool = False) -> "pd.DataFrame":
    """Every result below a folder, a row each: by VLM and method, the largest budget first, then by seed.

    Columns: the setting (`vlm`, `revision`, `weights`, `method`, `keep`, `tokens`, `seed`, `fingerprint` of the pruner,
    `max_new_tokens`, each option as `option.NAME`), `benchmark`, `score` and its `scale`, `relative` (percent of the
    unpruned model on the same questions, asked in the same way by the same packages; missing without one, or where
    several disagree), `n` questions, `kept` tokens in the mean, `dtype`, `protocol`, `prompt_template`,
    `image_backend`, `attn_implementation`, `data`, `limit`, lmms-eval's and our own metrics as `metric.NAME`, versions
    of packages as `version.NAME`, and `path`, the folder, whose answers `answers` reads.

    Args:
        place: the folder; by default OCVTP_STORE, or `.ocvtp/store` here.
        where: column -> the value, or a list of values, that rows must have.
        intervals: also `ci_low` and `ci_high`, the 95 % interval of each score; reads all answers.

    Raises:
        BadInput: there is no such folder or column, or no result in it.
        Corrupt: a result is not what it should be; names the file.
        NotAvailable: pandas is not installed.
    """
    try:
        import pandas as pd
    except ImportError as error:
        raise NotAvailable(
            "results come as a data frame of pandas, which is not installed: pip install pandas"
        ) from error
    folder = Path(place or os.environ.get("OCVTP_STORE") or ".ocvtp/store")
    if not folder.is_dir():
        raise BadInput(f"{folder} is no folder: name a store, or a folder such as results/evaluate")
    rows = [_row(path) for path in _found(folder)]
    if not rows:
        raise BadInput(f"{folder} holds no results: run `python pipelines/eval.py` or `ocvtp eval` first")
    frame = pd.DataFrame(_with_relative(rows)).sort_values(list(_ORDER), ascending=list(_ORDER.values()))
    for column, wanted in (where or {}).items():
        if column not in frame:
            raise BadInput(f"there is no column {column!r}; there are: {', '.join(frame)}")
        values = wanted if isinstance(wanted, list | tuple | set) else [wanted]
        frame = frame[frame[column].map(_comparable).isin(set(map(_comparable, values)))]
    if intervals:
        ends = [
            interval(answers(row), row["benchmark"], row["protocol"], resamples=RESAMPLES)
            for row in frame.to_dict("records")
        ]
        frame = frame.assign(
            ci_low=[None if one is None else one[0] for one in ends],
            ci_high=[None if one is None else one[1] for one in ends],
        )
    return frame.reset_index(drop=True)


def answers(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The answers behind a row: lines of samples.jsonl, with question, answer, prediction, score and kept tokens."""
    return read_samples(Path(row["path"]))


def _found(folder: Path) -> Iterator[Path]:
    """Folders with a score, by path; what is hidden is being written, or was damaged."""
    for path in sorted(folder.rglob(SCORE)):
        if not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path.parent


def _row(folder: Path) -> dict[str, Any]:
    found = read_json(folder / SCORE)
    try:
        setting = found["setting"]
        row = {
            **{key: value for key, value in setting.items() if key != "options"},
            **{f"option.{name}": value for name, value in (setting.get("options") or {}).items()},
            **{key: found[key] for key in ("benchmark", "score", "scale", "n", "dtype", "limit", *_HOW)},
            "protocol": found.get("protocol", NATIVE),  # the only one at first
            "kept": found["tokens_kept"]["mean"],
            "data": found["data"].get("sha256") or found["data"].get("hub"),
            **{f"metric.{name}": value for name, value in found["metrics"].items()},
            **{f"version.{name}": value for name, value in found["versions"].items()},
            "path": str(folder),
        }
        wrong = next((name for name, kinds in _KINDS.items() if not isinstance(row[name], kinds)), None)
    except KeyError as error:
        raise Corrupt(f"{folder / SCORE} is no result of an evaluation: it has no {error}") from error
    except (TypeError, AttributeError) as error:
        raise Corrupt(f"{folder / SCORE} is no result of an evaluation: {error}") from error
    if wrong is not None:
        raise Corrupt(f"{folder / SCORE} is no result of an evaluation: its {wrong} is {row[wrong]!r}")
    return row


def _with_relative(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    whole: dict[str, set[float | None]] = {}
    for row in rows:
        if row["method"] == "vanilla":
            whole.setdefault(_alike(row), set()).add(row["score"])
    found = []
    for row in rows:
        scores = whole.get(_alike(row), set())
        base = next(iter(scores)) if len(scores) == 1 else None  # of several that differ none is the right one
        found.append({**row, "relative": 100 * row["score"] / base if row["score"] is not None and base else None})
    return found


def _alike(row: Mapping[str, Any]) -> str:
    """Equal for results that may be compared."""
    made_by = {name: value for name, value in row.items() if name in _COMPARED or name.startswith("version.")}
    return repr(sorted(made_by.items()))


def _comparable(value: Any) -> Any:
    """Equal for what people would call equal: 16, 16.0, "16" and "16.0"."""
    if isinstance(value, bool) or value is None:
        return str(value)
    try:
        return float(value)
    except (TypeError, ValueError):
        return str(value)
