"""Checks a local question set before any model is loaded, and says what is wrong with it.

lmms-eval finds out late: a missing column after the model was loaded, a wrong answer after all questions were asked,
and either as an error of the library that it happened in.
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from ocvtp.errors import BadInput
from ocvtp.evaluation.benchmarks import Benchmark


def locate(benchmark: Benchmark, data: Path) -> Path:
    """The parquet file: `data` itself, or `<benchmark>.parquet` in it.

    Raises:
        BadInput: there is none.
    """
    path = data / f"{benchmark.name}.parquet" if data.is_dir() else data
    if not path.is_file():
        raise BadInput(f"{path} does not exist: {benchmark.name} needs a parquet with {', '.join(benchmark.columns)}")
    return path


def check(benchmark: Benchmark, path: Path, limit: int | None = None) -> int:
    """How many of the first rows to ask: all, or at most `limit` without tearing pairs apart.

    Raises:
        BadInput: not a parquet; a column is missing or is no image; an answer is missing or impossible; a pair has not
            two questions; nothing is left to ask.
    """
    try:
        file = pq.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} is not a parquet file: {error}") from error
    with file:
        _check_columns(benchmark, path, file.schema_arrow)
        read = [name for name in benchmark.columns if not _is_image(name)]
        rows = file.read(columns=read).to_pylist()
    if not rows:
        raise BadInput(f"{path} has no rows")
    _check_answers(benchmark, path, rows)
    units = [benchmark.unit_of(row, index) for index, row in enumerate(rows)]
    if benchmark.paired:
        _check_groups(benchmark, path, rows, units)
    return whole_units(benchmark, units, limit)


def unseen(benchmark: Benchmark, limit: int | None) -> int | None:
    """The limit on a data set that is not looked at before: an even one where questions come in pairs, one by one."""
    if limit is None or benchmark.rule != "pairs":
        return limit
    if limit < 2:
        raise BadInput(f"limit {limit} leaves no pair of {benchmark.name}: at least 2")
    return limit - limit % 2


def whole_units(benchmark: Benchmark, units: Sequence[int | str], limit: int | None) -> int:
    """The largest number of first rows, at most `limit`, that tears no unit apart."""
    if limit is None or limit >= len(units):
        return len(units)
    if limit < 1:
        raise BadInput(f"limit {limit}: at least 1 question is needed")
    size, seen = Counter(units), Counter[int | str]()
    open_units: set[int | str] = set()
    found = 0
    for index, unit in enumerate(units[:limit], start=1):
        seen[unit] += 1
        (open_units.discard if seen[unit] == size[unit] else open_units.add)(unit)
        if not open_units:
            found = index
    if not found:
        raise BadInput(f"limit {limit} leaves no whole unit of {benchmark.name}: its first takes more questions")
    return found


def _is_image(column: str) -> bool:
    return column == "image" or column.startswith("image_")


def _check_columns(benchmark: Benchmark, path: Path, schema: Any) -> None:
    missing = [name for name in benchmark.columns if name not in schema.names]
    if missing:
        raise BadInput(
            f"{path} has no column {', '.join(map(repr, missing))}, which {benchmark.name} reads; it has "
            f"{', '.join(schema.names)}"
        )
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError):
        features = {}
    for name in filter(_is_image, benchmark.columns):
        if '"Image"' not in json.dumps(features.get(name)):
            raise BadInput(
                f"{path}: column {name!r} is not marked as images ({schema.field(name).type}): write structs of bytes "
                "and path with the features of `datasets` in the schema's metadata, as Dataset.to_parquet does"
            )


def _check_answers(benchmark: Benchmark, path: Path, rows: Sequence[dict[str, Any]]) -> None:
    for index, row in enumerate(rows):
        answer = row[benchmark.answer]
        if answer is None or answer == []:
            raise BadInput(f"{path}, row {index}: {benchmark.answer!r} is empty, so nothing can be scored")
        if benchmark.rule in ("f1", "mean_f1", "pairs") and str(answer).lower().strip().rstrip(".") not in (
            "yes",
            "no",
        ):
            raise BadInput(f"{path}, row {index}: {benchmark.answer!r} is {answer!r}; {benchmark.name} has yes and no")


def _check_groups(benchmark: Benchmark, path: Path, rows: Sequence[dict[str, Any]], units: Sequence[int | str]) -> None:
    if benchmark.rule == "pairs":
        odd = next(((unit, n) for unit, n in Counter(units).items() if n != 2), None)
        if odd is not None:
            raise BadInput(f"{path}: {odd[0]} has {odd[1]} questions; {benchmark.name} is scored in pairs")
        return
    known = {int(row["index"]) for row in rows}
    alone = next((unit for unit in units if unit not in known), None)
    if alone is not None:
        raise BadInput(f"{path}: no row has index {alone}, the base of a circle; without it {benchmark.name} drops all")
