"""`--costs`: what extraction and training take at the size of the params, without data."""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from small_params import write_params

from ocvtp.pruner import PrunerConfig
from ocvtp.pruner.training.run import TrainConfig, train
from pipelines import extract
from pipelines import train as training
from pipelines.params.load import load
from pipelines.stage import costs

pytestmark = pytest.mark.pipeline
COCO = {"source": "coco", "images": 40_000, "questions": 0, "annotations": "none.json", "image_folder": "none"}
LARGE: dict[str, Any] = {
    "sample": COCO, "evaluate": {"data": "official"}, "benchmark": ["pope"], "method": ["vanilla", "oc-vtp"],
    "keep": [16], "layer": [9, -2], "seed": [0, 1], "train": {"eval_every": 50},
    "cluster": {"resources": {"train": {"cpus": 3}}},
}  # fmt: skip


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder without any output."""
    for name in ("OCVTP_STORE", "DVC_STAGE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OCVTP_ROOT", str(tmp_path))
    monkeypatch.setattr(costs, "SECONDS", 0.01)
    return tmp_path


def test_forty_thousand_images_are_told_without_any(
    empty: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads, before = list[int](), torch.get_num_threads()
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    assert training.main([*write_params(empty, LARGE, {}), "--costs"]) == 0
    said = capsys.readouterr().out
    number = r"[\d.e+-]+"
    time = rf"{number} (?:s|min|h|d)"
    # Two layers of 40,000 images of 144 tokens, 96 wide, in half precision; 5 % are held out.
    assert re.search(
        rf"extract tiny-llava, layer 9, -2 +40,000 +{2 * 40_000 * 144 * 96 * 2 / 1e9:.3g} GB +{number} +{time}\n", said
    )
    assert re.search(
        rf"train tiny-llava/layer_9-aw_mse-slots_16_32_48-seed_0 and 3 alike, 400 steps +{4 * 400 * 32:,} ", said
    )
    assert re.search(rf"  its 9 validations, 3 slot counts each +{4 * 9 * 2000 * 3:,} +- +{number} +{time}\n", said)
    assert [path.name for path in empty.iterdir()] == ["params.yaml"]
    assert threads == [1, before, 3, before], "those of a task"
    assert extract.main([*write_params(empty, LARGE, {}), "--costs"]) == 0
    said = capsys.readouterr().out
    assert "extract tiny-llava, layer 9, -2" in said
    assert "train tiny-llava" not in said
    with pytest.raises(SystemExit, match="2"):
        training.main([*write_params(empty, LARGE, {}), "--costs", "--dry-run"])
    assert "not allowed with argument" in capsys.readouterr().err


def test_what_nobody_can_say_before_images_are_seen_has_a_dash(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = {**LARGE, "vlm": "tiny-qwen", "layer": 9, "loss": "answers", "slots": [16], "seed": 0,
               "sample": {"images": 100}, "evaluate": {}}  # fmt: skip
    assert training.main([*write_params(empty, changes, {}), "--costs"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"extract tiny-qwen, layer 9 +100 +- +- +-\n", said)
    assert re.search(r"train tiny-qwen/layer_9-answers-slots_16-seed_0, 400 steps +12,800 +[\d.]+ MB +- +-\n", said)
    assert "-: images have different numbers of tokens" in said
    assert "-: with loss answers the language model is asked at each step" in said


def test_images_of_a_benchmark_are_counted_as_those_that_are_sampled(empty: Path) -> None:
    load_with = partial(write_params, empty, small={})
    load_with({**LARGE, "benchmark": ["gqa", "textvqa"], "train": {"on": ["sample", "gqa", "textvqa"]}})
    said = "on gqa, textvqa: counted as sample.images, 40,000 each; stage sample leaves out what a benchmark asks about"
    assert said in list(costs._notes(load(empty / "params.yaml"), training=True))
    load_with(LARGE)
    assert not [line for line in costs._notes(load(empty / "params.yaml"), training=True) if "sample.images" in line]


def test_loss_masks_is_measured_with_objects_of_noise(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_params(empty, {**LARGE, "layer": 9, "loss": ["span", "masks"], "slots": [16], "seed": 0}, {})
    assert training.main(["--params", str(empty / "params.yaml"), "--costs"]) == 0
    said = capsys.readouterr().out
    for loss in ("span", "masks"):
        assert re.search(rf"train tiny-llava/layer_9-{loss}-slots_16-seed_0, 400 steps +12,800 .* (?:s|min|h)\n", said)
    assert "with loss masks an image has 7 objects" in said


class Counted(costs.RandomTokens):
    """Counts the images that are asked for."""

    seen = 0

    def batch(self, indices: Any) -> Any:
        self.seen += len(indices)
        return super().batch(indices)

    def split(self, validation_share: float, seed: int) -> tuple[list[int], list[int]]:
        held = round(validation_share * len(self))
        return list(range(held, len(self))), list(range(held))


@pytest.mark.parametrize("options", [{}, {"ema": 0.9, "loss": "span"}, {"behaviour": "reference", "epochs": 2}])
def test_a_training_takes_what_was_said(empty: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Images that are seen, and bytes of its results and checkpoints, of a real training of the same size."""
    monkeypatch.setattr(costs, "_training_speeds", lambda *_: (1.0, 1.0))
    loss = options.pop("loss", "aw_mse")
    steps = {} if "epochs" in options else {"steps": 6}
    given = {"batch_size": 8, "eval_every": 4, "validation_share": 0.1, "checkpoint_every": 2, **steps, **options}
    write_params(empty, {**LARGE, "layer": 9, "seed": 0, "slots": [4], "loss": loss, "train": given,
                         "sample": {**COCO, "images": 40}}, {})  # fmt: skip
    params = load(empty / "params.yaml")
    said = list(costs._training(params, "cpu"))

    source = Counted(40, 144, 96, (12, 12))
    config = TrainConfig(**{**given, "loss": loss, "slots": (4,)})
    pruner = PrunerConfig(96, options.get("behaviour", "default"), grid=(12, 12))
    out, resume = empty / "out", empty / "resume"
    train(pruner, config, source, out, resume=resume)
    passes, _, judged = (one.passes for one in said)
    if config.validate_on != "held_out":
        assert judged == 3 * 8  # one batch after each four steps of ten, and at the end
    again = judged if config.validate_on == "held_out" else 0  # the last batch is at hand
    assert source.seen == 1 + passes + again
    found = [sum(path.stat().st_size for path in folder.glob("*.safetensors")) for folder in (out, resume)]
    assert said[0].disk == pytest.approx(found[0], rel=0.01)
    # Where there is no decoder some weights have no gradient, and so no moments.
    assert said[1].disk == pytest.approx(found[1], rel=0.01) if loss != "span" else said[1].disk > found[1]
    assert replace(said[0], speed=2.0).seconds == passes / 2
