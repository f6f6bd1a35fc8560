"""Checkpoints of a training: all that the next step depends on. Whole, checked, and two of them.

What is drawn for a step depends on the seed and the step alone, so the number of the step stands for the state of every
generator and for the place in the data.
"""

import hashlib
import json
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from ocvtp.errors import Corrupt, Incompatible
from ocvtp.pruner.pretrained import write_whole

_log = logging.getLogger(__name__)
_KEPT = 2


@dataclass
class State:
    """Where a training stands, but for its tensors.

    Attributes:
        spec: digest of all that determines the training.
        step: steps done.
        best, best_step: the best validation, by `best_by`, and when it was; None before the first.
        worse: validations since then.
        bad_steps: steps left out for numbers that are not finite.
        loss_sum, loss_count: training loss since the last row of the curves.
        last_loss: the last such mean.
        stopped: why training ended, empty while it goes on.
        rows: of the curves.
        bad: what is known of the steps left out.
    """

    spec: str
    step: int = 0
    best: float | None = None
    best_step: int | None = None
    worse: int = 0
    bad_steps: int = 0
    loss_sum: float = 0.0
    loss_count: int = 0
    last_loss: float | None = None
    stopped: str = ""
    rows: list[dict[str, float]] = field(default_factory=list)
    bad: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Tensors:
    """What a training changes: the model, its optimiser, the running mean (or None) and the best weights so far."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    average: nn.Module | None
    best: dict[str, Tensor]

    def pack(self) -> dict[str, Tensor]:
        """All by one name each."""
        found = {f"model/{name}": tensor for name, tensor in self.model.state_dict().items()}
        for number, moments in self.optimizer.state_dict()["state"].items():
            found |= {f"optimizer/{number}/{name}": torch.as_tensor(value) for name, value in moments.items()}
        if self.average is not None:
            found |= {f"average/{name}": tensor for name, tensor in self.average.state_dict().items()}
        found |= {f"best/{name}": tensor for name, tensor in self.best.items()}
        return {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}

    def unpack(self, found: dict[str, Tensor]) -> None:
        """The inverse of `pack`."""
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in found.items():
            part, _, rest = name.partition("/")
            parts.setdefault(part, {})[rest] = tensor
        self.model.load_state_dict(parts["model"])
        if self.average is not None:
            self.average.load_state_dict(parts["average"])
        self.best = parts.get("best", {})
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in parts.get("optimizer", {}).items():
            number, _, moment = name.partition("/")
            state.setdefault(int(number), {})[moment] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})


def save(folder: Path, state: State, tensors: Tensors) -> None:
    """Write a checkpoint; the ones before the last are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"step-{state.step:08d}"
    data = to_bytes(tensors.pack())
    write_whole(folder / f"{name}.safetensors", data)
    record = {"sha256": hashlib.sha256(data).hexdigest(), "state": asdict(state)}
    write_whole(folder / f"{name}.json", json.dumps(record).encode())  # last: what has it is whole
    for old in _found(folder)[_KEPT:]:
        old.unlink(missing_ok=True)
        old.with_suffix(".safetensors").unlink(missing_ok=True)


def load(folder: Path, spec: str, tensors: Tensors) -> State | None:
    """Go back to the newest checkpoint that is whole; None if there is none at all.

    Raises:
        Incompatible: it is of a training with another spec.
        Corrupt: there are checkpoints, but none is whole.
    """
    found = _found(folder)
    for path in found:
        read = _read(path)
        if read is None:
            _log.warning("%s is damaged: going back to the checkpoint before it", path)
            continue
        record, state = read
        if state.spec != spec:
            raise Incompatible(f"{path} is a checkpoint of another training: give an empty folder to resume from")
        tensors.unpack(record)
        _log.info("going on from step %d (%s)", state.step, path)
        return state
    if found:
        raise Corrupt(f"every checkpoint in {folder} is damaged: remove them to train from the beginning")
    return None


def _found(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.json"), reverse=True)


def _read(path: Path) -> tuple[dict[str, Tensor], State] | None:
    try:
        record = json.loads(path.read_bytes())
        data = path.with_suffix(".safetensors").read_bytes()
        if hashlib.sha256(data).hexdigest() != record["sha256"]:
            return None
        return from_bytes(data), State(**record["state"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
