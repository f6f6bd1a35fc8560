"""What a shard is and what it must hold: its meta data, its manifest, and the list of the shards of one layer."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any, Final

import torch

from ocvtp.errors import BadInput, Corrupt, Incompatible
from ocvtp.json_files import read_json

FORMAT: Final = 1
DTYPES: Final = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
"""Names of the types in which tokens are stored."""
_AGAIN = "extract its tokens again (`python pipelines/extract.py`)"


@dataclass(frozen=True)
class ShardMeta:
    """What made the tokens: equal for all shards that are read together.

    Attributes:
        vlm: its name in the catalogue.
        revision: of the VLM.
        weights: fingerprint of its weights.
        layer: as asked for, counted as in the paper; may be negative.
        tower_layer: the index into `hidden_states` that it stands for.
        width: numbers a token.
        dtype: `float16`, `bfloat16` or `float32`.
        preprocessing: how an image became pixels.
        grid: height and width in tokens if every image has the same, else None.
    """

    vlm: str
    revision: str
    weights: str
    layer: int
    tower_layer: int
    width: int
    dtype: str
    preprocessing: str
    grid: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for name in ("vlm", "revision", "weights", "preprocessing", "dtype"):
            if not isinstance(getattr(self, name), str):
                raise BadInput(f"{name} of a shard is {getattr(self, name)!r}: text is needed")
        for name in ("layer", "tower_layer", "width"):
            if not _is_int(getattr(self, name)):
                raise BadInput(f"{name} of a shard is {getattr(self, name)!r}: a whole number is needed")
        if self.dtype not in DTYPES:
            raise BadInput(f"dtype of a shard is {self.dtype!r}: one of {', '.join(DTYPES)} is needed")
        if self.width < 1 or self.tower_layer < 1:
            raise BadInput(f"width {self.width} and tower_layer {self.tower_layer} of a shard must be positive")
        if self.grid is not None and not is_grid(self.grid):
            raise BadInput(f"grid of a shard is {self.grid!r}: two positive whole numbers or None is needed")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type of the stored tokens."""
        return DTYPES[self.dtype]

    def to_dict(self) -> dict[str, Any]:
        """JSON of this."""
        return {**asdict(self), "grid": None if self.grid is None else list(self.grid)}

    @classmethod
    def from_dict(cls, data: object, where: object) -> "ShardMeta":
        """The inverse of `to_dict`; `Corrupt` naming `where` and the keys if it is not one."""
        record = check_keys(data, {field.name for field in fields(cls)}, f"meta in {where}")
        grid = record["grid"]
        try:
            return cls(**{**record, "grid": tuple(grid) if isinstance(grid, list) else grid})
        except BadInput as error:
            raise Corrupt(f"{where}: {error}") from error


@dataclass(frozen=True)
class ShardManifest:
    """A shard's file (its name in its folder), its SHA-256, size and rows, and what made it."""

    file: str
    sha256: str
    bytes: int
    rows: int
    meta: ShardMeta

    def to_text(self) -> str:
        """The one text of this manifest: no times, hosts or random names."""
        data = {"format": FORMAT, **asdict(self), "meta": self.meta.to_dict()}
        return json.dumps(data, sort_keys=True, indent=1) + "\n"

    @classmethod
    def read(cls, path: Path | str) -> "ShardManifest":
        """A manifest file; `Corrupt` if it is missing or not one."""
        data = check_keys(_read_json(Path(path)), {"format", "file", "sha256", "bytes", "rows", "meta"}, str(path))
        if data["format"] != FORMAT:
            raise Corrupt(f"{path} has format {data['format']!r}: this version reads {FORMAT}")
        return cls._of(data, data["file"], ShardMeta.from_dict(data["meta"], path), path)

    @classmethod
    def _of(cls, data: Mapping[str, Any], file: object, meta: ShardMeta, where: object) -> "ShardManifest":
        sha256, size, rows = data["sha256"], data["bytes"], data["rows"]
        if not (isinstance(file, str) and file == PurePosixPath(file).name and "\0" not in file):
            raise Corrupt(f"{where}: file {file!r} is not a plain file name")
        if not (isinstance(sha256, str) and _is_int(size) and _is_int(rows) and size > 0 and rows > 0):
            raise Corrupt(f"{where}: sha256 must be text, bytes and rows positive whole numbers")
        return cls(file, sha256, size, rows, meta)


Shard = tuple[Path, ShardManifest]
"""The folder of a shard, and its manifest."""


