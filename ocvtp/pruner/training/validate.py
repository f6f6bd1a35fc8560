"""Validation: the same images, the same queries and the same visible tokens each time.

Letters: B images, N tokens, K slots.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from ocvtp.errors import BadInput
from ocvtp.pruner.loss import loss_function, mse
from ocvtp.pruner.model import OCPruner, PrunerOutput
from ocvtp.pruner.rebuilding import rebuilding
from ocvtp.pruner.seeding import generator
from ocvtp.pruner.select import picks
from ocvtp.pruner.span import span_loss
from ocvtp.pruner.training import answers, coverage_loss
from ocvtp.pruner.training.answers import Teacher
from ocvtp.pruner.training.data import Batch, TokenSource, fetch
from ocvtp.pruner.training.train_config import TrainConfig

Row = dict[str, float]
REBUILDING: Final = ("distinct_picks", "span_error", "random_span_error", "prototype_error")
"""Of `ocvtp.pruner.rebuilding.Rebuilding`, in a row."""
HANDED_ON: Final = ("handed_on_span_error", "random_handed_on_span_error")
"""Likewise, where the tokens of the layer that goes to the LLM are there."""


def training_loss(
    config: TrainConfig,
    pruner: OCPruner,
    out: PrunerOutput,
    batch: Batch,
    teacher: Teacher | None = None,
    draw: int | None = None,
) -> Tensor:
    """The loss of a batch: eq. 10-12, for `span` eq. 4-5, for `answers` eq. 2-3, for `masks` that of objects missed.

    Args:
        config: of the training.
        pruner: whose loss it is.
        out: what it made of the batch.
        batch: the tokens.
        teacher: for `answers`.
        draw: of the prompts of `answers`; None for all of them.
    """
    if config.loss == "span":
        return _span(config, pruner, out, batch)
    if config.loss == "masks":
        if batch.touched_BSN is None:
            raise BadInput(coverage_loss.NEEDS)
        return coverage_loss.missed(out.attention, batch.touched_BSN, temperature=config.span_temperature)
    if config.loss == "answers":
        loss = answers_loss(config, pruner, out, batch, teacher, draw)
        return loss + config.span_weight * _span(config, pruner, out, batch) if config.span_weight else loss
    assert out.reconstruction is not None  # noqa: S101 - these losses have a decoder
    function = loss_function(
        config.loss,
        power=config.loss_power,
        cap=config.loss_cap,
        ignore_empty=config.ignore_empty,
        normalise=config.loss_normalise,
    )
    return function(out.reconstruction, batch.tokens_BNC, out.attention, batch.mask_BN)


def _span(config: TrainConfig, pruner: OCPruner, out: PrunerOutput, batch: Batch) -> Tensor:
    scores_BKN = out.attention.detach()
    if batch.mask_BN is not None:
        scores_BKN = scores_BKN.masked_fill(~batch.mask_BN[:, None], -1.0)
    judged_BNX = pruner.config.rebuilt(batch.tokens_BNC, batch.handed_on_BNV)
    picks_BKk = picks(scores_BKN, pruner.config.assignment, mask_BN=batch.mask_BN, tokens_BNC=judged_BNX,
                      mass_power=pruner.config.mass_power)  # fmt: skip
    picks_BK = picks_BKk[:, :, 0].clamp(max=scores_BKN.shape[2] - 1)  # padding, which is zero, where none is left
    return span_loss(judged_BNX, out.attention, picks_BK, batch.mask_BN,
                     temperature=config.span_temperature, prototype_weight=config.prototype_weight)  # fmt: skip


def answers_loss(
    config: TrainConfig, pruner: OCPruner, out: PrunerOutput, batch: Batch, teacher: Teacher | None, draw: int | None
) -> Tensor:
    """Mean over images of the divergence of a VLM's answers (eq. 2-3); without a `draw`, of what the pruner keeps."""
    if teacher is None or batch.names is None:
        raise BadInput(answers.NEEDS)
    judged_BNX = pruner.config.judged(batch.tokens_BNC, batch.handed_on_BNV)
    if config.answers_gradient == "sampled" and draw is not None:
        return answers.sampled_loss(pruner.config, out.attention, judged_BNX, batch.mask_BN, teacher, batch.names,
                                    draw, samples=config.answers_samples,
                                    temperature=config.answers_temperature)  # fmt: skip
    selection = answers.kept(pruner.config, out.attention, judged_BNX, batch.mask_BN)
    weights_BSN = answers.soft_weights(out.attention, selection, config.span_temperature)
    return teacher.divergence(batch.names, selection.indices_BS, weights_BSN, draw).mean()


