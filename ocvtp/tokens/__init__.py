"""Vision tokens on disk: extracted once a VLM, read by every training of a pruner.

Shards are Arrow IPC files, uncompressed and memory-mapped, with a checksum a row and a manifest beside each.

Columns: `image_id` string, `grid_h` and `grid_w` int32, `crc32` uint32 (over id, grid and tokens), `tokens`
large_binary (row-major [N, C] in the shard's dtype, little-endian). The manifest `<name>.json` has the SHA-256 of the
whole file, which in turn repeats the manifest's meta data.
"""
