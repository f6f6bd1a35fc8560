"""Names, folders, fingerprints, and what is said when something is missing."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ocvtp.cli import main
from ocvtp.errors import BadInput, Corrupt, NotAvailable
from ocvtp.vlms import catalog, catalogue, load, resolve


@pytest.fixture
def folder(llava: Any, tmp_path: Path) -> Path:
    llava.model.save_pretrained(tmp_path / "vlm")
    llava.processor.save_pretrained(tmp_path / "vlm")
    return tmp_path / "vlm"


def test_a_folder_is_described_without_its_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("safetensors.safe_open", None)
    entry = resolve(folder)
    assert (entry.tokens, entry.grid, entry.width, entry.depth, entry.feature_layer) == (16, (4, 4), 32, 5, 4)
    assert (entry.name, entry.family, entry.revision) == (str(folder), "LlavaForConditionalGeneration", "")


def test_the_fingerprint_follows_the_weights_and_nothing_else(folder: Path) -> None:
    before = resolve(folder).weights
    (folder / "README.md").write_text("a card")
    assert resolve(folder).weights == before
    weights = load_file(folder / "model.safetensors")
    name = next(iter(weights))
    weights[name].flatten()[0] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert resolve(folder).weights != before
    weights[name].flatten()[0] -= 1


def test_the_identity_follows_every_file_that_loading_reads(folder: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tool.jinja").write_text("{{ messages }}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer_config.json", "tokenizer.json",
            "processor_config.json", "chat_template.jinja",
            "additional_chat_templates/tool.jinja"} <= there  # fmt: skip
    before = resolve(folder).identity
    for name in there:
        path = folder / name
        text = path.read_bytes()
        path.write_bytes(text + b"\n")
        changed = resolve(folder).identity
        assert {key for key in before if changed[key] != before[key]} == {"files"}, name
        assert {key for key in there if changed["files"][key] != before["files"][key]} == {name}
        path.write_bytes(text)
        assert resolve(folder).identity == before
    (folder / "README.md").write_text("a card")
    assert resolve(folder).identity == before


@pytest.mark.parametrize(("key", "value"), [("settings", {"vision_feature_layer": -3}), ("text_tower", "id@commit")])
def test_the_identity_follows_the_entry_of_the_catalogue(
    folder: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: Any
) -> None:
    entry = {"folder": str(folder)}
    monkeypatch.setattr(catalogue, "catalog", lambda: {"mine": entry, "other": {}})
    before = resolve("mine").identity
    monkeypatch.setattr(catalogue, "catalog", lambda: {"mine": {**entry, key: value}, "other": {}})
    assert resolve("mine").identity == {**before, key: value}
    monkeypatch.setattr(catalogue, "catalog", lambda: {"mine": entry, "other": {key: value}})
    assert resolve("mine").identity == before


def test_a_loaded_vlm_gives_layers_as_the_paper_counts_them(
    folder: Path, llava: Any, picture_of: Callable[..., Image.Image]
) -> None:
    vlm = load(folder)
    assert vlm.model.config.get_text_config()._attn_implementation == "sdpa"
    assert vlm.processor.tokenizer.padding_side == "left"
    assert (vlm.name, vlm.depth, vlm.width, vlm.grid) == (str(folder), 5, 32, (4, 4))
    images = vlm.preprocess([picture_of(0), picture_of(1, 80, 40)], mode="pad")
    assert vlm.grids(images) == [(4, 4), (4, 4)]
    states = llava.model.model.vision_tower(images.pixels, output_hidden_states=True).hidden_states
    found = vlm.tower(images, [3, -2, -1])
    assert list(found) == [3, -2, -1]
    for layer, index in {3: 3, -2: 4, -1: 5}.items():
        assert torch.equal(found[layer], states[index][:, 1:])
    with pytest.raises(BadInput, match="layer 6 is outside of the vision tower"):
        vlm.tower(images, [6])


def test_types_of_weights(folder: Path) -> None:
    assert load(folder).model.dtype == torch.float32
    assert load(folder, dtype="bfloat16").model.dtype == torch.bfloat16
    for wrong in ("int8", "float17"):
        with pytest.raises(BadInput, match="float32, bfloat16 or float16 is needed"):
            load(folder, dtype=wrong)


def test_what_is_missing_is_named_with_its_mend(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        BadInput, match=r"no VLM 'llava-2': a folder with a config.json, or one of tiny-llava, tiny-qwen, llava-1.5-7b"
    ):
        resolve("llava-2")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(
        NotAvailable, match=r"llava-hf/llava-1.5-7b-hf at b234b804.*`ocvtp prefetch llava-1.5-7b` fetches it"
    ):
        resolve("llava-1.5-7b")
    with pytest.raises(BadInput, match="only models of the hub have revisions"):
        resolve(folder, revision="abc")
    (folder / "model.safetensors").unlink()
    with pytest.raises(NotAvailable, match=r"holds no \*.safetensors"):
        resolve(folder)
    monkeypatch.setattr(catalogue, "catalog", lambda: {"tiny-llava": {"folder": "not_made"}})
    with pytest.raises(NotAvailable, match=r"`python -m pipelines.tiny train --model tiny-llava` makes it"):
        resolve("tiny-llava")


def test_a_model_of_the_hub_is_known_by_its_commit(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    asked: dict[str, Any] = {}

    def snapshot_download(hub: str, **options: Any) -> str:
        asked.update(options, hub=hub)
        target = tmp_path / "snapshots" / commit
        if not target.exists():
            target.parent.mkdir()
            folder.rename(target)
        return str(target)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    entry = resolve("llava-1.5-7b")
    assert (entry.revision, entry.weights, entry.budgets) == (commit, commit, (192, 128, 64))
    assert asked["local_files_only"] is True
    assert (asked["hub"], asked["revision"]) == ("llava-hf/llava-1.5-7b-hf", catalog()["llava-1.5-7b"]["revision"])
    resolve("llava-1.5-7b", revision="v2")
    assert asked["revision"] == "v2"


def test_an_unsupported_class_is_refused_with_what_is_supported(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(BadInput, match="is a GPT2LMHeadModel, which cannot be pruned; supported are LlavaFor"):
        resolve(tmp_path)


def test_every_entry_says_where_it_is_and_what_the_paper_did_with_it() -> None:
    for name, entry in catalog().items():
        assert ("hub" in entry and "revision" in entry) != ("folder" in entry), name
        commits = [entry[key].rpartition("@")[2] for key in ("revision", "text_tower") if key in entry]
        assert all(re.fullmatch("[0-9a-f]{40}", commit) for commit in commits), name
        assert set(entry["layers"]) == {9, 10, -2} | ({16} if name.startswith("qwen2.5") else set()), name
        assert len(entry["budgets"]) == 3, name
        shares = [isinstance(budget, float) for budget in entry["budgets"]]
        varies = name.startswith(("qwen", "tiny-qwen", "internvl", "llava-onevision", "smolvlm"))
        assert all(shares) if varies else not any(shares), name
    assert list(catalog()) == [
        "tiny-llava", "tiny-qwen", "llava-1.5-7b", "llava-1.5-13b", "llava-next-7b", "qwen2.5-vl-3b", "qwen2.5-vl-7b",
        "qwen3-vl-4b", "qwen3-vl-8b", "internvl3.5-8b", "llava-onevision-7b", "gemma-3-4b", "smolvlm2-2.2b",
    ]  # fmt: skip


def test_settings_of_an_entry_go_into_config_and_processor(
    make_vlm: Callable[..., Any], picture_of: Callable[..., Image.Image], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    tiny = make_vlm("llava_next")
    tiny.model.save_pretrained(tmp_path)
    tiny.processor.save_pretrained(tmp_path)
    settings = {"image_grid_pinpoints": [[112, 112]], "mm_patch_merge_type": "flat"}
    assert resolve(tmp_path).tokens is None
    monkeypatch.setattr(catalogue, "catalog", lambda: {"next": {"folder": str(tmp_path), "settings": settings}})
    vlm = load("next")
    assert (vlm.entry.tokens, vlm.entry.grid, vlm.grid) == (80, None, (20, 4))
    for size in ((56, 56), (30, 150)):
        images = vlm.preprocess([picture_of(0, *size)])
        assert (images.pixels.shape[1], vlm.family.counts(images), vlm.grids(images)) == (5, [80], [(20, 4)])
        assert vlm.tower(images, [2])[2].shape == (1, 80, 32)
    vlm.model.config.image_grid_pinpoints.append([56, 56])
    assert settings["image_grid_pinpoints"] == [[112, 112]]


def test_the_catalogues_llava_next_has_the_papers_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From what the config on the hub says of the tower (336 pixels, patches of 14) and of tiles."""
    vision = {"model_type": "clip_vision_model", "hidden_size": 1024, "image_size": 336, "patch_size": 14,
              "num_hidden_layers": 24}  # fmt: skip
    config = {
        "architectures": ["LlavaNextForConditionalGeneration"], "vision_config": vision, "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default", "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672]],
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    entry = resolve("llava-next-7b")
    assert (entry.tokens, entry.width, entry.feature_layer, entry.budgets) == (2880, 1024, 23, (640, 320, 160))
    assert resolve(tmp_path).tokens is None


def test_looking_a_folder_up_does_not_wait_for_transformers() -> None:
    code = (
        "import sys\nfrom ocvtp.vlms import resolve\n"
        "assert resolve('tiny-llava').tokens == 144\nassert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_config_that_is_no_config_is_named(folder: Path) -> None:
    (folder / "config.json").write_text('{"architectures"')
    with pytest.raises(Corrupt, match=r"config\.json is not JSON"):
        resolve(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(Corrupt, match=r"config\.json holds a list: the config of a model is needed"):
        resolve(folder)


def test_the_command_line_lists_the_catalogue(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["catalog", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["name"]: row.get("hub") for row in rows}["qwen2.5-vl-3b"] == "Qwen/Qwen2.5-VL-3B-Instruct"
    assert main(["catalog"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in catalog())
