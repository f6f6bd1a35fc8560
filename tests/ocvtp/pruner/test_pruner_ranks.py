"""Training on several processes: the curve of the loss is that of one device with the same batch."""

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ocvtp.errors import BadInput
from ocvtp.pruner.training.ranks import Ranks
from ocvtp.pruner.training.run import TrainConfig
from ocvtp.tokens.manifest import ShardMeta, layer_listing
from ocvtp.tokens.rows import TokenRow
from ocvtp.tokens.writer import write_shard

OPTIONS = (
    "steps=8 batch_size=6 slots=[3,5] warmup_steps=2 eval_every=4 validation_share=0.2 precision=fp32 log_every=1 "
    "checkpoint_every=4 pruner.slot_dim=16 pruner.decoder_layers=2"
).split()


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A listing and its store: 40 images with 12 or 16 tokens, so that some batches are padded."""
    store = tmp_path_factory.mktemp("store")
    generator = torch.Generator().manual_seed(0)
    grids = [(4, 4) if i % 3 else (3, 4) for i in range(40)]
    rows = [
        TokenRow(f"image-{i}", torch.randn(h * w, 16, generator=generator), (h, w)) for i, (h, w) in enumerate(grids)
    ]
    meta = ShardMeta("tiny", "", "0" * 64, 9, 9, 16, "float32", "pad", None)
    manifest = write_shard(store / "shard", rows, meta)
    listing = store / "layer_9.json"
    listing.write_text(json.dumps(layer_listing([(store / "shard", manifest)], store)))
    return listing, store


def trained(tokens: tuple[Path, Path], out: Path, processes: int, *more: str) -> list[dict[str, str]]:
    """Rows of the curves of a training by the command line."""
    listing, store = tokens
    command = ["train", str(listing), str(out), "--store", str(store), "--set", *OPTIONS, *more]
    start = [sys.executable, "-m"]
    if processes > 1:
        start += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    done = subprocess.run(
        [*start, "ocvtp.cli", *command], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return list(csv.DictReader(io.StringIO((out / "curves.csv").read_text())))


@pytest.mark.parametrize(
    "more",
    [
        (),
        pytest.param(("loss=mse", "pruner.decoder=ar", "drop_last=false", "batch_size=10"), marks=pytest.mark.nightly),
    ],
)
def test_two_processes_have_the_curve_of_one(tokens, tmp_path: Path, more: tuple[str, ...]) -> None:
    one, two = trained(tokens, tmp_path / "one", 1, *more), trained(tokens, tmp_path / "two", 2, *more)
    assert len(one) == len(two) == 9
    for ours, theirs in zip(one, two, strict=True):
        for name, value in ours.items():
            if value:
                assert float(theirs[name]) == pytest.approx(float(value), rel=2e-4, abs=1e-6), (ours["step"], name)
            else:
                assert theirs[name] == ""
    a, b = (load_file(tmp_path / name / "last.safetensors") for name in ("one", "two"))
    assert all(torch.allclose(a[name], b[name], atol=1e-4) for name in a)
    if not more:
        goes_on_where_it_stopped(tokens, tmp_path / "two", two)


def goes_on_where_it_stopped(tokens, out: Path, rows: list[dict[str, str]]) -> None:
    """From the checkpoint before the last, two processes end in the same bytes."""
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    for path in [*(out / "resume").glob("step-00000008.*"), out / "last.safetensors", out / "curves.csv"]:
        path.unlink()
    assert trained(tokens, out, 2) == rows
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before


def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    config = TrainConfig(batch_size=12)
    with pytest.raises(BadInput, match="batch_size 12 cannot be shared out evenly among 5 processes"):
        Ranks(0, 5).check(config, 100)
    with pytest.raises(BadInput, match="has 1 of 25 images, which is not one for each of 2"):
        Ranks(0, 2).check(TrainConfig(batch_size=12, drop_last=False), 25)
    Ranks(0, 2).check(config, 25)
    assert [Ranks(rank, 2).part([7, 8, 9]) for rank in (0, 1)] == [[7, 9], [8]]
