"""`python pipelines/latency.py`: measured times become runs, found again by what was measured."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ocvtp.efficiency import roofline
from ocvtp.phases import PHASES
from pipelines import latency
from pipelines.spool import FOLDER
from pipelines.stage.context import ROOT
from pipelines.tiny.llava import TinyLlava


def spooled(root: Path) -> list[dict[str, Any]]:
    """Records that wait, as nobody answers at the address of the server."""
    files = sorted((root / FOLDER).glob("*.jsonl"))
    return [json.loads(line)["record"] for file in files for line in file.read_text().splitlines()]


def test_each_case_is_a_run_with_its_distances(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OCVTP_ROOT", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["mlflow"] = {"uri": "http://127.0.0.1:9"}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    monkeypatch.setattr("pipelines.stage.context.PARAMS", tmp_path / "params.yaml")
    monkeypatch.setattr(roofline, "_SIZES", {"cpu": (64, 1 << 16)})
    torch.manual_seed(0)
    model = TinyLlava().make_model().eval()
    monkeypatch.setattr("ocvtp.efficiency.random_vlm.random_vlm", lambda name, *, device: model)
    arguments = "llava-1.5-7b --random-weights --device cpu --repeats 1 --warmup 0 --new-tokens 2 --keep 16 145".split()
    assert latency.main(arguments) == 1, "145 of 144 tokens"
    assert "Times the least time there is" in capsys.readouterr().out
    first = spooled(tmp_path)
    assert [one["name"] for one in first] == [
        "llava-1.5-7b/vanilla", "llava-1.5-7b/random, keep 16", "llava-1.5-7b/random, keep 145"]  # fmt: skip
    whole, kept, failed = first
    assert {f"ms/{name}" for name in (*PHASES, "first_token", "next_token", "total")} <= set(kept["metrics"])
    assert {f"distance/{name}" for name in ("tower", "projector", "prefill", "first_token")} <= set(kept["metrics"])
    assert kept["params"]["keep"] == 16
    assert kept["metrics"]["of_random"] == 1
    assert whole["metrics"]["of_vanilla"] == 1
    assert failed["metrics"] == {}
    assert failed["tags"]["failed"] == "keep is 145, but an image has 144 tokens: at most 144 can stay"
    assert latency.main(arguments) == 1
    again = spooled(tmp_path)[len(first) :]
    assert [one["fingerprint"] for one in again] == [one["fingerprint"] for one in first]
    assert again[0]["metrics"] != whole["metrics"]
    assert latency.main(["--batch", "0"]) == 2
    assert "--batch is 0: at least 1 is needed" in capsys.readouterr().err


def test_other_measurements_are_other_runs() -> None:
    case = {"method": "oc-vtp", "keep": 16, "options": {}, "failed": "for the fingerprint alone"}
    found = {
        "vlm": "tiny-llava", "random_weights": False, "device": "cpu", "dtype": "float32", "batch": 1, "new_tokens": 1,
        "image": "b" * 16, "image_size": [96, 96], "image_tokens": 144, "prompt": "Why?", "text_tokens": 20,
        "pruner": "a" * 16, "side_stream": False, "threads": 1, "versions": {"torch": "2.11"},
        "date": "2026-11-27T12:00:00+00:00",
        "cases": {"oc-vtp, keep 16": case, "css, keep 16": {**case, "method": "css"}},
    }  # fmt: skip

    def fingerprints(**other: Any) -> list[str]:
        return [one.fingerprint for one in latency.records({**found, **other})]

    before = fingerprints()
    assert fingerprints(date="2026-11-28T12:00:00+00:00") == before
    assert fingerprints(pruner="c" * 16)[0] != before[0]
    assert fingerprints(pruner="c" * 16)[1] == before[1], "css prunes without it"
    for name, other in (
        ("random_weights", True), ("image", "c" * 16), ("image_tokens", 140), ("prompt", "How?"), ("text_tokens", 21),
        ("side_stream", True), ("threads", 2), ("versions", {"torch": "2.12"}), ("batch", 2),
    ):  # fmt: skip
        assert not {*fingerprints(**{name: other})} & {*before}, name
