"""Token shards: Arrow IPC files, uncompressed and memory-mapped, with a checksum a row and a manifest beside each.

Columns: `image_id` string, `grid_h` and `grid_w` int32, `crc32` uint32 (over id, grid and tokens), `tokens`
large_binary (row-major [N, C] in the shard's dtype, little-endian). The manifest `<name>.json` has the SHA-256 of the
whole file, which in turn repeats the manifest's meta data.
"""

from ocvtp.tokens.manifest import (
    Shard,
    ShardManifest,
    ShardMeta,
    check_agreement,
    layer_listing,
    read_layer_listing,
)
from ocvtp.tokens.reader import OpenShard, find_shards, open_shard
from ocvtp.tokens.rows import TokenRow, manifest_path, row_crc32
from ocvtp.tokens.writer import ShardWriter, write_shard

__all__ = [
    "OpenShard",
    "Shard",
    "ShardManifest",
    "ShardMeta",
    "ShardWriter",
    "TokenRow",
    "check_agreement",
    "find_shards",
    "layer_listing",
    "manifest_path",
    "open_shard",
    "read_layer_listing",
    "row_crc32",
    "write_shard",
]
