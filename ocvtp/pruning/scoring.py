"""What a method inside the LLM is told of the tokens of images: at the layer that scores them, and at that which drops.

Letters: B prompts, S columns, I images, N tokens of an image, R tokens that ask, D width of the LLM.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ocvtp.methods.inside import HeadRows, Later, Scored
from ocvtp.pruning.attention import Read, attended, key_lengths
from ocvtp.pruning.prompts import Prompts


def scored(layer: Any, read: Read, prompts: Prompts, stage: int, tower_IN: Tensor | None) -> Scored:
    """At a layer that is about to read prompts; `tower_IN`: numbers of the images' tokens as they came."""
    columns_IN, there_IN = prompts.places()
    prompts_I1 = prompts.rows.prompts_I[:, None]

    def attention(weigh: Callable[[HeadRows], Tensor] | None = None) -> Tensor:
        if weigh is None:
            return prompts.vision(attended(layer, read, prompts.rows))
        # What would be marked of images with fewer tokens falls into a column that is cut off.
        wide_IS = torch.zeros(len(columns_IN), prompts.mask_BS.shape[1] + 1, dtype=torch.bool, device=there_IN.device)
        vision_IS = wide_IS.scatter(1, columns_IN.masked_fill(~there_IN, wide_IS.shape[1] - 1), value=True)[:, :-1]
        return prompts.vision(attended(layer, read, prompts.rows, vision_IS, weigh))

    def keys() -> tuple[Tensor, Tensor]:
        lengths_BS = key_lengths(layer, read)
        return lengths_BS[prompts_I1, columns_IN], lengths_BS[prompts_I1, prompts.rows.columns_IR]

    states_IND = read.states_BSD[prompts_I1, columns_IN]
    return Scored(states_IND, there_IN, attention, keys, stage, _of_tower(prompts, there_IN, tower_IN))


def _of_tower(prompts: Prompts, there_IN: Tensor, tower_IN: Tensor | None) -> Tensor:
    """The numbers of the tokens that are left."""
    if tower_IN is None:
        return torch.zeros_like(there_IN, dtype=torch.float32)
    wide_IX = torch.nn.functional.pad(tower_IN.to(there_IN.device).float(), (0, 1))
    numbers_IN = torch.nn.functional.pad(
        prompts.numbers_IN[:, : there_IN.shape[1]],
        (0, max(0, there_IN.shape[1] - prompts.numbers_IN.shape[1])),
        value=-1,
    )
    return wide_IX.gather(1, torch.where(numbers_IN < 0, wide_IX.shape[1] - 1, numbers_IN)).masked_fill(~there_IN, 0)


def later(
    norm: Callable[[Tensor], Tensor], states_BSD: Tensor, prompts: Prompts, asks_keys_IR: Tensor,
    asking: Sequence[int], kept: Sequence[int],
) -> Later:  # fmt: skip
    """At the layer that drops tokens, which is about to read `states_BSD`."""
    columns_IN, there_IN = prompts.places()
    prompts_I1, rows = prompts.rows.prompts_I[:, None], prompts.rows
    with torch.no_grad():
        normed_BSD = norm(states_BSD)
    return Later(
        states_IND=normed_BSD[prompts_I1, columns_IN],
        there_IN=there_IN,
        asks_IRD=normed_BSD[prompts_I1, rows.columns_IR],
        asks_IR=rows.real_IR,
        asks_keys_IR=asks_keys_IR,
        asking=list(asking),
        counts=[span.count for span in prompts.spans],
        kept=list(kept),
    )
