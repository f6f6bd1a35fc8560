"""Shards: what is read is what was written, or an error; never other tokens."""

import errno
import json
import os
import zlib
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from ocvtp.errors import BadInput, Corrupt, Incompatible
from ocvtp.tokens import writer as writer_module
from ocvtp.tokens.manifest import ShardManifest, ShardMeta, layer_listing, read_layer_listing
from ocvtp.tokens.reader import open_shard
from ocvtp.tokens.rows import TokenRow
from ocvtp.tokens.writer import DiskFull, ShardWriter, write_shard

META = ShardMeta(
    vlm="tiny-llava",
    revision="r1",
    weights="w1",
    layer=9,
    tower_layer=9,
    width=8,
    dtype="float16",
    preprocessing="pad",
    grid=(2, 3),
)


def row(name: str, grid: tuple[int, int] = (2, 3), width: int = 8) -> TokenRow:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return TokenRow(name, torch.randn(grid[0] * grid[1], width, generator=generator), grid)


def rows(count: int = 5) -> list[TokenRow]:
    return [row(f"image {i}") for i in range(count)]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("name", ["tokens", "ü ' \" ; \n $(x)"])
def test_rows_come_back_as_the_stored_type_holds_them(tmp_path: Path, dtype: str, name: str) -> None:
    folder = tmp_path / name
    manifest = write_shard(folder, rows(), replace(META, dtype=dtype), f"{name}.arrow")
    assert ShardManifest.read(folder / f"{name}.arrow.json") == manifest
    shard = open_shard(folder, manifest)
    assert shard.ids == [r.image_id for r in rows()]
    for index, wanted in enumerate(rows()):
        got = shard.read(index)
        assert (got.image_id, got.grid) == (wanted.image_id, (2, 3))
        assert torch.equal(got.tokens_NC, wanted.tokens_NC.to(getattr(torch, dtype)))
    shard.verify()


def test_the_file_is_plain_arrow_as_documented(tmp_path: Path) -> None:
    write_shard(tmp_path, rows(), META)
    with pa.memory_map(str(tmp_path / "tokens.arrow")) as source:
        table = pa.ipc.open_file(source).read_all()
        assert table.schema.names == ["image_id", "grid_h", "grid_w", "crc32", "tokens"]
        assert [str(t) for t in table.schema.types] == ["string", "int32", "int32", "uint32", "large_binary"]
        first = table.slice(1, 1).to_pylist()[0]
        tokens_NC = np.frombuffer(first["tokens"], "<f2").reshape(6, 8)
        np.testing.assert_array_equal(tokens_NC, rows()[1].tokens_NC.numpy().astype("<f2"))
        assert first["crc32"] == zlib.crc32(b"image 1\n2 3\n" + first["tokens"])
        # Uncompressed: the bytes of a row lie in the file as they are.
        assert first["tokens"] in (tmp_path / "tokens.arrow").read_bytes()


def test_equal_rows_give_equal_bytes_whatever_the_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shard(tmp_path / "a", rows(), META)
    write_shard(tmp_path / "b", iter(rows()), META)
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")
    monkeypatch.setattr(writer_module, "BATCH_BYTES", 200)  # three rows a batch
    manifest = write_shard(tmp_path / "c", rows(), META)
    shard = open_shard(tmp_path / "c", manifest)
    for index, wanted in enumerate(rows()):
        assert torch.equal(shard.read(index).tokens_NC, wanted.tokens_NC.half())


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row("x", (3, 3)), r"image x \(layer 9\): grid \(3, 3\), the shard's is \(2, 3\)"),
        (row("x", (2, 3), 4), r"image x .*shape \(6, 4\), grid \(2, 3\) and width 8 need \(6, 8\)"),
        (TokenRow("x", torch.zeros(5, 8), (2, 3)), r"shape \(5, 8\)"),
        (TokenRow("x", torch.full((6, 8), float("nan")), (2, 3)), "NaN or infinity"),
        (TokenRow("x", torch.full((6, 8), 1e5), (2, 3)), "100000 does not fit into float16; bfloat16 holds it"),
        (TokenRow("x", torch.zeros(6, 8, dtype=torch.long), (2, 3)), "int64, a floating type"),
        (TokenRow("x", torch.zeros(0, 8), (0, 3)), "grid"),
        (row("image 1"), "image 1 is given twice"),
    ],
)
def test_a_bad_row_is_named_and_leaves_nothing(tmp_path: Path, bad: TokenRow, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        write_shard(tmp_path, [*rows(), bad], META)
    assert snapshot(tmp_path) == {}


def test_an_empty_shard_or_an_unsafe_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="at least one image"):
        write_shard(tmp_path, [], META)
    with pytest.raises(BadInput, match="plain file name"):
        write_shard(tmp_path, rows(), META, "../x.arrow")
    assert snapshot(tmp_path) == {}


