"""What a training leaves behind: weights, curves and metrics. No times and no hosts: equal trainings, equal bytes."""

import json
from pathlib import Path
from typing import Final

from safetensors.torch import save as to_bytes
from torch import Tensor

from ocvtp.pruner import pretrained
from ocvtp.pruner.model import OCPruner
from ocvtp.pruner.pretrained import write_whole
from ocvtp.pruner.training.state import State

COLUMNS: Final = (
    "step", "lr", "loss", "grad_norm", "val_loss", "val_mse", "distinct_picks", "span_error",
    "random_span_error", "prototype_error", "kl", "cover", "handed_on_span_error", "random_handed_on_span_error",
)  # fmt: skip
CURVES: Final = "curves.csv"
METRICS: Final = "metrics.json"
LAST: Final = "last.safetensors"
BAD: Final = "bad_batches.jsonl"


def publish(folder: Path, pruner: OCPruner, last: dict[str, Tensor], state: State, metrics: dict[str, object]) -> None:
    """Write the best weights (`config.json`, `model.safetensors`), the last ones, `curves.csv` and `metrics.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    pretrained.save(pruner, folder)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in last.items()}
    write_whole(folder / LAST, to_bytes(tensors, {"format": "pt"}))
    write_whole(folder / CURVES, curves(state.rows).encode())
    write_whole(folder / METRICS, (json.dumps(metrics, indent=2) + "\n").encode())
    write_bad(folder, state)


def write_bad(folder: Path, state: State) -> None:
    """List the steps that were left out, if any."""
    if state.bad:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / BAD, "".join(json.dumps(line) + "\n" for line in state.bad).encode())


def curves(rows: list[dict[str, float]]) -> str:
    """CSV; an empty cell where a row lacks the column."""
    lines = [",".join(COLUMNS)]
    for row in rows:
        lines.append(",".join(_cell(row[name]) if name in row else "" for name in COLUMNS))
    return "\n".join(lines) + "\n"


def _cell(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.7g}"
