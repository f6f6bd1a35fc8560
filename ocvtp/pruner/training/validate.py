"""Validation: the same images, the same queries and the same visible tokens each time.

Letters: B images, N tokens, K slots.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ocvtp.pruner.loss import loss_function, mse
from ocvtp.pruner.model import OCPruner
from ocvtp.pruner.rebuilding import rebuilding
from ocvtp.pruner.seeding import generator
from ocvtp.pruner.training.data import Batch, TokenSource, fetch
from ocvtp.pruner.training.train_config import TrainConfig

Row = dict[str, float]


def training_loss(config: TrainConfig, rebuilt_BNC: Tensor, attention_BKN: Tensor, batch: Batch) -> Tensor:
    """The loss of a batch (eq. 10-12)."""
    function = loss_function(
        config.loss,
        power=config.loss_power,
        cap=config.loss_cap,
        ignore_empty=config.ignore_empty,
        normalise=config.loss_normalise,
    )
    return function(rebuilt_BNC, batch.tokens_BNC, attention_BKN, batch.mask_BN)


@torch.no_grad()
def validate(
    pruner: OCPruner, config: TrainConfig, source: TokenSource, images: Sequence[int], device: torch.device
) -> Row:
    """Losses and picks over held-out images, and how well the kept tokens of the first of them rebuild the rest.

    Returns:
        `val_loss`, `val_mse` (the plain error) and `distinct_picks`, means over images and over `validation_slots`;
        and, for the middle one of these, `kept_error`, `random_error` and `full_error` of `Rebuilding`.
    """
    slots, size = config.validation_slots, config.batch_size
    batches = (fetch(source, images[start : start + size], device) for start in range(0, len(images), size))
    return evaluate(pruner, config, batches, slots)


@torch.no_grad()
def evaluate(pruner: OCPruner, config: TrainConfig, batches: Iterable[Batch], slots: Sequence[int]) -> Row:
    """`validate` over batches that are at hand."""
    training = pruner.training
    pruner.eval()
    losses, plain, picks, count, row = 0.0, 0.0, 0.0, 0, Row()
    for number, batch in enumerate(batches):
        if number == 0:
            row |= _rebuilding(pruner, batch, sorted(slots)[len(slots) // 2])
        for one in slots:
            noise = generator("ocvtp validation", config.seed, number, one) if _fresh(pruner) else None
            with autocast(config, batch.tokens_BNC.device):
                out = pruner(batch.tokens_BNC, one, None, noise, batch.mask_BN, batch.grids, check_values=False)
                losses += float(training_loss(config, out.reconstruction, out.attention, batch)) * len(batch.indices)
            plain += float(mse(out.reconstruction, batch.tokens_BNC, batch.mask_BN)) * len(batch.indices)
            picks += _distinct(out.attention)
        count += len(batch.indices) * len(slots)
    pruner.train(training)
    return {"val_loss": losses / count, "val_mse": plain / count, "distinct_picks": picks / count, **row}


def autocast(config: TrainConfig, device: torch.device) -> torch.autocast:
    """bfloat16 for matrix products, if asked for; weights and sums stay in single precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")


def _rebuilding(pruner: OCPruner, batch: Batch, keep: int) -> Row:
    """Empty if the decoder cannot rebuild from kept tokens or nothing would be dropped."""
    if pruner.config.decoder == "ar" or keep >= batch.tokens_BNC.shape[1]:
        return {}
    seeds = range(len(batch.indices)) if _fresh(pruner) else None
    fill = "slot_mass" if pruner.config.fill == "attention" else None  # there is no attention of a tower here
    found = rebuilding(
        pruner, batch.tokens_BNC, keep, mask=batch.mask_BN, grid=batch.grids, seeds=seeds, check_values=False, fill=fill
    )
    return {"kept_error": found.kept_error, "random_error": found.random_error, "full_error": found.full_error}


def _distinct(attention_BKN: Tensor) -> float:
    """Tokens that are the most attended of a slot, summed over images."""
    picked_BN = torch.zeros_like(attention_BKN[:, 0]).scatter(1, attention_BKN.argmax(2), 1.0)
    return float(picked_BN.sum())


def _fresh(pruner: OCPruner) -> bool:
    return pruner.config.query_noise == "fresh"
