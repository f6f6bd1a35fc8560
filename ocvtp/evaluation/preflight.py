"""Checks a local question set before any model is loaded, and says what is wrong with it.

lmms-eval finds out late: a missing column after the model was loaded, a wrong answer after all questions were asked,
and either as an error of the library that it happened in.
"""

import ast
import json
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from ocvtp.errors import BadInput
from ocvtp.evaluation.benchmarks import Benchmark

_WITHOUT_IMAGES = ("scienceqa",)
"""Some of its questions are about none: the official function then asks the text alone."""


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
        BadInput: not a parquet, or one that cannot be read whole; a column is missing or is no image; a question, its
            image, its options or its answer is missing or impossible; a pair has not two questions; nothing is left to
            ask. Names file, column and row.
    """
    try:
        file = pq.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} is not a parquet file: {error}") from error
    with file:
        _check_columns(benchmark, path, file.schema_arrow)
        read = [name for name in benchmark.columns if not _is_image(name)]
        columns = {name: _values(path, file, name) for name in read}
        rows = [dict(zip(read, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        if not rows:
            raise BadInput(f"{path} has no rows")
        for name in filter(_is_image, benchmark.columns):
            if benchmark.name not in _WITHOUT_IMAGES:
                _check_images(path, file, name)
        for name in set(file.schema_arrow.names) - set(benchmark.columns):
            with _readable(path, name):  # `datasets` reads all there is
                deque(file.iter_batches(batch_size=64, columns=[name]), maxlen=0)
    for index, row in enumerate(rows):
        for name in read:
            if (wrong := _wrong(benchmark, name, row[name])) is not None:
                raise BadInput(f"{path}, row {index}: {name!r} is {row[name]!r}; {wrong}")
    _check_answers(benchmark, path, rows)
    units = [benchmark.unit_of(row, index) for index, row in enumerate(rows)]
    if benchmark.paired:
        _check_groups(benchmark, path, rows, units)
    return whole_units(benchmark, units, limit)


def check_limit(limit: int | None) -> None:
    """`BadInput` if so few questions are none."""
    if limit is not None and limit < 1:
        raise BadInput(f"limit {limit}: at least 1 question is needed")


def whole_units(benchmark: Benchmark, units: Sequence[int | str], limit: int | None) -> int:
    """The largest number of first rows, at most `limit`, that tears no unit apart.

    Raises:
        BadInput: there is no such number; names the least limit that leaves any.
    """
    if limit is None or limit >= len(units):
        return len(units)
    size, seen = Counter(units), Counter[int | str]()
    open_units: set[int | str] = set()
    found = 0
    for index, unit in enumerate(units, start=1):
        if index > limit and found:
            break
        seen[unit] += 1
        (open_units.discard if seen[unit] == size[unit] else open_units.add)(unit)
        if not open_units:
            found = index
    if found > limit:
        raise BadInput(
            f"limit {limit} leaves no whole unit of {benchmark.name}: the first questions that are scored together are "
            f"complete after {found}"
        )
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


def _values(path: Path, file: Any, name: str) -> list[Any]:
    """Of a column, row by row."""
    with _readable(path, name):
        found: list[Any] = file.read(columns=[name]).column(0).to_pylist()
        return found


@contextmanager
def _readable(path: Path, name: str) -> Iterator[None]:
    """The footer of a parquet may be whole, and what it speaks of damaged."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}, column {name!r} cannot be read: {error}") from error


def _check_images(path: Path, file: Any, name: str) -> None:
    """Every row has its image: bytes, or the path of a file. They are read a few at a time and not decoded."""
    row = 0
    with _readable(path, name):
        for batch in file.iter_batches(batch_size=64, columns=[name]):
            for value in batch.column(0).to_pylist():
                images = value if isinstance(value, list) else [value]
                if not images or not all(map(_is_there, images)):
                    raise BadInput(f"{path}, row {row}: {name!r} has no image")
                row += 1


def _is_there(image: Any) -> bool:
    """Whether a value of an image column, as `datasets` stores it, has bytes or names a file."""
    if not isinstance(image, dict):
        return bool(image)
    return bool(image.get("bytes")) or (bool(image.get("path")) and Path(image["path"]).is_file())


def _wrong(benchmark: Benchmark, name: str, value: Any) -> str | None:
    """What a value would have to be, if it is not that; answers are looked at elsewhere."""
    if name == "question":
        return None if isinstance(value, str) and value.strip() else "a text is needed"
    if name == "index":
        return None if isinstance(value, int) else "a whole number is needed"
    if name in benchmark.unit:
        return None if value is not None else f"{benchmark.name} is scored in groups of it"
    if name == "options":
        return None if _is_list(value) else "a list written as Python does is needed, such as \"['red', 'green']\""
    if name == "choices":
        return None if isinstance(value, list) and value else "a list of texts is needed"
    return None


def _is_list(text: Any) -> bool:
    try:
        return isinstance(ast.literal_eval(text), list)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return False


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
