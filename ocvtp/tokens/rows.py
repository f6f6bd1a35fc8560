"""One row of a token shard: its columns and its checksum.

Letters: N tokens of an image (`grid_h * grid_w`, row by row), C width of a token.
"""

import hashlib
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pyarrow as pa
from torch import Tensor

from ocvtp.tokens.manifest import ShardMeta

SCHEMA: Final = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("grid_h", pa.int32(), nullable=False),
        pa.field("grid_w", pa.int32(), nullable=False),
        pa.field("crc32", pa.uint32(), nullable=False),
        pa.field("tokens", pa.large_binary(), nullable=False),
    ]
)


@dataclass(frozen=True, eq=False)
class TokenRow:
    """One image: `tokens_NC` row by row over its `grid` (height, width in tokens)."""

    image_id: str
    tokens_NC: Tensor
    grid: tuple[int, int]


def row_crc32(image_id: str, grid: tuple[int, int], data: bytes | memoryview) -> int:
    """The checksum of a row: over its id, its grid and its tokens."""
    head = f"{image_id}\n{grid[0]} {grid[1]}\n".encode()
    return zlib.crc32(data, zlib.crc32(head))


def note_of(meta: ShardMeta) -> str:
    """What a shard's file says about itself."""
    return json.dumps(meta.to_dict(), sort_keys=True)


def manifest_path(path: Path) -> Path:
    """Where the manifest of a shard lies."""
    return path.with_name(path.name + ".json")


def file_sha256(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
