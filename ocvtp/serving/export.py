"""A folder that vLLM reads: the files of a VLM, its weights under published names, and how it is pruned.

transformers 5 saves a CLIP or SigLIP tower of LLaVA as `vision_tower.encoder...`; what is published, and what vLLM
looks for, is `vision_tower.vision_model.encoder...`. Other names are the same. What the catalogue sets in a VLM's
config stands in the config of the folder, and a pruner lies beside the weights it was checked against.
"""

import copy
import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ocvtp.errors import BadInput
from ocvtp.json_files import read_json
from ocvtp.serving.section import SECTION, Setting
from ocvtp.serving.vllm_plugin import MODELS
from ocvtp.vlms.catalogue import CatalogEntry, resolve
from ocvtp.vlms.families import family_class

PRUNER = "pruner"
"""Folder of the pruner in such a folder."""
_COPIED = ("*.json", "*.model", "*.txt", "*.jinja", "additional_chat_templates/*.jinja")
_TOWERS = {
    "LlavaForConditionalGeneration": re.compile(r"^((?:model\.)?vision_tower\.)(?!vision_model\.)"),
    "LlavaNextForConditionalGeneration": re.compile(r"^((?:model\.)?vision_tower\.)(?!vision_model\.)"),
}
"""By architecture, what is renamed: `vision_model.` goes behind it."""


def export(vlm: str | Path, folder: str | Path, section: Mapping[str, Any] | None = None) -> list[str]:
    """Write a VLM for vLLM.

    Args:
        vlm: name of the catalogue, or a folder.
        folder: to be made; it must not be there yet, or be empty.
        section: `{"method": "oc-vtp", "keep": 64, "pruner": FOLDER}` or the like, in place of one that the VLM has;
            None: the model is not pruned.

    Returns:
        Names of the files in it.

    Raises:
        BadInput: a folder that is in use or cannot be written, a method that cannot be served, tokens or options that
            are wrong.
        Incompatible: a pruner of another VLM.
        NotAvailable: no such weights, or no such pruner, on this machine.
    """
    entry, folder = resolve(vlm), Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadInput(f"{folder} is there already: name a folder to be made")
    config = {**read_json(entry.folder / "config.json"), **copy.deepcopy(dict(entry.settings))}
    config.pop(SECTION, None)
    if section is not None:
        config[SECTION] = dict(section)
        if entry.family not in MODELS:
            raise BadInput(f"{entry.name} is a {entry.family}: pruned in vLLM are {', '.join(MODELS)} alone")
    pruner = None if section is None else _checked(entry, config)
    try:
        _write_all(entry, folder, config, pruner)
    except OSError as error:
        raise BadInput(f"{folder} cannot be written: {error.strerror} ({error.filename})") from error
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _write_all(entry: CatalogEntry, folder: Path, config: dict[str, Any], pruner: Any) -> None:
    """The folder, whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as made:
        whole = Path(made) / folder.name
        whole.mkdir()
        _copy_files(entry, whole)
        if pruner is not None:
            pruner.save_pretrained(whole / PRUNER)
            # What it was trained for was compared with the VLM that this folder is made of.
            config[SECTION] |= {"pruner": PRUNER, "other_vlm": True}
        _write(whole / "config.json", config)
        _write_weights(entry, whole)
        if folder.exists():
            folder.rmdir()
        whole.rename(folder)


def _checked(entry: CatalogEntry, config: Mapping[str, Any]) -> Any:
    """The pruner, if the method has one."""
    from transformers import AutoConfig

    from ocvtp.pruner import OCPruner

    loaded = AutoConfig.for_model(config["model_type"], **{k: v for k, v in config.items() if k != "model_type"})
    setting = Setting.of(loaded)
    assert setting is not None  # noqa: S101 - its section was just put there
    setting.check(entry.family, loaded)
    loaded.name_or_path = str(entry.folder)
    family = family_class(entry.family, entry.name)(SimpleNamespace(config=loaded, model=None, ocvtp_entry=entry))
    setting.build(family)
    pruner = setting.pruner_of(entry.folder)
    return None if pruner is None else OCPruner.from_pretrained(pruner, decoder=False)


def _copy_files(entry: CatalogEntry, folder: Path) -> None:
    """All but config and weights; what the catalogue sets goes into the processor's config too."""
    for path in (path for pattern in _COPIED for path in entry.folder.glob(pattern)):
        if path.name == "config.json" or path.name.endswith(".index.json"):
            continue
        target = folder / path.relative_to(entry.folder)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
        if path.name in ("processor_config.json", "preprocessor_config.json"):
            _set(target, entry.settings)


def _set(path: Path, settings: Mapping[str, Any]) -> None:
    """Settings that a processor's config has too."""
    written = read_json(path)
    for part in (written, written.get("image_processor", {})):
        part |= {name: value for name, value in settings.items() if name in part}
    _write(path, written)


def _write_weights(entry: CatalogEntry, folder: Path) -> None:
    """File by file, so that no more than one of them is in memory."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    rename = _TOWERS.get(entry.family)

    def named(name: str) -> str:
        return rename.sub(r"\1vision_model.", name) if rename else name

    for path in sorted(entry.folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            if all(named(name) == name for name in names):
                shutil.copyfile(path, folder / path.name)
                continue
            save_file({named(n): file.get_tensor(n) for n in names}, folder / path.name, metadata=file.metadata())
    for path in entry.folder.glob("*.safetensors.index.json"):
        index = read_json(path)
        index["weight_map"] = {named(name): file for name, file in index["weight_map"].items()}
        _write(folder / path.name, index)


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
