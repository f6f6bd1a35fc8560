"""Writes token shards: whole and checked, or not at all.

Letters: N tokens of an image, C width of a token.
"""

import errno
import hashlib
import io
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final, Self

import pyarrow as pa
import torch

from ocvtp.errors import BadInput, NotAvailable
from ocvtp.tokens.manifest import FORMAT, ShardManifest, ShardMeta, is_grid
from ocvtp.tokens.rows import SCHEMA, TokenRow, manifest_path, note_of, row_crc32

BATCH_BYTES: Final = 8 * 2**20
"""Size from which rows are written as one Arrow record batch."""

MARGIN = 1.1
"""Free space asked for, over the bytes that will be written."""


class DiskFull(NotAvailable):
    """There is no room for what is to be written. Nothing half-written is left."""


def ensure_space(folder: Path, need: int) -> None:
    """`DiskFull` unless the disk of `folder` (which exists) has room for `need` bytes and a tenth more."""
    wanted, free = int(need * MARGIN), shutil.disk_usage(folder).free
    if free < wanted:
        raise DiskFull(
            f"{folder}: {wanted} bytes are needed, {free} are free on that disk: make room or choose another folder"
        )


@contextmanager
def explain_full_disk(path: Path, written: int | None = None) -> Iterator[None]:
    """Turn the operating system's "no space left" (or "quota exceeded") into `DiskFull` that names the file."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        size = "" if written is None else f" for {written} bytes more"
        raise DiskFull(f"{path}: the disk is full, no room{size}; the partial file was removed") from error


def write_shard(
    folder: Path | str,
    rows: Iterable[TokenRow],
    meta: ShardMeta,
    name: str = "tokens.arrow",
    *,
    expected_rows: int | None = None,
) -> ShardManifest:
    """Write rows as `folder/<name>` and their manifest as `folder/<name>.json`, whole or not at all.

    Args:
        folder: is made if need be.
        rows: of the width and, if `meta` has one, the grid of `meta`; any floating dtype, stored as `meta.dtype`.
        meta: what made the tokens.
        name: of the file.
        expected_rows: if known, room on the disk is asked for before the first row is written.

    Raises:
        BadInput: no rows, an id twice, a wrong shape or grid, NaN or infinity (also by overflow of `meta.dtype`).
        DiskFull: there is no room; nothing is left behind.
    """
    with ShardWriter(folder, meta, name, expected_rows=expected_rows) as writer:
        for row in rows:
            writer.add(row)
    return writer.manifest


class ShardWriter:
    """Writes one shard row by row, for when several are written at a time; arguments as for `write_shard`.

    A context manager: the shard appears when it is left, and `manifest` is set; an exception leaves nothing.
    """

    manifest: ShardManifest

    def __init__(
        self,
        folder: Path | str,
        meta: ShardMeta,
        name: str = "tokens.arrow",
        *,
        expected_rows: int | None = None,
    ) -> None:
        if not name or Path(name).name != name:
            raise BadInput(f"shard name {name!r} is not a plain file name")
        self.meta, self.path = meta, Path(folder) / name
        self._expected_rows = expected_rows
        self._temporary = self.path.with_name(f".{name}.tmp-{uuid.uuid4().hex}")
        self._ids: set[str] = set()
        self._pending: list[tuple[str, int, int, int, bytes]] = []

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        note = {"ocvtp.format": str(FORMAT), "ocvtp.meta": note_of(self.meta)}
        with explain_full_disk(self.path):
            self._file = self._temporary.open("wb")
            self._digest = hashlib.sha256()
            sink = pa.PythonFile(_Hashing(self._file, self._digest), mode="w")
            self._sink = pa.ipc.new_file(sink, SCHEMA.with_metadata(note))
        return self

    def add(self, row: TokenRow) -> None:
        """Append one image."""
        data = _check_row(row, self.meta)
        if row.image_id in self._ids:
            raise BadInput(f"image {row.image_id} is given twice for {self.path}")
        if not self._ids and self._expected_rows is not None:
            ensure_space(self.path.parent, self._expected_rows * len(data))
        self._ids.add(row.image_id)
        self._pending.append((row.image_id, *row.grid, row_crc32(row.image_id, row.grid, data), data))
        if sum(len(entry[-1]) for entry in self._pending) >= BATCH_BYTES:
            self._flush()

    def _flush(self) -> None:
        if not self._pending:
            return
        columns = zip(*self._pending, strict=True)
        arrays = [pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)]
        with explain_full_disk(self.path, sum(len(entry[-1]) for entry in self._pending)):
            self._sink.write_batch(pa.record_batch(arrays, schema=SCHEMA))
        self._pending.clear()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._publish()
        finally:
            with suppress(OSError):  # a full disk again: the file goes anyway
                self._file.close()
            self._temporary.unlink(missing_ok=True)

    def _publish(self) -> None:
        if not self._ids:
            raise BadInput(f"no rows given for {self.path}: a shard holds at least one image")
        with explain_full_disk(self.path):
            self._flush()
            self._sink.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            size = self._temporary.stat().st_size
            self.manifest = ShardManifest(self.path.name, self._digest.hexdigest(), size, len(self._ids), self.meta)
            notes = self._temporary.with_name(self._temporary.name + ".json")
            try:
                notes.write_text(self.manifest.to_text())
                self._temporary.replace(self.path)
                notes.replace(manifest_path(self.path))
            finally:
                notes.unlink(missing_ok=True)


class _Hashing(io.RawIOBase):
    """Digests what is written to a file on its way: Arrow writes from the beginning to the end."""

    def __init__(self, file: BinaryIO, digest: Any) -> None:
        self._file, self._digest = file, digest

    def write(self, data: Any) -> int:
        """As of a file."""
        self._digest.update(data)
        return self._file.write(data)

    def writable(self) -> bool:
        """It is."""
        return True


def _check_row(row: TokenRow, meta: ShardMeta) -> bytes:
    """The bytes to store; `BadInput` naming the image."""
    who, shape = f"image {row.image_id} (layer {meta.layer})", tuple(row.tokens_NC.shape)
    if not is_grid(row.grid):
        raise BadInput(f"{who}: grid {row.grid!r} is not two positive whole numbers")
    if meta.grid is not None and row.grid != meta.grid:
        raise BadInput(f"{who}: grid {row.grid}, the shard's is {meta.grid}")
    wanted = (row.grid[0] * row.grid[1], meta.width)
    if shape != wanted:
        raise BadInput(f"{who}: tokens of shape {shape}, grid {row.grid} and width {meta.width} need {wanted}")
    if not row.tokens_NC.is_floating_point():
        raise BadInput(f"{who}: tokens of type {row.tokens_NC.dtype}, a floating type is needed")
    stored_NC = row.tokens_NC.detach().to("cpu", meta.torch_dtype).contiguous()
    if not torch.isfinite(stored_NC).all():
        if not torch.isfinite(row.tokens_NC).all():
            raise BadInput(f"{who}: its tokens hold NaN or infinity")
        largest = float(row.tokens_NC.abs().max())
        raise BadInput(f"{who}: a value of size {largest:g} does not fit into {meta.dtype}; bfloat16 holds it")
    return bytes(stored_NC.view(torch.uint8).numpy().data)
