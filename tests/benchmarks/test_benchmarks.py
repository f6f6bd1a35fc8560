"""The benchmarks run and print what they say; the rival of the pruner computes what ours does."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ocvtp.methods import REGISTRY

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import pruner

    yield pruner
    for name in ("pruner", "plain_pruner", "machine"):
        sys.modules.pop(name)


def run(script: str, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, str(FOLDER / script), "--quick", "--json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["machine"]["date"]
    return found


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


def test_the_pruner() -> None:
    found = run("pruner.py", "--samples", "12")
    assert found["training"]["samples"] == {"plain": 12, "ours": 12}
    assert all(0.99 < row["ratio"] < 1.01 for row in found["flops"])
    assert [round(row["counted"] / 1e9, 2) for row in found["flops"]] == [5.96, 23.78]
    assert all(taken > 0 for taken in found["memory_bytes"].values())
    losses = found["losses"]["losses"]
    assert set(losses) == {"aw_mse", "mse", "span", "answers", "masks"}
    assert all(row["steps"] > 0 and 0 < row["span_error"]["4"] < 1 and row["kl"] > 0 for row in losses.values())
    errors = {row["choice"]: row["span_error"] for row in found["choices"]}
    assert set(errors) == {"select", "qr", "css", "fps", "medoids"}
    assert min(errors, key=errors.__getitem__) == "css"


def test_methods() -> None:
    (one,) = run("methods.py", "--batches", "2")["models"]
    unreached = {name for name in REGISTRY if REGISTRY[name].acts == "inside the LLM" and not name.endswith("-authors")}
    unreached -= {"vscan"}  # of which fewer tokens enter
    assert set(one["left_out"]) == {"trim", "cdpruner"} | unreached
    assert {row["method"] for row in one["rows"]} == set(REGISTRY) - {"oc-vtp", *one["left_out"]}
    against = {row["method"]: row["against"] for row in one["rows"]}
    assert (against["tome"], against["fastv-authors"], against["random"]) == ("random", "vanilla", "random")
    assert all(row["batch_2"]["ms"] > 0 for row in one["rows"])
    own = {row["method"]: row["batch_2"]["own"] for row in one["rows"]}
    assert own["random"] == 0 < own["medoids"]
    assert {row["batch_2"]["ratio"] for row in one["rows"] if row["method"] == "random"} == {1}
    added = {row["method"]: row["added_flops"] for row in one["rows"] if "added_flops" in row}
    assert added["random"] == 0
    assert 0 < added["cdpruner-no-text"] < added["divprune"]


def test_precision() -> None:
    found = run("precision.py")
    rows = {row["method"]: row for row in found["rows"]}
    assert all(0 <= row["vlm"]["images"] <= 1 and 0.8 < row["vlm"]["tokens"] <= 1 for row in rows.values())
    assert {name for name, row in rows.items() if "bf16" in row} == {"oc-vtp-untrained"}
    products = [rows["oc-vtp-untrained"][precision]["tokens"] for precision in ("bf16", "fp16")]
    assert 0.95 < products[0] <= products[1] <= 1


def test_the_gpu_benchmark_on_a_cpu() -> None:
    arguments = ("--device", "cpu", "--skip-pruner", "--models", "llava-next-7b", "qwen2.5-vl-7b")
    found = run("gpu.py", *arguments)
    assert [one["vlm"] for one in found["vlms"]] == ["llava-next-7b", "qwen2.5-vl-7b"]
    for one in found["vlms"]:
        (table,) = one["tables"]
        rows = {row["method"]: row for row in table["rows"]}
        assert set(rows) == {"vanilla", "random", "css", "oc-vtp-untrained", "fastv"}
        assert all(row["ms"]["tower"] > 0 and row["ms"]["prefill"] > 0 for row in rows.values())
        assert rows["vanilla"]["ms"]["method"] == 0 < rows["css"]["ms"]["method"]
        assert rows["vanilla"]["against_random"] is None, "no budget is random's"
        assert (rows["random"]["against_random"], rows["vanilla"]["against_vanilla"]) == (1, 1)
        assert all(row["distance"]["first_token"] > 0 for row in rows.values())
        (beside,) = table["side_stream"]
        assert beside["case"] == "oc-vtp-untrained, keep 50%"
        assert beside["ms"] > 0 < beside["ratio"]
        prefill = {name: row["least_ms"]["prefill"] for name, row in rows.items()}
        assert prefill["fastv"] == pytest.approx(prefill["css"], rel=0.1), (
            "half of the tokens, in the mean of its layers"
        )
        assert prefill["fastv"] < 0.9 * prefill["vanilla"]
        assert rows["css"]["kept"] == table["tokens"] // 2


def test_the_pruner_has_its_time_before_the_vlms() -> None:
    found = run("gpu.py", "--device", "cpu", "--minutes", "0", "--models", "qwen2.5-vl-7b")
    assert found["pruner"]["training"]["samples"] == {"plain": 24, "ours": 24}
    assert found["vlms"][0]["tables"] == []
    assert found["left_out"] == ["qwen2.5-vl-7b, batch 2, 3 new tokens: no time"]


def test_what_was_not_measured_is_a_dash_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    import gpu

    row = {"method": "css", "kept": 64, "ms": dict.fromkeys(gpu.KEYS, 1.0), "distance": {}, "peak_memory_bytes": None,
           "against_random": None, "against_vanilla": None}  # fmt: skip
    lines = gpu._table({"batch": 1, "tokens": 576, "new_tokens": 1, "rows": [row], "side_stream": []})
    assert lines[-1].endswith("| 1.00 | - | - | - |")
    for name in ("gpu", "methods", "pruner", "plain_pruner", "machine"):
        if name not in before:
            sys.modules.pop(name, None)


def test_the_fan_out() -> None:
    found = run("cluster.py", "--only", "local")
    assert [(row["executor"], row["tasks"]) for row in found["overhead"]] == [("local", 20)]
    assert found["planning"]["tasks"] == 200
    assert found["scaling"]["speedup"] > 0


def test_evaluation() -> None:
    found = run("evaluation.py", "--benchmarks", "mme")
    assert [row["who"] for row in found["all"]] == [
        "ocvtp, batches of 1", "ocvtp, batches of 8", "ocvtp, batches of 32", "lmms-eval's LlavaHf, one by one",
    ]  # fmt: skip
    assert all(row["questions"] == row["equal"] == 8 and row["seconds"] > 0 for row in found["all"])
    first, *_, theirs = found["all"]
    assert first["times_one_by_one"] == theirs["times_lmms_eval"] == 1
    # A prefill of tiny-llava takes 0.75 G operations: 447 M in the tower, 303 M in the language model, of all pairs.
    least = 8 * 0.74e9 / found["ceilings"]["flops"]
    assert all(row["least"] == pytest.approx(least, rel=0.03) for row in found["all"])


def test_the_file_for_coco_at_full_size_is_one_of_coco(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    import coco

    try:
        coco.write_annotations(tmp_path / "instances.json", 40, 300)
        data = json.loads((tmp_path / "instances.json").read_bytes())
        assert (len(data["images"]), len(data["annotations"])) == (40, 300)
        per_annotation = sum(len(outline) for one in data["annotations"] for outline in one["segmentation"]) / 300
        assert 40 < per_annotation < 52, "as long as COCO's"
        found = coco.part_load(tmp_path, 0)
        assert found["images"] == len(set(found["first"])) == 40
        size = coco.write_pictures(tmp_path / "train2017", found["first"][:6])
        assert size > 50_000
        assert coco.part_select(tmp_path, 6) == {"images": 6, "rejects": 0}
    finally:
        for name in ("coco", "machine"):
            sys.modules.pop(name)


@pytest.mark.nightly
def test_coco_at_full_size() -> None:
    found = run("coco.py")
    assert (found["listed"], found["annotations"], found["drawn"]) == (500, 2000, 64)
    assert all(found[part]["cpu_seconds"] > 0 < found[part]["peak_bytes"] for part in ("load", "select", "stage"))
    assert found["plan"]["room"] == f"{1000 * 576 * 1024 * 2 / 1e9:.3g} GB of the store"
