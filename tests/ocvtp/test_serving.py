"""What a served model's config may ask for, and folders for vLLM; the engine itself is asked in tests/serving."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

import ocvtp
from ocvtp import cli, vlms
from ocvtp.errors import BadInput, Incompatible, NotAvailable
from ocvtp.methods import REGISTRY
from ocvtp.pruner import OCPruner, PrunerConfig
from ocvtp.pruning.options import Options
from ocvtp.serving import vllm_plugin
from ocvtp.serving.export import export
from ocvtp.serving.section import Setting
from ocvtp.serving.vision import PrunedVision
from ocvtp.vlms import family_of
from ocvtp.vlms.families.llava_next import paper_mode
from ocvtp.vlms.images import Images

ROOT = Path(__file__).parents[2]


def setting(**section: Any) -> Setting | None:
    return Setting.of(SimpleNamespace(ocvtp=section))


def test_a_model_without_the_entry_is_not_pruned() -> None:
    assert Setting.of(SimpleNamespace()) is None
    assert Setting.of(SimpleNamespace(ocvtp=None)) is None


def test_every_method_is_served_or_refused_with_the_reason() -> None:
    reasons = {"nowhere": "prunes nothing", "inside the LLM": "between layers of the LLM"}
    served = set()
    for name, entry in REGISTRY.items():
        if entry.acts == "before the LLM" and not entry.needs_text:
            served.add(name)
            assert setting(method=name, keep=16) is not None
            continue
        with pytest.raises(BadInput, match=reasons.get(entry.acts, "reads the prompt")) as refused:
            setting(method=name, keep=16)
        assert ", random," in str(refused.value), "what can be served"
    assert {"random", "css", "qr", "oc-vtp", "oc-vtp-untrained", "visionzip", "hiprune", "tome", "divprune"} <= served


@pytest.mark.parametrize(
    ("section", "why"),
    [
        ("css", "is needed"),
        ({"keep": 16}, "has no method"),
        ({"method": "css"}, "has no keep"),
        ({"method": "cs", "keep": 16}, "no method 'cs'; did you mean 'css'"),
        ({"method": "css", "keep": 0}, "at least 1 token"),
        ({"method": "css", "keep": 1.5}, "a share outside"),
        ({"method": "css", "keep": 16, "sed": 1}, "no entry 'sed'; did you mean 'seed'"),
        ({"method": "css", "keep": 16, "seed": "a"}, "seed is 'a'"),
        ({"method": "oc-vtp", "keep": 16, "pruner": 3}, "pruner is 3"),
        ({"method": "oc-vtp", "keep": 16, "fill": "none"}, "counts them before it looks at an image"),
        ({"method": "visionzip", "keep": 16, "tiles": "floor"}, "counts them before it looks at an image"),
        ({"method": "visionzip+fastv", "keep": 16}, "between layers of the LLM"),
    ],
)
def test_what_is_wrong_is_named(section: Any, why: str) -> None:
    with pytest.raises(BadInput, match=why):
        Setting.of(SimpleNamespace(ocvtp=section))


def test_an_option_is_refused_with_the_methods_that_say_so_alone() -> None:
    assert setting(method="tome", keep=16, behaviour="reference") is not None, "another order, and as many tokens"
    with pytest.raises(BadInput, match="hiprune with behaviour='reference' may keep fewer"):
        setting(method="hiprune", keep=16, behaviour="reference")


def words_of_options() -> Iterator[tuple[str, str, Any]]:
    """Each word that an option of a method which can be served may have."""
    hints = get_type_hints(Options)
    for name, entry in REGISTRY.items():
        if entry.acts == "before the LLM" and not entry.needs_text and not entry.trained:
            for option in entry.options:
                if get_origin(hints.get(option)) is Literal:
                    yield from ((name, option, word) for word in get_args(hints[option]))


@torch.no_grad()
def test_what_may_keep_fewer_is_declared(make_vlm: Any, picture_of: Any) -> None:
    """Seven tokens of four tiles, which have none left over for some and one for others."""
    vlm, fewer, refused = make_vlm("llava_next"), set(), 0
    paper_mode(vlm.model, vlm.processor)
    pictures = vlm.prompt([[picture_of(seed, 112, 112)] for seed in range(3)])
    for name, option, word in words_of_options():
        try:
            with ocvtp.prune(vlm.model, name, 7, **{option: word}) as handle:
                if any(len(each.kept) < 7 for each in handle.embed(pictures)):
                    fewer.add((name, option, word))
        except BadInput:  # a word of another method's option of that name
            refused += 1
    assert {("css", "tiles", "floor"), ("visionzip", "behaviour", "reference")} <= fewer
    assert [each for each in fewer if each[2] not in REGISTRY[each[0]].loses.get(each[1], ())] == []
    assert refused < len(list(words_of_options())) / 2
    for name, entry in REGISTRY.items():
        assert set(entry.loses) <= set(entry.options), name


def test_a_method_that_may_always_keep_fewer_is_refused(llava: Any) -> None:
    found = setting(method="css", keep=4, layer=2)
    assert found is not None
    silent = replace(found, entry=replace(found.entry, loses={}))
    with pytest.raises(BadInput, match="css may keep fewer tokens than it is asked for"):
        silent.build(family_of(llava.model))


def test_a_pruner_lies_beside_the_weights_or_in_the_working_directory(
    llava: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have a folder of that name, of which one alone fits."""
    fits, other = (OCPruner(PrunerConfig(width, grid=(4, 4), decoder=None)).eval() for width in (32, 48))
    monkeypatch.chdir(tmp_path)
    found = setting(method="oc-vtp", keep=4, pruner="pruner", layer=2)
    assert found is not None
    monkeypatch.setattr(llava.model.config, "name_or_path", str(tmp_path / "model"), raising=False)
    fits.save_pretrained(tmp_path / "pruner")
    found.build(family_of(llava.model))
    other.save_pretrained(tmp_path / "model/pruner")
    with pytest.raises(Incompatible, match="width 48"):
        found.build(family_of(llava.model))


