"""VLMs by name: what the catalogue and their files say of them, before weights are loaded.

Letters: N tokens of an image without CLS, C tower width.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml

from ocvtp.errors import BadInput, Corrupt, NotAvailable
from ocvtp.json_files import read_json
from ocvtp.vlms.families import family_class
from ocvtp.vlms.family import Family
from ocvtp.vlms.images import Facts, Grid

DATA_IN_SPECS = ("catalog.yaml",)
"""Keys hold the entry of the VLM (`CatalogEntry.identity`), not the whole catalogue (`cluster.fingerprint`)."""
_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
"""What loading reads of a model; below the folder, only `additional_chat_templates/` is looked into."""


@dataclass(frozen=True)
class CatalogEntry:
    """What is known of a VLM without loading its weights.

    Attributes:
        name: as in params.yaml: of the catalogue, or a folder.
        family: class of transformers.
        folder: where its files are.
        revision: commit on the hub; "" for a folder.
        weights: what tells its weights from others: the commit, or for a folder their SHA-256.
        facts: of the tower.
        budgets: the paper's: tokens an image, or shares where the number of tokens varies.
        settings: entries of the config that are other than in its files.
        files: SHA-256 of each file that loading reads; empty where a commit on the hub stands for them.
    """

    name: str
    family: str
    folder: Path
    revision: str
    weights: str
    facts: Facts
    budgets: tuple[int | float, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def text_tower(self) -> str | None:
        """The whole CLIP whose vision tower this VLM has, as ID@COMMIT of the hub; None if the catalogue names none."""
        named: str | None = catalog().get(self.name, {}).get("text_tower")
        return named

    @property
    def identity(self) -> dict[str, Any]:
        """All that determines what the VLM computes, as JSON."""
        return {
            "revision": self.revision,
            "files": dict(self.files),
            "settings": dict(self.settings),
            "text_tower": self.text_tower,
        }

    @property
    def tokens(self) -> int | None:
        """N; None where it depends on the image."""
        return self.facts.tokens

    @property
    def grid(self) -> Grid | None:
        """Rows and columns of an image's tokens; None where they depend on the image, or are more than one grid."""
        return self.facts.grid

    @property
    def width(self) -> int:
        """C."""
        return self.facts.width

    @property
    def depth(self) -> int:
        """Encoder blocks of the tower."""
        return self.facts.depth

    @property
    def feature_layer(self) -> int:
        """The layer that the language model is fed from, as index into `hidden_states`."""
        return self.facts.feature_layer

    @property
    def llm_layers(self) -> int:
        """Layers of the language model."""
        return _llm_layers(self.folder)


@cache
def catalog() -> Mapping[str, Mapping[str, Any]]:
    """The entries of catalog.yaml by name."""
    entries: dict[str, Mapping[str, Any]] = yaml.safe_load(files(__package__).joinpath("catalog.yaml").read_text())
    return entries


def resolve(name: str | Path, *, revision: str | None = None) -> CatalogEntry:
    """Look a VLM up, by catalogue name or folder, without loading weights.

    Does without transformers, which takes seconds to import, where the config's file says all that is asked of it.

    Args:
        name: of the catalogue, or a folder with a model of transformers.
        revision: on the hub, instead of the catalogue's.

    Raises:
        BadInput: neither a name of the catalogue nor a folder with a supported model.
        NotAvailable: its weights are not on this machine; says how to get them.
        Corrupt: its config.json cannot be read.
    """
    name = str(name)
    folder, commit = _locate(name, revision)
    known = catalog().get(name, {})
    written, settings = _written(folder), known.get("settings", {})
    architecture = (written.get("architectures") or ["model without a named class"])[0]
    return CatalogEntry(
        name=name,
        family=architecture,
        folder=folder,
        revision=commit,
        weights=commit or _weights_digest(folder),
        facts=_facts(family_class(architecture, name), folder, written, settings),
        budgets=tuple(known.get("budgets", ())),
        settings=settings,
        files={} if commit else _sums(folder),
    )


def _written(folder: Path) -> dict[str, Any]:
    """What stands in a folder's config.json."""
    path = folder / "config.json"
    found = read_json(path)
    if not isinstance(found, dict):
        raise Corrupt(f"{path} holds a {type(found).__name__}: the config of a model is needed")
    return found


