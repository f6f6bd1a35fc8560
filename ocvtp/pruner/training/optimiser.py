"""AdamW and the learning rate of each step."""

import math
from typing import Any, Final

import torch
from torch import nn

from ocvtp.pruner.training.train_config import TrainConfig

_WARMUP_FROM: Final = 1e-6
_LOWEST: Final = 1e-8
"""First and last learning rate of the authors' schedule."""


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over two groups: what decays and what does not."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim == 2 and "begin" not in name
        (decayed if config.decay_all or matrix else free).append(parameter)
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        fused=True,
    )


def learning_rate(config: TrainConfig, step: int, total: int, steps_per_epoch: int) -> float:
    """The rate of a step, counted from 0, of `total`."""
    if config.schedule == "cosine_epoch":
        epoch, place = divmod(step, steps_per_epoch)
        # The authors set an epoch's rate after its first step, which so has that of the epoch before.
        epoch -= place == 0 and epoch > 0
        return _epoch_rate(config, epoch, config.epochs or math.ceil(total / steps_per_epoch))
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, total - config.warmup_steps)
    share = config.final_rate + (1 - config.final_rate) * (1 + math.cos(math.pi * done)) / 2
    return config.learning_rate * share


def _epoch_rate(config: TrainConfig, epoch: int, epochs: int) -> float:
    """The cosine schedule of timm with a warm-up that the cosine does not wait for."""
    if epoch < config.warmup_epochs:
        return _WARMUP_FROM + epoch * (config.learning_rate - _WARMUP_FROM) / config.warmup_epochs
    if epoch >= epochs:
        return _LOWEST
    return _LOWEST + (config.learning_rate - _LOWEST) * (1 + math.cos(math.pi * epoch / epochs)) / 2
