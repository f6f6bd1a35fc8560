"""The loader: the same tokens from memory or disk, padded, split by image, never a damaged row."""

import re
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch

from ocvtp.errors import BadInput, Corrupt, Incompatible
from ocvtp.tokens.loader import TokenDataset
from ocvtp.tokens.manifest import Shard, ShardMeta, layer_listing
from ocvtp.tokens.rows import TokenRow
from ocvtp.tokens.writer import write_shard

META = ShardMeta("tiny-llava", "r1", "w1", 9, 9, 4, "float16", "pad", (2, 3))


def tokens(name: str, count: int, width: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(map(ord, name)) * 1000 + count)
    return torch.randn(count, width, generator=generator)


def rows(names: list[str], grids: list[tuple[int, int]] | None = None) -> list[TokenRow]:
    grids = grids or [(2, 3)] * len(names)
    return [TokenRow(n, tokens(n, g[0] * g[1]), g) for n, g in zip(names, grids, strict=True)]


def make(tmp_path: Path, sizes: tuple[int, ...] = (3, 4, 1), meta: ShardMeta = META) -> list[Shard]:
    shards, numbers = [], count()
    for i, size in enumerate(sizes):
        names = [f"{next(numbers):03d}" for _ in range(size)]
        shards.append((tmp_path / f"{i}", write_shard(tmp_path / f"{i}", rows(names), meta)))
    return shards


@pytest.mark.parametrize("budget", [0, 2**30])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_batches_hold_the_rows_asked_for(tmp_path: Path, budget: int, dtype: str) -> None:
    dataset = TokenDataset(make(tmp_path, meta=replace(META, dtype=dtype)), memory_budget=budget)
    assert dataset.in_memory == (budget > 0)
    assert len(dataset) == 8
    order = [7, 0, 3, 3, 6]
    tokens_BNC, mask_BN, grids = dataset.batch(order)
    wanted_BNC = torch.stack([tokens(f"{i:03d}", 6) for i in order]).to(getattr(torch, dtype))
    assert torch.equal(tokens_BNC, wanted_BNC)
    assert mask_BN is None
    assert grids == [(2, 3)] * 5
    assert torch.equal(dataset.batch(torch.tensor(order)).tokens_BNC, tokens_BNC)
    one = dataset[3]
    assert (one.image_id, one.grid) == ("003", (2, 3))
    assert torch.equal(one.tokens_NC, wanted_BNC[2])
    tokens_BNC.zero_()  # a copy: the data set is not touched
    assert torch.equal(dataset.batch(order).tokens_BNC, wanted_BNC)


@pytest.mark.parametrize("budget", [0, 2**30])
def test_images_of_other_sizes_are_padded_with_a_mask(tmp_path: Path, budget: int) -> None:
    grids = [(2, 3), (1, 1), (4, 2)]
    meta = replace(META, grid=None)
    shard = (tmp_path, write_shard(tmp_path, rows(["a", "b", "c"], grids), meta))
    dataset = TokenDataset([shard], memory_budget=budget)
    tokens_BNC, mask_BN, got = dataset.batch([2, 0, 1])
    assert got == [grids[2], grids[0], grids[1]]
    assert tokens_BNC.shape == (3, 8, 4)
    assert mask_BN is not None
    assert mask_BN.tolist() == [[True] * n + [False] * (8 - n) for n in (8, 6, 1)]
    for b, (name, n) in enumerate((("c", 8), ("a", 6), ("b", 1))):
        assert torch.equal(tokens_BNC[b, :n], tokens(name, n).half())
        assert not tokens_BNC[b, n:].any()
    assert dataset.batch([0, 0]).mask_BN is None
    # The same number of tokens needs no mask, though the grids differ.
    other = (tmp_path / "o", write_shard(tmp_path / "o", rows(["d", "e"], [(2, 3), (3, 2)]), meta))
    assert TokenDataset([other]).batch([0, 1])[1:] == (None, [(2, 3), (3, 2)])


def test_rows_and_batches_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    dataset = TokenDataset(make(tmp_path))
    for index in (8, -1):
        with pytest.raises(BadInput, match=rf"row {index} of token shards with 8 rows \(0 to 7\)"):
            dataset.batch([0, index])
    with pytest.raises(BadInput, match="no images"):
        dataset.batch([])
    with pytest.raises(BadInput, match="no token shards"):
        TokenDataset([])


# --- split ----------------------------------------------------------------------------------------------------------


def names(dataset: TokenDataset, indices: list[int]) -> list[str]:
    return [dataset.image_ids[i] for i in indices]


def test_the_split_depends_on_seed_and_ids_alone(tmp_path: Path) -> None:
    few = TokenDataset(make(tmp_path / "a", (400,)))
    many = TokenDataset(make(tmp_path / "b", (100, 7, 293))[::-1])
    train, validation = few.split(0.2, seed=5)
    assert sorted(train + validation) == list(range(400))
    assert abs(len(validation) - 80) < 3 * (400 * 0.2 * 0.8) ** 0.5
    assert names(few, train) == names(many, many.split(0.2, 5)[0])
    assert names(few, validation) == names(many, many.split(0.2, 5)[1])
    assert set(validation) != set(few.split(0.2, seed=6)[1])
    # A new image moves no other; a larger share only adds.
    fewer = TokenDataset(make(tmp_path / "c", (300,)))
    assert set(names(fewer, fewer.split(0.2, 5)[1])) <= set(names(few, validation))
    assert set(validation) <= set(few.split(0.3, 5)[1])