class _Unwritten(AttributeError):
    """An entry that a config.json leaves to the defaults of transformers."""


class _Written(SimpleNamespace):
    """A config as it is written."""

    def __init__(self, entries: Mapping[str, Any]) -> None:
        there = {name: value for name, value in entries.items() if value is not None}
        super().__init__(**{n: _Written(v) if isinstance(v, dict) else v for n, v in there.items()})

    def __getattr__(self, name: str) -> Any:
        raise _Unwritten(name)


def _facts(family: type[Family], folder: Path, written: Mapping[str, Any], settings: Mapping[str, Any]) -> Facts:
    """From the config's file alone where it says all that is needed."""
    try:
        return family.facts_of(_Written({**written, **settings}))
    except _Unwritten:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(folder)
        for name, value in settings.items():
            setattr(config, name, value)
        return family.facts_of(config)


@cache
def _llm_layers(folder: Path) -> int:
    written = _written(folder)
    found = written.get("text_config", written).get("num_hidden_layers")
    if found is None:
        from transformers import AutoConfig

        found = AutoConfig.from_pretrained(folder).get_text_config().num_hidden_layers
    return int(found)


def _locate(name: str, revision: str | None) -> tuple[Path, str]:
    """Folder and commit."""
    entry = catalog().get(name)
    if entry is None:
        if (Path(name) / "config.json").is_file():
            if revision is not None:
                raise BadInput(f"revision {revision!r} of the folder {name}: only models of the hub have revisions")
            return Path(name), ""
        raise BadInput(f"no VLM {name!r}: a folder with a config.json, or one of {', '.join(catalog())}, is needed")
    if "folder" in entry:
        folder = Path(str(files(__package__).joinpath(entry["folder"])))
        if not (folder / "config.json").is_file():
            raise NotAvailable(f"{name} is not in {folder}: `python -m pipelines.tiny train --model {name}` makes it")
        return folder, ""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    wanted = revision or entry["revision"]
    try:
        folder = Path(snapshot_download(entry["hub"], revision=wanted, allow_patterns=_FILES, local_files_only=True))
    except (LocalEntryNotFoundError, FileNotFoundError) as error:
        raise NotAvailable(
            f"{name} ({entry['hub']} at {wanted}) is not on this machine: `ocvtp prefetch {name}` fetches it"
        ) from error
    if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
        raise NotAvailable(f"{name} ({entry['hub']}) is not complete in {folder}: `ocvtp prefetch {name}` mends it")
    return folder, folder.name


def weights_of(model: Any, *, read: bool) -> str | None:
    """What tells a loaded model's weights from others, as `CatalogEntry.weights`; None if nobody can say.

    Args:
        model: of `ocvtp.vlms.load`, or any of transformers: its config knows the commit, or the folder.
        read: whether to read all the weights in that folder, once.
    """
    entry: CatalogEntry | None = getattr(model, "ocvtp_entry", None)
    if entry is not None:
        return entry.weights
    commit, folder = getattr(model.config, "_commit_hash", None), Path(model.config.name_or_path or "/nowhere")
    if commit is None and read and list(folder.glob("*.safetensors")):
        return _weights_digest(folder)
    return commit


def _weights_digest(folder: Path) -> str:
    """SHA-256 of the weights in a folder: of names and digests of its files."""
    sums = _sums(folder, ("*.safetensors",))
    if not sums:
        raise NotAvailable(f"{folder} holds no *.safetensors: save the model with `save_pretrained`")
    return hashlib.sha256("".join(f"{name} {digest}\n" for name, digest in sums.items()).encode()).hexdigest()


def _sums(folder: Path, patterns: Iterable[str] = (*_FILES, "additional_chat_templates/*.jinja")) -> dict[str, str]:
    """SHA-256 of the files of a folder that match, by name."""
    found = {path: path.stat() for pattern in patterns for path in folder.glob(pattern)}
    return {
        path.relative_to(folder).as_posix(): _file_digest(path, state.st_size, state.st_mtime_ns)
        for path, state in sorted(found.items())
    }


@cache
def _file_digest(path: Path, size: int, changed: int) -> str:
    """SHA-256 of a file, read once as long as size and time of change stay."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
