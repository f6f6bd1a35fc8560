"""Reads token shards: memory-mapped, every row checked when it is first read.

Letters: N tokens of an image, C width of a token.
"""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from ocvtp.errors import Corrupt, Incompatible
from ocvtp.tokens.manifest import ShardManifest
from ocvtp.tokens.rows import SCHEMA, TokenRow, file_sha256, note_of, row_crc32


class OpenShard:
    """A memory-mapped shard: `ids` and `grids` of its rows, and their tokens on demand."""

    def __init__(self, path: Path, manifest: ShardManifest, table: pa.Table) -> None:
        self.path, self.manifest = path, manifest
        self.ids: list[str] = table["image_id"].to_pylist()
        heights, widths = table["grid_h"].to_pylist(), table["grid_w"].to_pylist()
        self.grids: list[tuple[int, int]] = list(zip(heights, widths, strict=True))
        self._crcs: list[int] = table["crc32"].to_pylist()
        self._rows = [view for chunk in table["tokens"].chunks for view in _views(chunk)]
        self._checked = np.zeros(len(self._rows), np.bool_)

    def __len__(self) -> int:
        return len(self._rows)

    def read_bytes(self, row: int) -> NDArray[np.uint8]:
        """The stored tokens of a row, without a copy; verified when they are first read.

        Raises:
            Corrupt: the row is not what was written; names the file, the row and the image.
        """
        data = self._rows[row]
        if not self._checked[row]:
            (height, width), meta = self.grids[row], self.manifest.meta
            where = f"{self.path}, row {row} (image {self.ids[row]!r})"
            if row_crc32(self.ids[row], (height, width), data.data) != self._crcs[row]:
                raise Corrupt(f"{where}: checksum differs, the row is damaged; extract this shard again")
            if data.size != height * width * meta.width * meta.torch_dtype.itemsize:
                raise Corrupt(f"{where}: {data.size} bytes for a grid of {height} x {width} of width {meta.width}")
            self._checked[row] = True
        return data

    def read(self, row: int) -> TokenRow:
        """A copy of a row."""
        data = self.read_bytes(row)
        tokens = torch.from_numpy(data.copy()).view(self.manifest.meta.torch_dtype)
        return TokenRow(self.ids[row], tokens.view(-1, self.manifest.meta.width), self.grids[row])

    def verify(self) -> None:
        """Compare the whole file with the manifest's SHA-256, and every row with its checksum; `Corrupt` if not."""
        for row in range(len(self)):
            self.read_bytes(row)
        if file_sha256(self.path) != self.manifest.sha256:
            raise Corrupt(f"{self.path} has other content than its manifest says (SHA-256 differs)")


def open_shard(folder: Path | str, manifest: ShardManifest) -> OpenShard:
    """Map a shard into memory; reads its structure, not its tokens.

    Raises:
        Corrupt: missing, of another size (truncated), not a shard, or with other rows than the manifest says.
        Incompatible: it is sound, but the manifest is that of another shard.
    """
    path = Path(folder) / manifest.file
    try:
        size = path.stat().st_size
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Corrupt(f"shard {path} is missing, its manifest lists it; extract it again") from error
    if size != manifest.bytes:
        raise Corrupt(f"shard {path} has {size} bytes, its manifest says {manifest.bytes}; extract it again")
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        table, schema = reader.read_all(), reader.schema
        if not schema.equals(SCHEMA):
            raise Corrupt(f"shard {path} has columns {schema.names} of other names or types; extract it again")
        table.validate(full=True)  # offsets within their buffers; looks at no token
        if any(column.null_count for column in table.columns):
            raise Corrupt(f"shard {path} holds empty cells; extract it again")
        shard = OpenShard(path, manifest, table)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise Corrupt(f"shard {path} cannot be read: {error}; extract it again") from error
    if table.num_rows != manifest.rows:
        raise Corrupt(f"shard {path} has {table.num_rows} rows, its manifest says {manifest.rows}")
    _check_note(schema, manifest, path)
    return shard


def _check_note(schema: Any, manifest: ShardManifest, path: Path) -> None:
    """The file itself says what it was made for: a manifest cannot be put beside another shard."""
    note = (schema.metadata or {}).get(b"ocvtp.meta", b"").decode("utf-8", "replace")
    if note != note_of(manifest.meta):
        if file_sha256(path) != manifest.sha256:
            raise Corrupt(f"shard {path} has other content than its manifest says (SHA-256 differs)")
        raise Incompatible(f"shard {path} was made for {note}, its manifest says {note_of(manifest.meta)}")


def _views(chunk: Any) -> list[NDArray[np.uint8]]:
    """Each cell of a large_binary array, without a copy; its offsets were validated against its data."""
    _, offsets, data = chunk.buffers()
    bounds = np.frombuffer(offsets, np.int64, chunk.offset + len(chunk) + 1)[chunk.offset :]
    flat = np.frombuffer(data, np.uint8)
    return [flat[start:end] for start, end in pairwise(bounds.tolist())]
