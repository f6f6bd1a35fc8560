"""The command line as people meet it: exit codes, messages, JSON, and what it leaves on disk."""

import importlib.metadata
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import ocvtp
from ocvtp import cli, vlms
from ocvtp.commands import catalog, common, executors
from ocvtp.data.scenes import jpeg, make_scene
from ocvtp.efficiency import roofline
from ocvtp.efficiency.flops import paper_llm_flops

COMMANDS = ("doctor", "prefetch", "show", "methods", "flops", "latency")


def run(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ocvtp.cli", *arguments],
        capture_output=True, text=True, cwd=cwd, env={**os.environ, **environment}, check=False,
    )  # fmt: skip


# --- The frame -------------------------------------------------------------------------------------------------------


def test_help_names_every_subcommand() -> None:
    done = run("--help")
    assert done.returncode == 0
    assert all(f"\n    {name} " in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_subcommand_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    assert ended.value.code == 0
    assert "--json" in capsys.readouterr().out


def test_the_frame_is_light() -> None:
    code = (
        "import sys, ocvtp.cli; ocvtp.cli.parser();"
        "print([m for m in ('torch', 'transformers', 'matplotlib', 'cluster', 'datasets') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("flops", "--keep", "577"), "keep is 577, but an image has 576 tokens"),
        (("flops", "--keep", "0"), "a count is at least 1"),
        (("flops", "--keep", "120%"), "a share more than 0 and at most 1"),
        (("flops", "--keep", "many"), "'many' is neither a count such as 48 nor a share"),
        (("flops", "--vlm", "llava"), "'llava' is neither a VLM of the catalogue"),
        (("show", "/nowhere/image.jpg"), "/nowhere/image.jpg"),
        (("show", "image.jpg", "--out", "/nowhere/kept.png"), "the folder /nowhere does not exist"),
        (("prefetch",), "nothing to fetch"),
        (("nonsense",), "nonsense"),
    ],
)
def test_bad_input_ends_in_2_with_a_message_and_no_traceback(arguments: tuple[str, ...], said: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("text", "value"), [("48", 48), ("0.333", 0.333), ("33.3%", 0.333), ("100%", 1.0), ("1.0", 1.0), ("1", 1)]
)
def test_budgets_as_people_write_them(text: str, value: float) -> None:
    assert common.keep(text) == pytest.approx(value)
    assert isinstance(common.keep(text), type(value))


# --- flops, doctor ---------------------------------------------------------------------------------------------------


def test_flops_prints_the_papers_numbers() -> None:
    found = json.loads(run("flops", "--vlm", "llava-1.5-7b", "--keep", "64", "11.1%", "--json").stdout)
    assert [row["tokens"] for row in found["rows"]] == [576, 64, 64]
    assert found["rows"][1]["paper_flops"] == paper_llm_flops(96)
    assert round(found["rows"][1]["flops"]["total"] / 1e12, 2) == 1.62
    table = run("flops", "--vlm", "llava-1.5-7b", "--keep", "64").stdout
    assert "6.314T" in table
    assert "971.2G" in table
    assert "…" not in table