def check_agreement(shards: Sequence[Shard]) -> ShardMeta:
    """The common meta data of shards.

    Raises:
        BadInput: there are no shards.
        Incompatible: they were not made alike; lists every field that differs, its values, and a shard of each.
    """
    if not shards:
        raise BadInput("no token shards given: at least one is needed")
    differing = []
    for field in fields(ShardMeta):
        values: dict[object, list[str]] = {}
        for folder, manifest in shards:
            values.setdefault(getattr(manifest.meta, field.name), []).append(str(folder / manifest.file))
        if len(values) > 1:
            groups = (f"{value!r} in {len(where)} ({where[0]})" for value, where in values.items())
            differing.append(f"{field.name}: {', '.join(groups)}")
    if differing:
        raise Incompatible(
            "token shards that were not made alike cannot be read together; they differ in " + "; ".join(differing)
        )
    return shards[0][1].meta


def layer_listing(shards: Sequence[Shard], root: Path | str) -> dict[str, Any]:
    """JSON that names all shards of one layer: `{meta, rows, shards: [{path, sha256, rows, bytes}]}`.

    Args:
        shards: in the order of their rows.
        root: the store; paths are relative to it.

    Raises:
        Incompatible: they were not made alike.
        BadInput: there are none, or one lies outside of `root`.
    """
    meta, listed = check_agreement(shards), []
    for folder, manifest in shards:
        path = Path(folder).resolve() / manifest.file
        if not path.is_relative_to(Path(root).resolve()):
            raise BadInput(f"shard {path} lies outside of the store {root}")
        name = path.relative_to(Path(root).resolve()).as_posix()
        listed.append({"path": name, "sha256": manifest.sha256, "rows": manifest.rows, "bytes": manifest.bytes})
    return {"meta": meta.to_dict(), "rows": sum(manifest.rows for _, manifest in shards), "shards": listed}


def read_layer_listing(listing: Path | str | Mapping[str, Any], root: Path | str) -> list[Shard]:
    """The shards that a `layer_listing` names (a file or its content), ready for a `TokenDataset`.

    Raises:
        Corrupt: it is not such a listing, a path in it leaves `root`, or shards are missing there (all are named).
    """
    where = str(listing) if isinstance(listing, (Path, str)) else "the listing of token shards"
    content = _read_json(Path(listing)) if isinstance(listing, (Path, str)) else listing
    data = check_keys(content, {"meta", "rows", "shards"}, where)
    meta, shards, missing = ShardMeta.from_dict(data["meta"], where), list[Shard](), list[str]()
    if not isinstance(data["shards"], list) or not data["shards"]:
        raise Corrupt(f"{where}: shards must be a list of at least one")
    for entry in data["shards"]:
        record = check_keys(entry, {"path", "sha256", "rows", "bytes"}, f"a shard in {where}")
        pure = PurePosixPath(record["path"]) if isinstance(record["path"], str) else PurePosixPath("/")
        if pure.is_absolute() or ".." in pure.parts:
            raise Corrupt(f"{where}: path {record['path']!r} does not stay in the store")
        path = Path(root) / pure
        shards.append((path.parent, ShardManifest._of(record, path.name, meta, where)))
        if not path.is_file():
            missing.append(str(pure))
    if data["rows"] != sum(manifest.rows for _, manifest in shards):
        raise Corrupt(f"{where}: rows is {data['rows']!r}, which is not the sum over its shards")
    if missing:
        raise Corrupt(
            f"{len(missing)} of the {len(shards)} shards in {where} are missing from the store {root}:"
            f" {', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}; {_AGAIN}"
        )
    return shards


def check_keys(data: object, keys: set[str], where: str) -> dict[str, Any]:
    """`data` as a dict of exactly these keys; `Corrupt` naming the missing and the unknown ones."""
    if not isinstance(data, Mapping):
        raise Corrupt(f"{where} is not an object with the keys {', '.join(sorted(keys))}")
    missing, unknown = sorted(keys - set(data)), sorted(map(str, set(data) - keys))
    if missing or unknown:
        raise Corrupt(f"{where}: missing keys: {missing or 'none'}, unknown keys: {unknown or 'none'}")
    return dict(data)


def is_grid(grid: object) -> bool:
    """Whether this is a height and a width in tokens."""
    return isinstance(grid, tuple) and len(grid) == 2 and all(_is_int(side) and side > 0 for side in grid)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _read_json(path: Path) -> object:
    try:
        return read_json(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Corrupt(f"{path} is missing; {_AGAIN}") from error