# --- damage ---------------------------------------------------------------------------------------------------------


def flip(path: Path, place: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


def place_of(path: Path, column: str) -> int:
    """Where a cell of row 2 lies in the file."""
    raw = path.read_bytes()
    with pa.memory_map(str(path)) as source:
        base = source.read_buffer(1).address
        source.seek(0)
        batch = pa.ipc.open_file(source).get_batch(0)
        buffers = batch[column].buffers()
        start = buffers[-1].address - base
        if column in ("image_id", "tokens"):
            offsets = np.frombuffer(buffers[1], np.int32 if column == "image_id" else np.int64)
            start += int(offsets[2])
        else:
            start += 2 * 4
        assert 0 < start < len(raw)
        return start


@pytest.mark.parametrize("column", ["image_id", "grid_h", "grid_w", "crc32", "tokens"])
def test_one_flipped_bit_in_any_column_is_found_in_its_row(tmp_path: Path, column: str) -> None:
    manifest = write_shard(tmp_path, rows(), META)
    path = tmp_path / "tokens.arrow"
    flip(path, place_of(path, column))
    shard = open_shard(tmp_path, manifest)
    for index in (0, 1, 3, 4):
        assert torch.equal(shard.read(index).tokens_NC, rows()[index].tokens_NC.half())
    for _ in range(2):  # not only the first time
        with pytest.raises(Corrupt, match=r"tokens.arrow, row 2 \(image .*checksum"):
            shard.read(2)
    with pytest.raises(Corrupt):
        shard.verify()


def test_no_flipped_bit_anywhere_ever_yields_other_data(tmp_path: Path) -> None:
    manifest = write_shard(tmp_path, rows(3), META)
    path = tmp_path / "tokens.arrow"
    whole = path.read_bytes()
    refused = 0
    for place in range(len(whole)):
        flip(path, place, bit=place % 8)
        try:
            shard = open_shard(tmp_path, manifest)
            got = [shard.read(index) for index in range(len(shard))]
        except (Corrupt, Incompatible):
            refused += 1
        else:
            assert len(got) == 3
            for have, wanted in zip(got, rows(3), strict=True):
                assert (have.image_id, have.grid) == (wanted.image_id, wanted.grid)
                assert torch.equal(have.tokens_NC, wanted.tokens_NC.half())
            with pytest.raises(Corrupt, match="SHA-256"):
                shard.verify()
        path.write_bytes(whole)
    assert refused > 3 * 6 * 8 * 2  # at least wherever a token lies


def test_truncated_lengthened_and_missing_shards_are_corrupt(tmp_path: Path) -> None:
    manifest = write_shard(tmp_path, rows(), META)
    path = tmp_path / "tokens.arrow"
    whole = path.read_bytes()
    for wrong in (whole[:-1], whole[: len(whole) // 2], b"", whole + b"\0"):
        path.write_bytes(wrong)
        with pytest.raises(Corrupt, match=rf"has {len(wrong)} bytes, its manifest says {len(whole)}"):
            open_shard(tmp_path, manifest)
        if wrong != whole + b"\0":  # even with a manifest that agrees on the size
            with pytest.raises(Corrupt):
                open_shard(tmp_path, replace(manifest, bytes=len(wrong)))
    path.unlink()
    with pytest.raises(Corrupt, match=r"tokens.arrow is missing"):
        open_shard(tmp_path, manifest)


def test_a_manifest_of_another_shard_is_refused(tmp_path: Path) -> None:
    manifest = write_shard(tmp_path, rows(), META)
    with pytest.raises(Corrupt, match="has 5 rows, its manifest says 6"):
        open_shard(tmp_path, replace(manifest, rows=6))
    with pytest.raises(Incompatible, match=r'"layer": 9.*"layer": 10'):
        open_shard(tmp_path, replace(manifest, meta=replace(META, layer=10)))
    table = pa.table({"image_id": ["a"], "tokens": [b"x"]})
    with pa.ipc.new_file(str(tmp_path / "tokens.arrow"), table.schema) as sink:
        sink.write_table(table)
    size = (tmp_path / "tokens.arrow").stat().st_size
    with pytest.raises(Corrupt, match=r"columns .*image_id"):
        open_shard(tmp_path, replace(manifest, bytes=size))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("rows"), r"missing keys: \['rows'\], unknown keys: none"),
        (lambda d: d.update(color=1), r"unknown keys: \['color'\]"),
        (lambda d: d.update(format=2), "format 2: this version reads 1"),
        (lambda d: d.update(file="../tokens.arrow"), "not a plain file name"),
        (lambda d: d.update(rows="5"), "positive whole numbers"),
        (lambda d: d["meta"].update(dtype="int8"), "'int8': one of float16"),
        (lambda d: d["meta"].update(width=None), "width .*None"),
        (lambda d: d["meta"].pop("vlm"), r"missing keys: \['vlm'\]"),
        (lambda d: d["meta"].update(grid=[0, 3]), "grid"),
        (lambda d: d.update(meta=3), "not an object"),
    ],
)
def test_a_damaged_manifest_is_corrupt(tmp_path: Path, change: Any, message: str) -> None:
    write_shard(tmp_path, rows(), META)
    path = tmp_path / "tokens.arrow.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(Corrupt, match=message) as caught:
        ShardManifest.read(path)
    assert str(path) in str(caught.value)
    path.write_text(path.read_text()[:-20])
    with pytest.raises(Corrupt, match="is not JSON"):
        ShardManifest.read(path)


