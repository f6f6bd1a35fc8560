"""One training loop for all stages: AdamW, warm-up and cosine, checkpoints from which it goes on."""

import json
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipelines.tiny.recipe import Schedule

_log = logging.getLogger(__name__)
CHECKPOINT_EVERY = 50


Losses = Mapping[str, Tensor]


def fit(
    name: str,
    modules: nn.ModuleDict,
    losses: Callable[[int], Losses],
    schedule: Schedule,
    folder: Path,
    *,
    device: str,
    evaluate: Callable[[], Mapping[str, float]] | None = None,
    evaluate_every: int = 300,
) -> list[dict[str, float]]:
    """Train what requires a gradient in `modules` and return the curve, one row every ten steps.

    `losses(step)` must depend on the step and the weights alone, so that a run that was cut off goes on as if
    nothing had happened: `folder/<name>.safetensors` holds weights, moments and step.
    """
    parameters = {n: p for n, p in modules.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3, betas=(0.9, 0.98), weight_decay=schedule.weight_decay)
    path = folder / f"{name}.safetensors"
    first, curve = _load(path, parameters, optimizer)
    columns = (TextColumn(name), BarColumn(), TextColumn("{task.completed}/{task.total} {task.fields[note]}"))
    with Progress(*columns, TimeRemainingColumn()) as progress:
        bar = progress.add_task(name, total=schedule.steps, completed=first, note="")
        started = time.monotonic()
        for step in range(first, schedule.steps):
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate(step)
            with autocast(device):
                parts = losses(step)
                total = torch.stack(list(parts.values())).sum()
            optimizer.zero_grad(set_to_none=True)
            total.backward()
            nn.utils.clip_grad_norm_(parameters.values(), 1.0)
            optimizer.step()
            if step % 10 == 0 or step + 1 == schedule.steps:
                row = {"step": float(step), **{k: round(float(v.detach()), 5) for k, v in parts.items()}}
                curve.append(row)
                progress.update(bar, completed=step + 1, note=f"loss {float(total.detach()):.3f}")
            if (step + 1) % 100 == 0:
                pace = (time.monotonic() - started) / (step + 1 - first)
                _log.info("%s step %d, %.2f s a step: %s", name, step + 1, pace, curve[-1])
            if evaluate is not None and ((step + 1) % evaluate_every == 0 or step + 1 == schedule.steps):
                found = {k: round(v, 4) for k, v in evaluate().items()}
                curve.append({"step": float(step), **found})
                _log.info("%s step %d: %s", name, step + 1, found)
            if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == schedule.steps:
                _save(path, parameters, optimizer, step + 1, curve)
    return curve


def autocast(device: str) -> AbstractContextManager[Any]:
    """bfloat16 for matrix products; the weights stay float32."""
    return torch.autocast(torch.device(device).type, torch.bfloat16)


def _save(
    path: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    step: int,
    curve: list[dict[str, float]],
) -> None:
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        state = optimizer.state[parameter]
        tensors[f"weight/{name}"] = parameter.detach().cpu().contiguous()
        tensors[f"mean/{name}"] = state["exp_avg"].cpu().contiguous()
        tensors[f"square/{name}"] = state["exp_avg_sq"].cpu().contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary, {"step": str(step), "curve": json.dumps(curve)})
    temporary.replace(path)


def _load(
    path: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> tuple[int, list[dict[str, float]]]:
    if not path.exists():
        return 0, []
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors, step = load_file(path), int(metadata["step"])
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"weight/{name}"])
            optimizer.state[parameter] = {
                "step": torch.tensor(float(step)),
                "exp_avg": tensors[f"mean/{name}"].to(parameter.device),
                "exp_avg_sq": tensors[f"square/{name}"].to(parameter.device),
            }
    _log.info("%s: going on from step %d", path.stem, step)
    return step, json.loads(metadata["curve"])
