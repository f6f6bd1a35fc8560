"""Question sets of the ten benchmarks about scenes, in the columns of the official data sets.

lmms-eval's own functions ask and score them. Nothing here knows of any pruning method: which objects are asked about
depends on the scene and the seed alone.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ocvtp.data import multiple_choice, short_answers
from ocvtp.data.album import Album, Row
from ocvtp.data.scenes import PLAIN, Style
from ocvtp.errors import BadInput

Rows = Callable[[Album, int, np.random.Generator], list[Row]]
_TOGETHER: Mapping[str, Rows] = {
    "gqa": short_answers.gqa,
    "mme": short_answers.mme,
    "pope": short_answers.pope,
    "textvqa": short_answers.textvqa,
}
"""Drawn with one generator a scene, in this order."""
_APART: Mapping[str, Rows] = {
    "mmbench": multiple_choice.mmbench,
    "scienceqa": multiple_choice.scienceqa,
    "vqav2": short_answers.vqav2,
    "vizwiz": short_answers.vizwiz,
    "mmmu": multiple_choice.mmmu,
    "seedbench": multiple_choice.seedbench,
}
"""Each drawn with a generator of its own: a further one changes no other."""
MAKERS: Mapping[str, Rows] = {**_TOGETHER, **_APART}
"""What makes the rows about one scene of an album, by benchmark; none where the scene allows no question."""
BENCHMARKS = tuple(MAKERS)
_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write_benchmarks(folder: Path, questions: int, seed: int, style: Style = PLAIN) -> dict[str, int]:
    """Write `<benchmark>.parquet` with at least `questions` questions of each benchmark, and their scenes.

    The scenes are those of the split `benchmark`, from which no pruner and no VLM learns; they are also written as
    `images/*.jpg` and `scenes.json` (COCO). Returns the number of questions of each benchmark.
    """
    if questions < 2:
        raise BadInput(f"{questions} questions a benchmark: at least 2 are needed, since some come in pairs")
    album = Album(seed, style, questions)
    rows: dict[str, list[Row]] = {name: [] for name in BENCHMARKS}
    index = 0
    while any(len(found) < questions for found in rows.values()):
        together = np.random.default_rng([seed, 1, index])
        for name, make in _TOGETHER.items():
            if len(rows[name]) < questions:
                rows[name].extend(make(album, index, together))
        for number, (name, make) in enumerate(_APART.items()):
            if len(rows[name]) < questions:
                rows[name].extend(make(album, index, np.random.default_rng([seed, 2, index, number])))
        index += 1
    folder.mkdir(parents=True, exist_ok=True)
    album.write(folder, index)
    for name, found in rows.items():
        _write_parquet(folder / f"{name}.parquet", found)
    return {name: len(found) for name, found in rows.items()}


def _write_parquet(path: Path, rows: list[Row]) -> None:
    """Parquet with the features that `datasets` reads from the schema's metadata."""
    table = pa.Table.from_pylist(rows)
    for number, field in enumerate(table.schema):
        if _is_image(field.name) and pa.types.is_null(field.type):
            table = table.set_column(number, pa.field(field.name, _IMAGE), table[number].cast(_IMAGE))
    features = {field.name: _feature(field.name, field.type) for field in table.schema}
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path)


def _is_image(column: str) -> bool:
    return column == "image" or (column.startswith("image_") and column[6:].isdigit())


def _feature(column: str, kind: pa.DataType) -> Any:
    if pa.types.is_list(kind):
        return {"feature": _feature(column, kind.value_type), "_type": "List"}
    if _is_image(column):
        return {"_type": "Image"}
    if pa.types.is_struct(kind):
        return {kind.field(i).name: _feature("", kind.field(i).type) for i in range(kind.num_fields)}
    return {"dtype": str(kind), "_type": "Value"}
