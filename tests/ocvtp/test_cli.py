"""The command line as people meet it: exit codes, messages, JSON, and what it leaves on disk."""

import importlib.metadata
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ocvtp import cli
from ocvtp.commands import catalog, common, executors
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


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--image-tokens", "0"], "--image-tokens is 0: at least 1"),
        (["--image-tokens", "-5"], "--image-tokens is -5: at least 1"),
        (["--slots", "0"], "--slots is 0: at least 1"),
        (["--prompts", "0"], "--prompts says nothing without --answers"),
        (["--samples", "0"], "--samples says nothing without --answers"),
        (["--answers", "8", "--slots", "64"], "--slots says nothing with --answers"),
        (["--answers", "8", "--inside-tower", "0"], "--inside-tower says nothing with --answers"),
        (["--answers", "8", "--convention", "paper"], "--convention says nothing with --answers"),
        (["--answers", "0"], "images is 0"),
        (["--answers", "8", "--prompts", "0"], "prompts is 0"),
        (["--text-tokens", "-1"], "text_tokens is -1"),
    ],
)
def test_flops_refuses_what_it_would_ignore(arguments: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["flops", *arguments]) == 2
    assert why in capsys.readouterr().err


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


def test_a_vlm_may_be_named_by_its_place(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["flops", "llava-1.5-7b", "--json"], ["flops", "--vlm", "llava-1.5-7b", "--json"]):
        assert cli.main(arguments) == 0
        assert json.loads(capsys.readouterr().out)["vlm"] == "llava-1.5-7b"
    assert cli.main(["flops", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["vlm"] == "llava-1.5-7b"