@torch.no_grad()
def validate(
    pruner: OCPruner,
    config: TrainConfig,
    source: TokenSource,
    images: Sequence[int],
    device: torch.device,
    teacher: Teacher | None = None,
) -> Row:
    """Losses, picks, and how well kept tokens stand for all, over held-out images.

    Returns:
        `val_loss`, `val_mse` (the plain error of the decoder, if there is one), `kl` (of `answers`, over all prompts
        of an image), `cover` (of `masks`: `covered` by what is kept) and
        `REBUILDING`, and where the source has the layer that goes to the LLM, `HANDED_ON` (with as many tokens kept as
        there are slots): means over images and over `validation_slots`.
    """
    slots, size = config.validation_slots, config.batch_size
    parts = [images[start : start + size] for start in range(0, len(images), size)]
    return evaluate(pruner, config, (fetch(source, part, device) for part in parts), slots, teacher)


@torch.no_grad()
def evaluate(
    pruner: OCPruner,
    config: TrainConfig,
    batches: Iterable[Batch],
    slots: Sequence[int],
    teacher: Teacher | None = None,
    *,
    draws: Sequence[int] = (),
) -> Row:
    """`validate` over batches that are at hand; `draws` makes the noise of the queries another one."""
    training = pruner.training
    pruner.eval()
    sums: Row = {}
    count = 0
    for number, batch in enumerate(batches):
        for one in slots:
            noise = generator("ocvtp validation", config.seed, number, one, *draws) if _fresh(pruner) else None
            with autocast(config, batch.tokens_BNC.device):
                out = pruner(batch.tokens_BNC, one, None, noise, batch.mask_BN, batch.grids, check_values=False)
                row = _losses(config, pruner, out, batch, teacher)
            if out.reconstruction is not None:
                row["val_mse"] = float(mse(out.reconstruction, batch.tokens_BNC, batch.mask_BN))
            row |= _rebuilding(pruner, batch, one)
            if batch.touched_BSN is not None:
                kept_BS = pruner.select(batch.tokens_BNC, one, mask=batch.mask_BN, handed_on=batch.handed_on_BNV,
                                        **_selecting(pruner, batch))  # fmt: skip
                row["cover"] = float(coverage_loss.covered(kept_BS, batch.touched_BSN).mean())
            sums = {name: sums.get(name, 0.0) + value * len(batch.indices) for name, value in row.items()}
        count += len(batch.indices) * len(slots)
    pruner.train(training)
    return {name: value / count for name, value in sums.items()}


def _losses(config: TrainConfig, pruner: OCPruner, out: PrunerOutput, batch: Batch, teacher: Teacher | None) -> Row:
    if config.loss != "answers":
        return {"val_loss": float(training_loss(config, pruner, out, batch))}
    kl = float(answers_loss(config, pruner, out, batch, teacher, None))
    more = config.span_weight * float(_span(config, pruner, out, batch)) if config.span_weight else 0.0
    return {"val_loss": kl + more, "kl": kl}


def autocast(config: TrainConfig, device: torch.device) -> torch.autocast:
    """bfloat16 for matrix products, if asked for; weights and sums stay in single precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")


def _rebuilding(pruner: OCPruner, batch: Batch, keep: int) -> Row:
    """All tokens, where none would be dropped, leave nothing unexplained."""
    wanted = REBUILDING if batch.handed_on_BNV is None else (*REBUILDING, *HANDED_ON)
    if keep >= batch.tokens_BNC.shape[1]:
        tokens = batch.tokens_BNC.shape[1] if batch.mask_BN is None else float(batch.mask_BN.sum(1).float().mean())
        return {**dict.fromkeys(wanted, 0.0), "distinct_picks": float(tokens)}
    found = rebuilding(pruner, batch.tokens_BNC, keep, handed_on=batch.handed_on_BNV, mask=batch.mask_BN,
                       images=batch.indices, **_selecting(pruner, batch))  # fmt: skip
    return {name: getattr(found, name) for name in wanted}


def _selecting(pruner: OCPruner, batch: Batch) -> dict[str, Any]:
    """How tokens are chosen in validation: there is no attention of a tower here."""
    seeds = range(len(batch.indices)) if _fresh(pruner) else None
    fill = "slot_mass" if pruner.config.fill == "attention" else None
    return {"seeds": seeds, "check_values": False, "fill": fill}


def _fresh(pruner: OCPruner) -> bool:
    return pruner.config.query_noise == "fresh"