# --- disk full ------------------------------------------------------------------------------------------------------


def test_room_is_asked_for_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    need = 5 * 6 * 8 * 2
    free = [int(need * 1.1) - 1]
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(0, 0, free[0]))
    with pytest.raises(DiskFull, match=rf"{int(need * 1.1)} bytes are needed, {free[0]} are free"):
        write_shard(tmp_path, rows(), META, expected_rows=5)
    assert snapshot(tmp_path) == {}
    free[0] += 1
    write_shard(tmp_path, rows(), META, expected_rows=5)


@pytest.mark.parametrize("after", [0, 1, 2, 3, 5, 8])
def test_a_disk_that_fills_up_leaves_nothing_and_keeps_what_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    write_shard(tmp_path, rows(2), META)
    before = snapshot(tmp_path)
    monkeypatch.setattr(writer_module, "BATCH_BYTES", 100)
    real, written = pa.PythonFile, [0]

    class Full:
        """A file on a disk with room for `after` writes."""

        def __init__(self, file: Any) -> None:
            self.file = file

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def write(self, data: bytes) -> int:
            written[0] += 1
            if written[0] > after:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.file.write(data)

    monkeypatch.setattr(pa, "PythonFile", lambda file, mode: real(Full(file), mode=mode))
    with pytest.raises(DiskFull, match=r"tokens.arrow: the disk is full.*removed"):
        write_shard(tmp_path, rows(), META)
    assert snapshot(tmp_path) == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_really_full_device_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_open = Path.open

    def full(self: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        if "w" in mode and ".tmp-" in self.name:
            self.touch()
            return real_open(Path("/dev/full"), mode, *args, **options)
        return real_open(self, mode, *args, **options)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(DiskFull, match=r"tokens.arrow: the disk is full"):
        write_shard(tmp_path, rows(), META)
    assert snapshot(tmp_path) == {}


def test_an_interrupted_writer_leaves_what_was_there(tmp_path: Path) -> None:
    write_shard(tmp_path, rows(2), META)
    before = snapshot(tmp_path)

    def stopped() -> None:
        with ShardWriter(tmp_path, META) as writer:
            writer.add(row("new"))
            assert len(snapshot(tmp_path)) == 3  # a temporary file of its own
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert snapshot(tmp_path) == before


# --- folders and listings -------------------------------------------------------------------------------------------


def test_a_listing_names_shards_relative_to_the_store(tmp_path: Path) -> None:
    store = tmp_path / "a store"
    shards = []
    for key in "ab":
        folder = store / "tokens" / key
        shards.append((folder, write_shard(folder, [row(f"{key}{i}") for i in range(3)], META)))
    listing = layer_listing(shards, store)
    assert listing["rows"] == 6
    assert [s["path"] for s in listing["shards"]] == ["tokens/a/tokens.arrow", "tokens/b/tokens.arrow"]
    path = tmp_path / "layer_9.json"
    path.write_text(json.dumps(listing))
    moved = tmp_path / "moved"
    store.rename(moved)
    assert read_layer_listing(path, moved) == [
        (moved / "tokens" / key, manifest) for key, (_, manifest) in zip("ab", shards, strict=True)
    ]
    with pytest.raises(BadInput, match="outside of the store"):
        layer_listing([(moved / "tokens" / "a", shards[0][1])], tmp_path / "a store")
    (moved / "tokens/b/tokens.arrow").unlink()
    with pytest.raises(Corrupt, match=r"1 of the 2 shards in .*layer_9.json are missing .*tokens/b/tokens.arrow; e"):
        read_layer_listing(path, moved)
    for wrong, message in {
        "/etc/passwd": "does not stay in the store",
        "../x.arrow": "does not stay in the store",
    }.items():
        bad = json.loads(path.read_text())
        bad["shards"][0]["path"] = wrong
        with pytest.raises(Corrupt, match=message):
            read_layer_listing(bad, moved)
    with pytest.raises(Corrupt, match="rows is 7, which is not the sum"):
        read_layer_listing({**listing, "rows": 7}, moved)
    with pytest.raises(Corrupt, match="list of at least one"):
        read_layer_listing({**listing, "shards": []}, moved)
    with pytest.raises(Corrupt, match="is missing"):
        read_layer_listing(tmp_path / "layer_10.json", moved)