def test_a_vllm_that_cannot_be_installed_is_a_failure(tmp_path: Path) -> None:
    uv = shutil.which("uv")
    assert uv is not None
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "requirements-vllm.lock").write_text("vllm @ file:///nowhere/vllm-1.0-py3-none-any.whl\n")
    for name in ("requirements.lock", "pyproject.toml"):
        (tmp_path / name).touch()
    tools = tmp_path / ".venv/bin"
    tools.mkdir(parents=True)
    (tools / "uv").symlink_to(uv)
    (tools / "pytest").write_text("#!/bin/sh\necho tests ran\n")
    (tools / "pytest").chmod(0o755)
    (tmp_path / ".venv/.complete").touch()
    made = subprocess.run(["make", "serve-test"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert made.returncode != 0, made.stdout
    assert "NOT PROVEN: vLLM could not be installed" in made.stderr
    assert "tests ran" not in made.stdout
    assert not (tmp_path / ".vllm-env").exists()


def test_more_tokens_than_an_image_has_are_refused(llava: Any) -> None:
    found = setting(method="random", keep=17)
    assert found is not None
    with pytest.raises(BadInput, match="keep is 17, but an image has 16 tokens"):
        found.check("LlavaForConditionalGeneration", llava.model.config)


@pytest.mark.parametrize(("version", "fits"), [("0.32.0", True), ("0.32.1+cpu", True), ("0.31.9", False),
                                               ("0.33.0", False), ("1.32", False), ("dev", False)])  # fmt: skip
def test_versions_of_vllm(version: str, fits: bool) -> None:
    assert vllm_plugin.known(version) is fits


class Own:
    """A model as vLLM has it."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        self.prefix = prefix


def test_another_vllm_serves_its_own_models_and_refuses_to_prune(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's register alone stands in here: the real engine of the version that is known runs in tests/serving."""
    entry = SimpleNamespace(load_model_cls=lambda: Own)
    models = {"LlavaForConditionalGeneration": entry, "InternVLForConditionalGeneration": entry, "Other": entry}
    put = {}
    registry = SimpleNamespace(models=models, register_model=put.__setitem__)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__="0.33.0", ModelRegistry=registry))
    monkeypatch.setattr(vllm_plugin, "_own", {})
    vllm_plugin.register()
    assert set(put) == {"LlavaForConditionalGeneration", "InternVLForConditionalGeneration"}
    for architecture, why in (
        ("LlavaForConditionalGeneration", "this is vLLM 0.33.0, but ocvtp prunes in vLLM >= 0.32, < 0.33"),
        ("InternVLForConditionalGeneration", "ocvtp does not prune InternVLForConditionalGeneration in vLLM"),
    ):
        assert put[architecture] == f"ocvtp.serving.vllm_plugin:{architecture}"
        made = getattr(vllm_plugin, architecture)
        for section in (None, {"method": "css", "keep": 16}):
            model = SimpleNamespace(hf_config=SimpleNamespace(ocvtp=section))
            if section is None:
                assert made(vllm_config=SimpleNamespace(model_config=model), prefix="a").prefix == "a"
            else:
                with pytest.raises(NotAvailable, match=why):
                    made(vllm_config=SimpleNamespace(model_config=model))


