"""The tokens of 40,000 images, in shards of 256: a training, or one that goes on, reads those of its steps."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ocvtp.pruner import PrunerConfig
from ocvtp.pruner.training.run import TrainConfig, train
from ocvtp.tokens import reader
from ocvtp.tokens.loader import TokenDataset
from ocvtp.tokens.manifest import ShardMeta, layer_listing
from ocvtp.tokens.rows import TokenRow
from ocvtp.tokens.writer import write_shard

IMAGES, SHARD, BATCH, AHEAD = 40_000, 256, 32, 3
META = ShardMeta("tiny-llava", "r1", "w1", 9, 9, 8, "float16", "pad", (2, 2))
PRUNER = PrunerConfig(token_dim=8, grid=(2, 2), slot_dim=8, decoder_layers=1)
CONFIG = TrainConfig(slots=(2,), steps=8, batch_size=BATCH, validation_share=0.001, eval_every=8, checkpoint_every=2)


class Stopped(Exception):
    """The training was cut off."""


def test_only_the_rows_of_its_steps_are_read_also_when_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens_4C = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    shards = []
    for first in range(0, IMAGES, SHARD):
        rows = [TokenRow(f"{image:06d}", tokens_4C, (2, 2)) for image in range(first, min(first + SHARD, IMAGES))]
        shards.append((tmp_path / f"{first}", write_shard(tmp_path / f"{first}", rows, META)))
    assert len(shards) == 157
    listing = layer_listing(shards, tmp_path)

    read: list[str] = []
    really = reader.OpenShard.read_bytes

    def read_bytes(self: reader.OpenShard, row: int) -> Any:
        read.append(self.ids[row])
        return really(self, row)

    monkeypatch.setattr(reader.OpenShard, "read_bytes", read_bytes)

    def opened() -> TokenDataset:
        read.clear()
        found = TokenDataset.from_listing(listing, tmp_path, memory_budget=2**20)  # they have 2.6 MB
        assert (len(found), found.in_memory, read) == (IMAGES, False, [])
        return found

    dataset = opened()
    _, held_out = dataset.split(CONFIG.validation_share, CONFIG.seed)
    assert 10 < len(held_out) < 100

    def stop(step: int, _: int, __: str) -> None:
        if step == 3:
            raise Stopped

    places = {"resume": tmp_path / "resume"}
    with pytest.raises(Stopped):
        train(PRUNER, CONFIG, dataset, tmp_path / "out", progress=stop, **places)
    of_steps = len(read) - len(held_out) - 1  # one to look at its shape
    assert 3 * BATCH <= of_steps <= (3 + AHEAD) * BATCH
    seen = set(read[1 + len(held_out) :][: 2 * BATCH])

    metrics = train(PRUNER, CONFIG, opened(), tmp_path / "out", **places)
    assert (metrics["steps"], metrics["images"]) == (8, IMAGES - len(held_out))
    assert len(read) == 1 + (8 - 2) * BATCH + len(held_out)  # the checkpoint was that of the second step
    assert seen.isdisjoint(read[1 : -len(held_out)]), "images of steps before the checkpoint are not read again"
