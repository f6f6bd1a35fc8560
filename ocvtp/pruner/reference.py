"""The authors' checkpoints: their names and shapes, and the way to ours and back."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from ocvtp.errors import BadInput, Corrupt, Incompatible, NotAvailable
from ocvtp.pruner.config import PrunerConfig
from ocvtp.pruner.pretrained import Module, Saved, check_tensors

NAMES: Final = {
    # Ours: theirs, by their beginnings.
    "project.norm.": "encode_project.mlp.0.",
    "project.up.": "encode_project.mlp.1.",
    "project.down.": "encode_project.mlp.4.",
    "queries.mean": "initializ.mean",
    "queries.log_std": "initializ.logstd",
    "slot_attention.norm_tokens.": "aggregat.norm_in.",
    "slot_attention.norm_slots.": "aggregat.norm_slots_0.",
    "slot_attention.norm_ffn.": "aggregat.norm_slots_1.",
    "slot_attention.to_q.": "aggregat.proj_q.",
    "slot_attention.to_k.": "aggregat.proj_k.",
    "slot_attention.to_v.": "aggregat.proj_v.",
    "slot_attention.gru.": "aggregat.gru.",
    "slot_attention.ffn.up.": "aggregat.ffn.mlp.0.",
    "slot_attention.ffn.down.": "aggregat.ffn.mlp.3.",
    "decoder.mask_token": "decode.mask_token",
    "decoder.positions.table": "decode.posit_embed._pe",
    "decoder.project_tokens.linear.": "decode.project1.project.",
    "decoder.project_tokens.norm.": "decode.project1.norm.",
    "decoder.project_slots.linear.": "decode.project2.project.",
    "decoder.project_slots.norm.": "decode.project2.norm.",
    "decoder.transformer.norm.": "decode.norm0.",
    "decoder.transformer.layers.": "decode.backbone.layers.",
}
_DECODER: Final = "decode."


def reference_config(**options: Any) -> PrunerConfig:
    """The authors' pruner for LLaVA-1.5 (width 1024, 576 tokens); options replace parts of it."""
    return PrunerConfig(**{"token_dim": 1024, "behaviour": "reference", **options})


def load(make: Callable[[PrunerConfig], Module], path: Path | str, config: PrunerConfig | None = None) -> Module:
    """A pruner from the authors' `weights.pth`, in evaluation mode; no code in the file is run.

    Args:
        make: makes the pruner.
        path: a state dict of 69 tensors, or the pruner's 25 alone (it then has no decoder), by itself or as
            `state_dict` of a dict.
        config: of a pruner of another size; the authors' unless given.

    Raises:
        NotAvailable: there is no such file.
        Corrupt: it cannot be read, or not without running code.
        Incompatible: it holds other names or shapes; every one is listed.
    """
    tensors = _read(Path(path))
    config = config or reference_config()
    if not any(name.startswith(_DECODER) for name in tensors):
        config = PrunerConfig.from_dict({**config.to_dict(), "decoder": None})
    with torch.device("meta"):
        shapes = {their_name(name): tuple(t.shape) for name, t in make(config).state_dict().items()}
    check_tensors(str(path), tensors, shapes)
    pruner = make(config)
    pruner.load_state_dict({name: tensors[their_name(name)] for name in pruner.state_dict()})
    return pruner.eval()


def state_dict(pruner: Saved) -> dict[str, Tensor]:
    """The weights of a pruner under the authors' names."""
    if pruner.config.decoder not in ("random_ar", None) or pruner.config.queries != "shared_gaussian":
        raise BadInput("the authors' code has one decoder, random_ar, and one kind of queries, shared_gaussian")
    return {their_name(name): tensor for name, tensor in pruner.state_dict().items()}


def their_name(name: str) -> str:
    """The authors' name of a tensor of ours."""
    ours = next(ours for ours in NAMES if name.startswith(ours))
    return NAMES[ours] + name[len(ours) :]


def _read(path: Path) -> dict[str, Tensor]:
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise NotAvailable(f"{path} does not exist") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Corrupt(f"{path} cannot be read as tensors alone: {reason}") from error
    if isinstance(data, dict) and isinstance(data.get("state_dict"), dict):
        data = data["state_dict"]
    if not isinstance(data, dict) or not all(isinstance(value, Tensor) for value in data.values()) or not data:
        raise Incompatible(f"{path} is not a state dict: names and tensors are needed")
    return data