@pytest.mark.parametrize(
    ("name", "keep", "printed"),
    [
        ("llava-1.5-7b", "64", [["576", "6.31T", "8.07T", "+28%", "-", "-"],
                                ["64", "0.97T", "1.25T", "+29%", "5.97G", "5.96G", "-0%"]]),
        ("llava-next-7b", "160", [["2880", "33.76T", "42.16T", "+25%", "-", "-"],
                                  ["160", "1.95T", "2.51T", "+28%", "23.82G", "27.75G", "+16%"]]),
    ],
)  # fmt: skip
def test_flops_as_table_4_of_the_paper_has_them(
    name: str, keep: str, printed: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["flops", name, "--keep", keep, "--convention", "paper"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line for line in lines if line and line[0] in ("576", "64", "2880", "160")] == printed
    assert ["The", "paper", "counts", "the", "language", "model", "alone,"] in [line[:7] for line in lines]


def test_flops_in_truth_alone_has_no_column_of_the_paper(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["flops", "llava-1.5-7b", "--keep", "64", "--convention", "true"]) == 0
    assert "paper" not in capsys.readouterr().out


def test_doctor_says_what_is_wrong_and_how_to_mend_it() -> None:
    done = run("doctor", "--json", PATH="/nowhere")
    found = {(f["part"], f["name"]): f for f in json.loads(done.stdout)["findings"]}
    assert found["Packages", "torch"]["detail"] == importlib.metadata.version("torch")
    assert found["Executors", "slurm"]["state"] == "missing"
    assert found["Executors", "local"]["state"] == "ok"
    assert {part for part, _ in found} >= {"Machine", "Packages", "VLMs", "Benchmarks", "Executors", "Disk"}
    assert all(f["mend"] for f in found.values() if f["state"] == "missing")
    assert done.returncode == int(any(f["needed"] and f["state"] == "missing" for f in found.values()))


# --- executors, store ------------------------------------------------------------------------------------------------


@pytest.fixture
def bin_of(tmp_path: Path) -> Callable[..., str]:
    """A PATH with commands that say something; those of None fail."""

    def make(**commands: str | None) -> str:
        folder = tmp_path / "bin"
        folder.mkdir()
        for name, says in commands.items():
            (folder / name).write_text("#!/bin/sh\n" + ("exit 1" if says is None else f"printf '{says}'") + "\n")
            (folder / name).chmod(0o755)
        return str(folder)

    return make


@pytest.mark.parametrize(
    ("sinfo", "sacct", "state", "detail"),
    [
        ("gpu 3 idle\\nold 2 down*\\n", "", "ok", "nodes are up in gpu; states from squeue and sacct"),
        ("gpu 3 mix-\\n", None, "ok", "no accounting: states from squeue alone"),
        ("gpu 3 down*\\n", None, "warning", "no node is up: gpu 3 down*"),
        (None, None, "warning", "the controller does not answer"),
    ],
)
def test_doctor_asks_slurm(
    bin_of: Callable[..., str], monkeypatch: pytest.MonkeyPatch, sinfo: str, sacct: str, state: str, detail: str
) -> None:
    monkeypatch.setenv("PATH", bin_of(sbatch="", squeue="", scancel="", sinfo=sinfo, sacct=sacct), prepend=":")
    found = executors.slurm()
    assert found[0] == state
    assert detail in found[1]


def test_doctor_asks_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert executors.ray()[0] == "ok"
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert executors.ray()[:1] == ("ok",)
    state, detail, mend = executors.ray()
    assert (state, bool(mend)) == ("warning", True)
    assert f"no cluster answers at {address}" in detail
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    assert "where a driver cannot connect" in executors.ray()[1]


@pytest.mark.parametrize("arguments", [("verify",), ("clean", "--yes", "--store", "/nowhere"), ("verify", "--help")])
def test_the_store_is_looked_after_elsewhere(arguments: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"`python -m pipelines {arguments[0]}`" in done.stderr
    assert "Traceback" not in done.stderr


# --- prefetch --------------------------------------------------------------------------------------------------------


def test_prefetch_knows_what_is_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    revision = "a" * 40
    here = tmp_path / "models--org--here" / "snapshots" / revision
    here.mkdir(parents=True)
    (here / "config.json").write_text("{}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    items = [catalog.Item("here", "model", "org/here", revision), catalog.Item("away", "model", "org/away", revision)]
    monkeypatch.setattr(catalog, "vlms", lambda: items)
    monkeypatch.setattr(catalog, "datasets", list)
    assert cli.main(["prefetch", "--list", "--json"]) == 0
    rows = {row["name"]: row["path"] for row in json.loads(capsys.readouterr().out)}
    assert rows == {"here": str(here), "away": None}
    assert cli.main(["prefetch", "hree"]) == 2
    assert "'hree' is not in the catalogues; there are: here, away" in capsys.readouterr().err


def test_prefetch_fetches_weights_but_no_pickles(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def download(repo: str, **options: object) -> str:
        asked.update(options, repo=repo)
        return "/cache/there"

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr(catalog, "vlms", lambda: [catalog.Item("vlm", "model", "org/vlm", "b" * 40)])
    monkeypatch.setattr(catalog, "datasets", list)
    assert cli.main(["prefetch", "vlm"]) == 0
    assert asked["revision"] == "b" * 40
    assert "*.safetensors" in asked["allow_patterns"]
    assert not any("bin" in pattern or "pt" in pattern for pattern in asked["allow_patterns"])


def test_a_hub_out_of_reach_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    def download(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("cannot find the files")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr(catalog, "vlms", lambda: [catalog.Item("vlm", "model", "org/vlm", None)])
    monkeypatch.setattr(catalog, "datasets", list)
    assert cli.main(["prefetch", "vlm"]) == 1
    assert "org/vlm could not be fetched: cannot find the files" in capsys.readouterr().err


# --- show, latency ---------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, object]]:
    """A tiny random LLaVA, and a `prune` that notes how it was called and keeps the first tokens."""
    from pipelines.tiny.llava import TinyLlava

    torch.manual_seed(0)
    vlm = SimpleNamespace(model=TinyLlava().make_model().eval(), processor=TinyLlava().make_processor())
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
        first = {name: each["first_token"]["median"] for name, each in found.items()}
        assert case["processing"]["median"] > 0
    assert found["random, keep 16"]["of_vanilla"] == first["random, keep 16"] / first["vanilla"]
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
    assert 0.3 < found["cases"]["css, keep 16"]["accounted"] < 3
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

    assert cli.main(["latency", "--batch", "2"]) == 2
    assert "--batch 2 is of --random-weights" in capsys.readouterr().err
    assert cli.main(["latency", "--random-weights", "--image", "x.jpg"]) == 2
    assert "leave one of the two out" in capsys.readouterr().err
    monkeypatch.undo()
    assert cli.main(["latency", "tiny-llava", "--random-weights", "--device", "cpu"]) == 2
    assert "no shape is known for the VLM 'tiny-llava'" in capsys.readouterr().err


def test_a_vlm_may_be_named_by_its_place(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["flops", "llava-1.5-7b", "--json"], ["flops", "--vlm", "llava-1.5-7b", "--json"]):
        assert cli.main(arguments) == 0
        assert json.loads(capsys.readouterr().out)["vlm"] == "llava-1.5-7b"
    assert cli.main(["flops", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["vlm"] == "llava-1.5-7b"