@pytest.mark.parametrize(
    "how",
    [
        {"method": "random", "keep": 5, "seed": 3},
        {"method": "css", "keep": 0.25, "layer": 2},
        {"method": "fps", "keep": 3, "layer": 2, "inside_tower": True},
    ],
)
@torch.no_grad()
def test_what_an_engine_reads_is_what_prune_reads(llava: Any, how: dict[str, Any]) -> None:
    """Tower and projector alone, under the names of transformers, as the plugin has them in vLLM's model."""
    pixels = torch.randn(3, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    with ocvtp.prune(llava.model, **how) as handle:
        expected = handle.embed(pixels)
    found = setting(**how)
    assert found is not None
    module = SimpleNamespace(
        vision_tower=llava.model.model.vision_tower, multi_modal_projector=llava.model.model.multi_modal_projector
    )
    torch.set_default_dtype(torch.bfloat16)  # as vLLM has it while it makes a model
    try:
        vision = PrunedVision(found, "LlavaForConditionalGeneration", llava.model.config, module)
    finally:
        torch.set_default_dtype(torch.float32)
    for each, wanted in zip(vision.embed(Images(pixels)), expected, strict=True):
        assert each.kept == wanted.kept
        assert torch.equal(each.features_XD, wanted.features_XD)


def test_an_exported_folder_has_published_names_and_the_same_model(tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "out"
    assert (
        cli.main(["export-vllm", "tiny-llava", str(folder), "--method", "css", "--keep", "16", "--set", "layer=10"])
        == 0
    )
    config = json.loads((folder / "config.json").read_text())
    assert config["ocvtp"] == {"method": "css", "keep": 16, "layer": 10}
    names = set(load_file(folder / "model.safetensors"))
    own = set(load_file(vlms.resolve("tiny-llava").folder / "model.safetensors"))
    assert names == {n.replace("vision_tower.", "vision_tower.vision_model.") for n in own}
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16)
    whole = vlms.load("tiny-llava", dtype=torch.bfloat16).model.state_dict()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in model.state_dict().items())
    export(folder, tmp_path / "again")
    assert set(load_file(tmp_path / "again/model.safetensors")) == names, "what has the names keeps them"
    assert "ocvtp" not in json.loads((tmp_path / "again/config.json").read_text()), "nobody asked for pruning"
    assert cli.main(["export-vllm", "tiny-llava", str(folder)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"out", "again"}, "nothing half made is left"


def test_a_pruner_is_checked_and_lies_in_the_folder(tmp_path: Path) -> None:
    fits, other = (OCPruner(PrunerConfig(width, grid=(12, 12), decoder=None)).eval() for width in (96, 32))
    fits.save_pretrained(tmp_path / "fits")
    other.save_pretrained(tmp_path / "other")
    how = {"method": "oc-vtp", "keep": 16, "layer": 9}
    with pytest.raises(Incompatible, match="width 32"):
        export("tiny-llava", tmp_path / "wrong", {**how, "pruner": str(tmp_path / "other")})
    assert not (tmp_path / "wrong").exists()
    files = export("tiny-llava", tmp_path / "out", {**how, "pruner": str(tmp_path / "fits")})
    assert {"pruner/config.json", "pruner/model.safetensors", "config.json", "tokenizer.json"} <= set(files)
    section = json.loads((tmp_path / "out/config.json").read_text())["ocvtp"]
    assert section == {**how, "pruner": "pruner", "other_vlm": True}


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--keep", "16"], "name a --method"),
        (["--method", "fastv", "--keep", "16"], "cannot be served"),
        (["--method", "css", "--keep", "145"], "keep is 145, but an image has 144 tokens"),
        (["--method", "css", "--keep", "16", "--set", "layer"], "NAME=VALUE is needed"),
        (["--method", "css", "--keep", "16", "--set", "keep=8"], "--set keep=...: say it with --keep"),
        (["--method", "css", "--set", "pruner=x", "keep=8"], "--set keep=...: say it with --keep"),
        (["--method", "css", "--keep", "16", "--set", "method=qr"], "--set method=...: say it with --method"),
    ],
)
def test_what_cannot_be_exported_is_told(tmp_path: Path, capsys: Any, arguments: list[str], why: str) -> None:
    assert cli.main(["export-vllm", "tiny-llava", str(tmp_path / "out"), *arguments]) == 2
    assert why in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "file").touch()
    for folder, why in ((tmp_path / "file/out", "File exists"), (Path("/proc/out"), "No such file or directory")):
        assert cli.main(["export-vllm", "tiny-llava", str(folder)]) == 2
        assert f"{folder} cannot be written: {why}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]
