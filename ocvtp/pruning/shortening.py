"""Calls of a model that is pruned between the layers of its LLM: what is known of them before the first layer.

Letters: B prompts, S columns of the spliced prompts, of which nothing is dropped yet.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ocvtp.methods import Budget
from ocvtp.methods.inside import Inside
from ocvtp.pruning.decoder_layers import Layers, Shortening
from ocvtp.pruning.prefix import Prefix
from ocvtp.pruning.prompts import prompts_of
from ocvtp.pruning.splice import Positions, Spliced, Spot


def shortening(
    layers: Layers, method: Inside, budget: Budget, spliced: Spliced, spots: Sequence[Spot], mode: Positions,
    *, labels_BS: Tensor | None, length: int | None, before_BS: Tensor | None, prefix: Prefix | None,
) -> Shortening:  # fmt: skip
    """The run of such a call.

    Args:
        layers: of the model.
        method: which tokens go, and where.
        budget: of each image.
        spliced: whole prompts.
        spots: of the images.
        mode: how tokens that stay are numbered.
        labels_BS: answers that stand in the prompts.
        length: the caller's columns from here on are answers.
        before_BS: mask of what is in the cache.
        prefix: of the cache.

    Raises:
        BadInput: a budget that the method cannot reach for one of the images.
    """
    near = replace(
        spliced, columns_BS=spliced.columns_BS.cpu(), image_BS=spliced.image_BS.cpu(), mask_BS=spliced.mask_BS.cpu()
    )
    asks = _asks(near, labels_BS, length)
    prompts = prompts_of(spliced, near, spots, asks)
    texts = [_text(near, span.row, span.start + span.count, asks[span.row]) for span in prompts.spans]
    plans = [_plan(method, budget, spot) for spot in spots]
    given = [spot.scores_X for spot in spots]
    # A number for each token of an image, by the token's number.
    tower_IN = None if any(each is None for each in given) else _by_number(spots)
    return Shortening(
        layers.decoder, method, prompts, [method.planned(*plan) for plan in plans], mode,
        texts=texts, keeps=[keep for _, keep in plans], tower_IN=tower_IN, next_B=spliced.next_B, before_BS=before_BS,
        prefix=prefix,
    )  # fmt: skip


def _plan(method: Inside, budget: Budget, spot: Spot) -> tuple[int, int]:
    """Of an image, tokens that enter and its budget.

    What stands among its tokens, such as the ends of rows in LLaVA-NeXT, counts like these where all of them enter.
    """
    read, tokens = len(spot.numbers_X), int((spot.numbers_X >= 0).sum())
    if tokens < spot.tokens:  # some are gone before
        return read, min(read, budget.at_most(spot.tokens))
    everything = budget.at_most(tokens) == tokens
    return read, (read if everything else budget.at_most(read))


def _by_number(spots: Sequence[Spot]) -> Tensor:
    """What a method said of each image's tokens, [I, N]; 0 for others."""
    rows = torch.zeros(len(spots), max(spot.tokens for spot in spots))
    for row_N, spot in zip(rows, spots, strict=True):
        assert spot.scores_X is not None  # noqa: S101 - as the caller has made sure
        there_X = spot.numbers_X >= 0
        row_N[spot.numbers_X[there_X]] = spot.scores_X.float().cpu()[there_X]
    return rows


def _asks(spliced: Spliced, labels_BS: Tensor | None, length: int | None) -> list[list[int]]:
    """Columns of each prompt that ask: those right before an answer, or the last one."""
    real_BS = spliced.mask_BS.bool()
    if length is not None:
        real_BS = real_BS & (spliced.columns_BS < length)
    found = [real_S.nonzero()[-1:, 0].tolist() for real_S in real_BS]
    if labels_BS is not None:
        answers_BS = labels_BS.cpu() != -100
        starts_BS = answers_BS[:, 1:] & ~answers_BS[:, :-1] & real_BS[:, :-1]
        before = [starts_S.nonzero()[:, 0].tolist() for starts_S in starts_BS]
        found = [columns or last for columns, last in zip(before, found, strict=True)]
    return found


def _text(spliced: Spliced, row: int, start: int, asks: Sequence[int]) -> list[int]:
    """Columns of the text from a column on, up to the last that asks."""
    text_S = (spliced.mask_BS[row] == 1) & ~spliced.image_BS[row]
    return [column for column in text_S.nonzero()[:, 0].tolist() if start <= column <= asks[-1]]


def kept_of(run: Shortening, copies: int) -> list[list[int]]:
    """Numbers of the tokens that stayed of each image; prompts were repeated so often, for beams or answers."""
    return [[n for n in numbers if n >= 0] for numbers in run.prompts.numbers_IN[::copies].tolist()]


def counts_of(run: Shortening, copies: int) -> list[list[int]]:
    """For each layer, the tokens of each image that it read."""
    return [list(layer) for layer in zip(*run.counts()[::copies], strict=True)]


def loss_of(model: Any, logits: Tensor, labels: Tensor, call: dict[str, Any]) -> Tensor:
    """As the model would have it, had it known which columns stay."""
    more = {name: call[name] for name in ("num_items_in_batch",) if name in call}
    loss: Tensor = model.loss_function(
        logits=logits, labels=labels, vocab_size=model.config.get_text_config().vocab_size, **more
    )
    return loss
