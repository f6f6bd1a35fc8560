"""The benchmark of the pruner: its rival computes what ours does, and it runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import pruner

    yield pruner
    sys.modules.pop("pruner"), sys.modules.pop("plain_pruner")


def test_the_published_loop_is_the_same_model(benchmark) -> None:
    size = benchmark.Size(6, 32, 4)
    plain = benchmark.Plain(size, torch.device("cpu"))
    ours = plain.pruner().eval()
    model = plain.model.eval()
    tokens = benchmark.images(size, 3, seed=0)
    noise = torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(1))
    draws = torch.Generator().manual_seed(2)
    with torch.no_grad():
        rebuilt, attention = model(tokens, noise, draws)
        draws.manual_seed(2)  # the same draws, as the plain decoder makes them
        order = torch.stack([torch.randperm(36, generator=draws) for _ in range(3)])
        coin, some = torch.rand(3, generator=draws), torch.randint(0, 35, (3,), generator=draws)
        shown = order.argsort(1) < torch.where(coin < 0.5, some, 24)[:, None]
        out = ours(tokens, 4, queries=ours.queries(noise), grid=(6, 6), decode=shown)
    assert torch.allclose(out.attention, attention, atol=1e-5)
    assert torch.allclose(out.reconstruction, rebuilt, atol=1e-4)
    assert attention.argmax(1).unique().numel() > 1


def test_it_prints_its_tables() -> None:
    command = [sys.executable, str(FOLDER / "pruner.py"), "--quick", "--json", "--samples", "12"]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert found["training"]["samples"] == {"plain": 12, "ours": 12}
    assert all(0.99 < row["ratio"] < 1.01 for row in found["flops"])
    assert [round(row["counted"] / 1e9, 2) for row in found["flops"]] == [5.96, 23.78]
    assert found["machine"]["date"]
    assert all(taken > 0 for taken in found["memory_bytes"].values())
