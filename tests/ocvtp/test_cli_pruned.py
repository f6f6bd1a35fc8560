"""Commands that prune a VLM, `ocvtp show` and `ocvtp latency`: pictures, tables, JSON, and what cannot be done."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import ocvtp
from ocvtp import cli, vlms
from ocvtp.data.scenes import jpeg, make_scene
from ocvtp.efficiency import roofline
from ocvtp.vlms.families import family_of


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, object]]:
    """A tiny random LLaVA, and a `prune` that notes how it was called and keeps the first tokens."""
    from pipelines.tiny.llava import TinyLlava

    torch.manual_seed(0)
    model = TinyLlava().make_model().eval()
    vlm = SimpleNamespace(model=model, processor=TinyLlava().make_processor(), family=family_of(model))
    calls: list[tuple[str, object]] = []

    @contextmanager
    def prune(model: object, *, method: str, keep: float, pruner: object = None) -> Iterator[SimpleNamespace]:
        calls.append((method, keep))
        count = keep if isinstance(keep, int) else round(144 * keep)
        yield SimpleNamespace(last_kept=[torch.arange(count)], slots=lambda **_: [None])

    monkeypatch.setattr(vlms, "load", lambda name, **_: vlm, raising=False)
    monkeypatch.setattr(ocvtp, "prune", prune, raising=False)
    return calls


def test_show_draws_what_was_kept(
    tiny: list[tuple[str, object]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image, out = tmp_path / "scene.jpg", tmp_path / "kept.png"
    image.write_bytes(jpeg(make_scene(0, "benchmark", 0)))
    code = cli.main(["show", str(image), "--methods", "random,hiprune", "--keep", "72", "12", "--out", str(out),
                     "--device", "cpu", "--json"])  # fmt: skip
    assert code == 0
    found = json.loads(capsys.readouterr().out)
    assert found["grids"] == [[12, 12]]
    assert [(m["method"], m["tokens"]) for m in found["methods"]] == [
        ("random", 72), ("hiprune", 72), ("random", 12), ("hiprune", 12),
    ]  # fmt: skip
    assert found["methods"][2]["kept"] == list(range(12))
    assert tiny == [("random", 72), ("hiprune", 72), ("random", 12), ("hiprune", 12)]
    pixels = np.asarray(Image.open(out).convert("L"), dtype=float)
    middle = pixels[: pixels.shape[0] // 2, pixels.shape[1] // 3 : 2 * pixels.shape[1] // 3]
    height = middle.shape[0]
    assert middle[height // 5 : height // 2].mean() > 1.5 * middle[3 * height // 5 : -height // 10].mean()


def test_oc_vtp_without_a_pruner_is_refused(
    tiny: list[tuple[str, object]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = tmp_path / "scene.jpg"
    image.write_bytes(jpeg(make_scene(0, "benchmark", 0)))
    out = str(tmp_path / "kept.png")
    assert cli.main(["show", str(image), "--method", "oc-vtp", "--out", out, "--device", "cpu"]) == 2
    assert "--pruner" in capsys.readouterr().err


def test_a_device_that_is_not_there_is_named(
    tiny: list[tuple[str, object]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["latency", "--device", "cuda:97"]) == 2
    assert "device 'cuda:97' cannot be used" in capsys.readouterr().err


def test_latency_measures_every_case(
    tiny: list[tuple[str, object]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    arguments = [
        "latency",
        "--keep",
        "48",
        "16",
        "--new-tokens",
        "2",
        "--repeats",
        "2",
        "--warmup",
        "1",
        "--device",
        "cpu",
    ]
    assert cli.main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["cases"]
    assert list(found) == ["vanilla", "random, keep 48", "random, keep 16"]
    assert all(case["first_token"]["median"] > case["vision"]["median"] > 0 for case in found.values())
    assert tiny == [("random", 48), ("random", 16)] * 3
    for case in found.values():
        assert set(case["phases"]) == {"tower", "method", "projector", "prefill", "other"}
        assert all(case["phases"][name]["median"] > 0 for name in ("tower", "projector", "prefill", "other"))
        assert case["accounted"] == pytest.approx(1, abs=0.05)
        assert case["processing"]["median"] > 0
    turns = zip(found["random, keep 16"]["turns"], found["vanilla"]["turns"], strict=True)
    assert found["random, keep 16"]["of_vanilla"] == pytest.approx(sum(mine / its for mine, its in turns) / 2)
    assert found["random, keep 16"]["of_random"] == 1
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(roofline, "_SIZES", {"cpu": (64, 1 << 16)})
    figure = tmp_path / "phases.png"
    bars = tmp_path / "bars.svg"
    assert cli.main([*arguments, "--limits", "--figure", str(figure), "--bars", str(bars)]) == 0
    printed = capsys.readouterr().out
    for part in ("of vanilla", "of random", "image processing", "Times the least time there is"):
        assert part in printed
    assert figure.read_bytes().startswith(b"\x89PNG")
    drawn = bars.read_text()
    for part in ("keep 48,", "keep 16,", "first token", "2 tokens", "vanilla", "random", "% of the unpruned model's"):
        assert part in drawn
    assert cli.main([*arguments, "--figure", "phases.pdf"]) == 2
    assert "--figure phases.pdf: a name that ends in .png or .svg" in capsys.readouterr().err
    assert cli.main([*arguments, "--bars", "bars"]) == 2
    assert "--bars bars: a name that ends in .png or .svg" in capsys.readouterr().err


def test_latency_of_several_prompts_at_once(tiny: list[tuple[str, object]], capsys: pytest.CaptureFixture[str]) -> None:
    once = ["--new-tokens", "1", "--repeats", "1", "--warmup", "0", "--device", "cpu", "--json"]
    assert cli.main(["latency", "--batch", "3", *once]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["batch"] == 3
    assert set(found["cases"]) == {"vanilla", "random, keep 0.111"}


def test_limits_of_a_method_inside_the_llm_count_what_each_layer_reads(
    tiny: list[tuple[str, object]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ceilings = roofline.Ceilings(flops=1e9, bandwidth=1e12)
    monkeypatch.setattr(roofline.Ceilings, "measured", lambda *_: ceilings)
    arguments = ["--methods", "fastv", "--keep", "48", "--repeats", "1", "--warmup", "0", "--new-tokens", "2"]
    assert cli.main(["latency", *arguments, "--device", "cpu", "--limits", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["cases"]
    whole, fastv, random = (found[name]["least_ms"] for name in ("vanilla", "fastv, keep 48", "random, keep 48"))
    assert fastv["projector"] == whole["projector"] > random["projector"]
    # One layer of four reads all 144 tokens, and three 16 of them: more pairs to attend to than 48 in each of them.
    assert random["prefill"] < fastv["prefill"] < whole["prefill"]
    assert fastv["next_token"] == pytest.approx(random["next_token"]), "on average there are as many in the cache"


def test_latency_of_random_weights(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from pipelines.tiny.llava import TinyLlava

    torch.manual_seed(0)
    asked: list[tuple[str, str]] = []

    def random_vlm(name: str, *, device: str) -> object:
        asked.append((name, device))
        return TinyLlava().make_model().eval()

    monkeypatch.setattr("ocvtp.efficiency.random_vlm.random_vlm", random_vlm)
    arguments = ["latency", "llava-1.5-7b", "--random-weights", "--device", "cpu", "--repeats", "1", "--warmup", "0"]
    assert cli.main([*arguments, "--batch", "2", "--methods", "css", "--new-tokens", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert asked == [("llava-1.5-7b", "cpu")]
    assert list(found["cases"]) == ["vanilla", "random, keep 0.111", "css, keep 0.111"]
    assert found["cases"]["css, keep 0.111"]["phases"]["method"]["median"] > 0
    assert found["cases"]["css, keep 0.111"]["processing"] is None

    assert cli.main([*arguments, "--methods", "css", "--keep", "145", "16", "--new-tokens", "1", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["device"], found["dtype"], found["batch"], found["new_tokens"]) == ("cpu", "float32", 1, 1)
    why = "keep is 145, but an image has 144 tokens: at most 144 can stay"
    assert found["cases"]["css, keep 145"] == {"method": "css", "keep": 145, "options": {}, "failed": why}
    assert found["cases"]["css, keep 16"]["of_random"] > 0
    assert found["cases"]["css, keep 16"]["accounted"] == pytest.approx(1, abs=0.05)
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main([*arguments, "--methods", "css", "--keep", "145", "--new-tokens", "1"]) == 1
    printed = capsys.readouterr().out
    assert f"css, keep 145: {why}" in printed
    assert "of the whole" in printed
    monkeypatch.setattr(roofline, "_SIZES", {"cpu": (64, 1 << 16)})
    inside = ["--methods", "css", "--keep", "16", "--new-tokens", "1", "--limits", "--json", "--options", "layer=9"]
    assert cli.main([*arguments, *inside, "inside_tower=true"]) == 0
    found = json.loads(capsys.readouterr().out)["cases"]
    assert found["css, keep 16"]["options"] == {"layer": 9, "inside_tower": True}
    assert found["random, keep 16"]["options"] == {}
    least = [found[f"{method}, keep 16"]["least_ms"]["tower"] for method in ("random", "css")]
    assert least[1] < least[0], "two blocks with 17 rows in place of 145"
    assert cli.main([*arguments, *inside, "inside=true"]) == 2
    assert "--options inside: none of random, css has such an option" in capsys.readouterr().err
    assert cli.main([*arguments, "--methods", "cs"]) == 2
    assert "no method 'cs'; did you mean 'css'" in capsys.readouterr().err

    assert cli.main(["latency", "--batch", "0"]) == 2
    assert "--batch is 0: at least 1" in capsys.readouterr().err
    assert cli.main(["latency", "--random-weights", "--image", "x.jpg"]) == 2
    assert "--image says nothing to random weights" in capsys.readouterr().err
    assert cli.main(["latency", "--random-weights", "--prompt", "Why?"]) == 2
    assert "--prompt says nothing to random weights" in capsys.readouterr().err


@pytest.mark.parametrize(("vlm", "whole"), [("tiny-llava", 144), ("tiny-qwen", 140)])
def test_random_weights_of_a_vlm_that_is_known_by_its_files(
    vlm: str, whole: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(roofline, "_SIZES", {"cpu": (64, 1 << 16)})
    arguments = ["latency", vlm, "--random-weights", "--device", "cpu", "--repeats", "1", "--warmup", "0", "--json"]
    assert cli.main([*arguments, "--keep", "16", "500", "--new-tokens", "1", "--limits"]) == int(vlm == "tiny-llava")
    found = json.loads(capsys.readouterr().out)
    assert (found["image_tokens"], found["text_tokens"], found["random_weights"]) == (whole, 32, True)
    assert (found["image"], found["prompt"]) == ("noise", None)
    assert [found["cases"][name]["kept"] for name in ("vanilla", "random, keep 16")] == [whole, 16]
    above = found["cases"]["random, keep 500"]
    if vlm == "tiny-llava":  # each image has as many
        assert above["failed"] == "keep is 500, but an image has 144 tokens: at most 144 can stay"
    else:
        assert above["kept"] == whole
        assert above["least_ms"]["prefill"] == found["cases"]["vanilla"]["least_ms"]["prefill"]


def test_what_makes_a_measurement_is_told(tiny: list[tuple[str, object]], capsys: pytest.CaptureFixture[str]) -> None:
    once = ["--new-tokens", "1", "--repeats", "1", "--warmup", "0", "--device", "cpu", "--json"]
    found = []
    for prompt in ([], ["--prompt", "What is in the middle of the image?"]):
        assert cli.main(["latency", *prompt, *once]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert [each["prompt"] for each in found] == ["What is in the image?", "What is in the middle of the image?"]
    assert found[1]["text_tokens"] > found[0]["text_tokens"]
    assert found[0]["image"] == found[1]["image"]
    assert found[0]["threads"] == torch.get_num_threads()
    assert found[0]["versions"]["torch"] == torch.__version__
    assert found[0]["pruner"] is None


def test_latency_refuses_what_it_would_not_use(
    tiny: list[tuple[str, object]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for arguments, why in (
        (["--pruner", "x", "--methods", "css"], "--pruner is what oc-vtp prunes by, which is not among --methods css"),
        (["--device", "meta"], "device 'meta' cannot be used"),
        (["--figure", str(tmp_path / "none/x.png")], "x.png cannot be written: No such file or directory"),
        (["--bars", str(tmp_path / "file/x.svg")], "x.svg cannot be written: Not a directory"),
        (["--figure", "/proc/x.png"], "--figure /proc/x.png cannot be written"),
    ):
        assert cli.main(["latency", *arguments]) == 2
        assert why in capsys.readouterr().err
    assert tiny == [], "nothing was measured"
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_what_was_measured_is_told_before_it_is_drawn(
    tiny: list[tuple[str, object]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    once = ["--new-tokens", "1", "--repeats", "1", "--warmup", "0", "--device", "cpu"]
    monkeypatch.setattr("ocvtp.commands.common.writable", lambda *_: None)  # the folder goes while it is measured
    assert cli.main(["latency", *once, "--figure", str(tmp_path / "none/x.png")]) == 2
    told = capsys.readouterr()
    assert "first token" in told.out.replace("\n", " ") or "Phases of a first token" in told.out
    assert "x.png cannot be written: No such file or directory" in told.err


@pytest.mark.parametrize(
    ("place", "what"),
    [
        ("ocvtp.efficiency.random_vlm.random_vlm", "llava-1.5-7b and a batch of 1"),
        ("ocvtp.efficiency.roofline.Ceilings.measured", "what measures the device for --limits"),
    ],
)
def test_too_little_memory_outside_of_what_is_timed(
    place: str, what: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pipelines.tiny.llava import TinyLlava

    def full(*_: object, **__: object) -> None:
        torch.empty(1 << 60)

    monkeypatch.setattr("ocvtp.efficiency.random_vlm.random_vlm", lambda *_, **__: TinyLlava().make_model().eval())
    monkeypatch.setattr(place, full)
    assert cli.main(["latency", "llava-1.5-7b", "--random-weights", "--device", "cpu", "--limits"]) == 1
    assert capsys.readouterr().err == f"ocvtp: out of memory on cpu: there is too little for {what}\n"