def test_no_side_of_a_split_is_empty_unless_asked_for(tmp_path: Path) -> None:
    two = TokenDataset(make(tmp_path / "a", (2,)))
    for share in (0.001, 0.5, 0.999):
        assert [len(side) for side in two.split(share, 0)] == [1, 1]
    assert [len(side) for side in two.split(0, 0)] == [2, 0]
    with pytest.raises(BadInput, match="at least two"):
        TokenDataset(make(tmp_path / "b", (1,))).split(0.1, 0)
    for share in (-0.1, 1.0, float("nan")):
        with pytest.raises(BadInput, match="validation_share"):
            two.split(share, 0)


# --- faults ---------------------------------------------------------------------------------------------------------


def test_shards_that_were_made_otherwise_are_not_mixed(tmp_path: Path) -> None:
    others = {
        "vlm": "llava-1.5-7b",
        "revision": "r2",
        "weights": "w2",
        "layer": 10,
        "tower_layer": 10,
        "width": 6,
        "dtype": "bfloat16",
        "preprocessing": "squash",
        "grid": (3, 2),
    }
    mine = make(tmp_path / "mine", (2, 2))
    for field, value in others.items():
        meta = replace(META, **{field: value})
        folder = tmp_path / field
        grid = meta.grid or (2, 3)
        manifest = write_shard(folder, [TokenRow("other", tokens("x", 6, meta.width), grid)], meta)
        with pytest.raises(Incompatible) as caught:
            TokenDataset([*mine, (folder, manifest)])
        message = str(caught.value)
        assert f"{field}: {getattr(META, field)!r} in 2 " in message
        assert f"{value!r} in 1 ({folder / 'tokens.arrow'})" in message
        assert re.findall(r"(\w+): ", message) == [field]


def test_several_differences_are_all_listed(tmp_path: Path) -> None:
    mine = make(tmp_path / "a", (2,))
    other = (tmp_path / "b", write_shard(tmp_path / "b", rows(["z"]), replace(META, vlm="x", dtype="float32")))
    with pytest.raises(Incompatible, match=r"vlm: .*; dtype: "):
        TokenDataset([*mine, other])


def test_an_image_in_two_shards_is_refused(tmp_path: Path) -> None:
    a = (tmp_path / "a", write_shard(tmp_path / "a", rows(["x", "y"]), META))
    b = (tmp_path / "b", write_shard(tmp_path / "b", rows(["z", "x"]), META))
    with pytest.raises(BadInput, match=r"'x' is in the token shards more than once: .*a/tokens.arrow.*b/tokens"):
        TokenDataset([a, b])


@pytest.mark.parametrize("budget", [0, 2**30])
def test_a_damaged_row_is_never_handed_out(tmp_path: Path, budget: int) -> None:
    shards = make(tmp_path)
    path = tmp_path / "1" / "tokens.arrow"
    data = bytearray(path.read_bytes())
    place = data.index(tokens("004", 6).half().numpy().tobytes())
    data[place + 5] ^= 8
    path.write_bytes(data)
    dataset = TokenDataset(shards, memory_budget=budget)
    with pytest.raises(Corrupt, match=r"1/tokens.arrow, row 1 \(image '004'\)"):
        dataset.batch(range(8))
    if not budget:
        assert torch.equal(dataset[3].tokens_NC, tokens("003", 6).half())


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    shards = make(tmp_path)
    listing = layer_listing(shards, tmp_path)
    assert len(TokenDataset.from_listing(listing, tmp_path)) == 8
    (tmp_path / "2" / "tokens.arrow").unlink()
    with pytest.raises(Corrupt, match=r"2/tokens.arrow is missing"):
        TokenDataset(shards)
    with pytest.raises(Corrupt, match=r"1 of the 3 shards .*2/tokens.arrow; extract its tokens again"):
        TokenDataset.from_listing(listing, tmp_path)


def test_each_row_is_checked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ocvtp.tokens import reader

    checked: list[str] = []
    real = reader.row_crc32

    def watch(name: str, grid: tuple[int, int], data: memoryview) -> int:
        checked.append(name)
        return real(name, grid, data)

    monkeypatch.setattr(reader, "row_crc32", watch)
    dataset = TokenDataset(make(tmp_path), memory_budget=0)
    assert checked == []
    for _ in range(3):
        dataset.batch([1, 2, 1])
    assert checked == ["001", "002"]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
@pytest.mark.parametrize("budget", [0, 2**30])
def test_the_files_are_mapped_and_stay_open_while_rows_are_read(tmp_path: Path, budget: int) -> None:
    shards = make(tmp_path)
    dataset = TokenDataset(shards, memory_budget=budget)
    assert str(tmp_path / "0" / "tokens.arrow") in Path("/proc/self/maps").read_text()
    dataset.batch([0])
    for folder, _ in shards:
        (folder / "tokens.arrow").unlink()  # the mapping outlives the name
    assert torch.equal(dataset[7].tokens_NC, tokens("007", 6).half())
