"""Pruners on disk: config.json and model.safetensors. No pickle."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from ocvtp.errors import BadInput, Corrupt, Incompatible, NotAvailable
from ocvtp.json_files import read_json
from ocvtp.pruner.config import PrunerConfig, from_dict
from ocvtp.pruner.provenance import TrainedFor

CONFIG: Final = "config.json"
WEIGHTS: Final = "model.safetensors"
KIND: Final = "ocvtp-pruner"
_DECODER: Final = "decoder."
Module = TypeVar("Module", bound=nn.Module)


class Saved(Protocol):
    """What is saved of a pruner."""

    config: PrunerConfig
    trained_for: TrainedFor

    def state_dict(self) -> dict[str, Tensor]:
        """Its weights by name."""


def save(pruner: Saved, folder: Path, *, include_decoder: bool = True) -> None:
    """Write both files, each whole or not at all; equal pruners make equal bytes."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in pruner.state_dict().items()}
    config = pruner.config
    if not include_decoder:
        config = replace(config, decoder=None)
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(_DECODER)}
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / WEIGHTS, to_bytes(tensors, {"format": "pt"}))
    record = {"model_type": KIND, **config.to_dict(), **pruner.trained_for.to_dict()}
    write_whole(folder / CONFIG, (json.dumps(record, indent=2) + "\n").encode())


def load(
    make: Callable[[PrunerConfig, TrainedFor], Module],
    name: Path | str,
    *,
    decoder: bool,
    device: torch.device | str,
    revision: str | None,
) -> Module:
    """Read both files into what `make` makes; see `OCPruner.from_pretrained`."""
    folder = _folder(name, revision)
    config, trained_for = read_config(folder / CONFIG)
    path = folder / WEIGHTS
    tensors = read_tensors(path, skip=None if decoder else _DECODER)
    if not decoder:
        config = replace(config, decoder=None)
    with torch.device("meta"):
        pruner = make(config, trained_for)
    check_tensors(str(path), tensors, {key: tuple(t.shape) for key, t in pruner.state_dict().items()})
    pruner = pruner.to_empty(device=device)
    pruner.load_state_dict(tensors)
    return pruner.to(next(iter(tensors.values())).dtype).eval()


def read_config(path: Path) -> tuple[PrunerConfig, TrainedFor]:
    """What a pruner is made of, and what it was trained for.

    Raises:
        NotAvailable: there is no such file.
        Corrupt: it is no JSON.
        Incompatible: it is the config of something else, or has unknown keys or values.
    """
    try:
        record = read_json(path)
    except FileNotFoundError as error:
        raise NotAvailable(f"{path} does not exist: a pruner is a folder with {CONFIG} and {WEIGHTS}") from error
    if not isinstance(record, dict) or record.pop("model_type", None) != KIND:
        raise Incompatible(f"{path} is not the config of a pruner: its model_type should be {KIND!r}")
    names = {field.name for field in fields(TrainedFor)}
    try:
        trained_for = from_dict(TrainedFor, {k: v for k, v in record.items() if k in names}, str(path))
        return PrunerConfig.from_dict({k: v for k, v in record.items() if k not in names}), trained_for
    except BadInput as error:
        raise Incompatible(f"{path}: {error}") from error


def read_tensors(path: Path, skip: str | None = None) -> dict[str, Tensor]:
    """All tensors of a safetensors file but those whose names begin with `skip`.

    Raises:
        NotAvailable: there is no such file.
        Corrupt: it is damaged or half-written.
    """
    try:
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if skip is None or not name.startswith(skip)]  # noqa: SIM118
            return {name: file.get_tensor(name) for name in names}
    except FileNotFoundError as error:
        raise NotAvailable(f"{path} does not exist") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise Corrupt(f"{path} is damaged or half-written ({error}): train or download the pruner again") from error


def check_tensors(where: str, found: dict[str, Tensor], wanted: dict[str, tuple[int, ...]]) -> None:
    """Names and shapes must be as wanted; `Incompatible` lists every one that is not."""
    wrong = [f"{name} is missing" for name in wanted if name not in found]
    wrong += [f"{name} is not part of it" for name in found if name not in wanted]
    wrong += [
        f"{name} is {list(tensor.shape)}, should be {list(wanted[name])}"
        for name, tensor in found.items()
        if name in wanted and tuple(tensor.shape) != wanted[name]
    ]
    wrong += [f"{name} is {t.dtype}, not floating" for name, t in found.items() if not t.is_floating_point()]
    if wrong:
        raise Incompatible(f"{where} does not fit this pruner:\n  " + "\n  ".join(wrong))


def fingerprint(pruner: Saved) -> str:
    """SHA-256 over the config and the weights, without the decoder's."""
    config: dict[str, Any] = replace(pruner.config, decoder=None).to_dict()
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted(pruner.state_dict().items()):
        if not name.startswith(_DECODER):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_whole(path: Path, data: bytes) -> None:
    """Put `data` at `path` in one step: whoever looks sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _folder(name: Path | str, revision: str | None) -> Path:
    folder = Path(name)
    if folder.is_dir():
        return folder
    if isinstance(name, Path) or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise NotAvailable(f"there is no folder {name}: a pruner is a folder with {CONFIG} and {WEIGHTS}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=[CONFIG, WEIGHTS]))
    except Exception as error:  # the hub's client raises errors of several packages
        raise NotAvailable(f"{name} is no folder, and the hub did not give it: {error}") from error
