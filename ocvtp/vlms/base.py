"""VLMs by name: what the catalogue says of them, and how they are loaded.

Letters: I images, N tokens of an image without CLS, C tower width.
"""

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ocvtp.errors import BadInput, NotAvailable
from ocvtp.vlms.family import Facts, Family, Grid, Images
from ocvtp.vlms.llava import LlavaFamily

FAMILIES: Mapping[str, type[Family]] = {"LlavaForConditionalGeneration": LlavaFamily}
"""Classes of transformers that can be pruned."""
_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


@dataclass(frozen=True)
class Entry:
    """What is known of a VLM without loading its weights.

    Attributes:
        name: as in params.yaml: of the catalogue, or a folder.
        family: class of transformers.
        folder: where its files are.
        revision: commit on the hub; "" for a folder.
        weights: what tells its weights from others: the commit, or for a folder their SHA-256.
        facts: of the tower.
        budgets: the paper's: tokens an image, or shares where the number of tokens varies.
    """

    name: str
    family: str
    folder: Path
    revision: str
    weights: str
    facts: Facts
    budgets: tuple[int | float, ...]

    @property
    def tokens(self) -> int | None:
        """N; None where it depends on the image."""
        return self.facts.tokens

    @property
    def grid(self) -> Grid | None:
        """Rows and columns of an image's tokens; None where they depend on the image."""
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


@cache
def catalog() -> Mapping[str, Mapping[str, Any]]:
    """The entries of catalog.yaml by name."""
    entries: dict[str, Mapping[str, Any]] = yaml.safe_load(files(__package__).joinpath("catalog.yaml").read_text())
    return entries


def resolve(name: str | Path, *, revision: str | None = None) -> Entry:
    """Look a VLM up, by catalogue name or folder, without loading weights.

    Args:
        name: of the catalogue, or a folder with a model of transformers.
        revision: on the hub, instead of the catalogue's.

    Raises:
        BadInput: neither a name of the catalogue nor a folder with a supported model.
        NotAvailable: its weights are not on this machine; says how to get them.
    """
    from transformers import AutoConfig

    name = str(name)
    folder, commit = _locate(name, revision)
    config = AutoConfig.from_pretrained(folder)
    architecture = (config.architectures or ["model without a named class"])[0]
    return Entry(
        name=name,
        family=architecture,
        folder=folder,
        revision=commit,
        weights=commit or _weights_digest(folder),
        facts=_family_class(architecture, name).facts_of(config),
        budgets=tuple(catalog().get(name, {}).get("budgets", ())),
    )


def _family_class(architecture: str, name: str) -> type[Family]:
    if architecture not in FAMILIES:
        raise BadInput(f"{name} is a {architecture}, which cannot be pruned; supported are {', '.join(FAMILIES)}")
    return FAMILIES[architecture]


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
            raise NotAvailable(f"{name} is not in {folder}: `python -m ocvtp.vlms.tiny train` makes it")
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


def _weights_digest(folder: Path) -> str:
    """SHA-256 of the weights in a folder: of names and digests of its files."""
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise NotAvailable(f"{folder} holds no *.safetensors: save the model with `save_pretrained`")
    digest = hashlib.sha256()
    for path in paths:
        state = path.stat()
        digest.update(f"{path.name} {_file_digest(path, state.st_size, state.st_mtime_ns)}\n".encode())
    return digest.hexdigest()


@cache
def _file_digest(path: Path, size: int, changed: int) -> str:
    """SHA-256 of a file, read once as long as size and time of change stay."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class VLM:
    """A loaded VLM."""

    entry: Entry
    model: Any
    processor: Any
    family: Family

    @property
    def name(self) -> str:
        """In the catalogue, or its folder."""
        return self.entry.name

    @property
    def revision(self) -> str:
        """Commit on the hub; "" for a folder."""
        return self.entry.revision

    @property
    def weights(self) -> str:
        """What tells its weights from others."""
        return self.entry.weights

    @property
    def depth(self) -> int:
        """Encoder blocks of the tower."""
        return self.entry.depth

    @property
    def width(self) -> int:
        """C."""
        return self.entry.width

    @property
    def grid(self) -> Grid | None:
        """Rows and columns of an image's tokens; None where they depend on the image."""
        return self.entry.grid

    def preprocess(self, images: list[Image.Image], *, mode: str = "pad") -> Images:
        """Images for the tower: padded to the shape that it wants, or squashed into it."""
        return self.family.preprocess(self.processor, images, mode=mode)

    def grids(self, images: Images) -> list[Grid]:
        """Rows and columns of tokens of each image."""
        return self.family.grids(images)

    def tower(self, images: Images, layers: Collection[int]) -> dict[int, Tensor]:
        """Tokens of each layer, [I, N, C] without CLS, in one pass that stops after the deepest layer.

        Args:
            images: as `preprocess` makes them.
            layers: counted as in the paper: 9 is `hidden_states[9]`, -1 the last block's output.

        Returns:
            By layer as given. An image with fewer tokens than others is padded with zeros at the end.
        """
        indices = {layer: self.family.index(layer) for layer in layers}
        with torch.inference_mode():
            vision = self.family.look(images, set(indices.values()), values=False)
            everyone = range(len(images))
            if len(set(vision.counts)) == 1:
                return {layer: vision.tokens(index, everyone) for layer, index in indices.items()}
            return {
                layer: pad_sequence([vision.tokens(index, [i])[0] for i in everyone], batch_first=True)
                for layer, index in indices.items()
            }


def load(
    name: str | Path,
    *,
    revision: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
) -> VLM:
    """Load a VLM with its processor, ready for inference: SDPA attention, padding on the left.

    Args:
        name: of the catalogue, or a folder.
        revision: on the hub, instead of the catalogue's.
        device: where to put it.
        dtype: of the weights, such as `torch.bfloat16` or "float16"; None: float32 on a CPU, else bfloat16.

    Raises:
        BadInput: unknown name, unsupported model or dtype.
        NotAvailable: the weights are not on this machine; says how to get them.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    entry = resolve(name, revision=revision)
    wanted = _dtype(dtype, torch.device(device))
    model = AutoModelForImageTextToText.from_pretrained(entry.folder, dtype=wanted, attn_implementation="sdpa")
    processor = AutoProcessor.from_pretrained(entry.folder)
    processor.tokenizer.padding_side = "left"
    model = model.to(device).eval()
    model.ocvtp_entry = entry
    return VLM(entry, model, processor, family_of(model))


def _dtype(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    if dtype is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise BadInput(f"dtype {dtype!r}: float32, bfloat16 or float16 is needed")
    return found


def family_of(model: Any) -> Family:
    """The adapter of a loaded model; `BadInput` says which classes are supported."""
    name = next((c.__name__ for c in type(model).__mro__ if c.__name__ in FAMILIES), type(model).__name__)
    return _family_class(name, "this model")(model)
