"""The loss `span`: eq. 4-5 taken at their word. What is kept must rebuild what is not; by least squares, not a decoder.

Letters: B images, N tokens, C token width, K slots.
"""

import torch
from torch import Tensor

from ocvtp.errors import BadInput
from ocvtp.selection.greedy import centre
from ocvtp.selection.kept_error import prototype_error_of, span_error_of


def span_loss(
    tokens: Tensor,
    attention: Tensor,
    picks: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float = 1.0,
    prototype_weight: float = 0.0,
) -> Tensor:
    """Mean over images of `ocvtp.selection.span_error` of the tokens that slots pick, straight through.

    Forward it is that of the picked tokens themselves. Backward a slot's token is the mean of all, weighted by its
    attention^(1 / temperature) over them, so that gradients say to which tokens attention should move.

    Args:
        tokens: [B, N, C], no gradient flows into them.
        attention: of slot attention [B, K, N], softmax over slots.
        picks: [B, K], the token of each slot.
        mask: [B, N], True where there is a token; None if everywhere.
        temperature: below 1 sharpens.
        prototype_weight: of the mean cosine distance of a token to the nearest picked one, which is added.

    Raises:
        BadInput: shapes that do not fit.
    """
    batch, count = tokens.shape[:2]
    if attention.ndim != 3 or attention.shape[::2] != (batch, count) or picks.shape != attention.shape[:2]:
        raise BadInput(f"attention {list(attention.shape)} and picks {list(picks.shape)} of tokens "
                       f"{list(tokens.shape)}: [{batch}, slots, {count}] and [{batch}, slots] are needed")  # fmt: skip
    with torch.autocast(tokens.device.type, enabled=False):
        exists_BN = torch.ones_like(tokens[:, :, 0], dtype=torch.bool) if mask is None else mask.bool()
        tokens_BNC = tokens.detach().float().masked_fill(~exists_BN[:, :, None], 0)
        weights_BKN = _straight_through(attention.float(), picks, temperature)
        centred_BNC = centre(tokens_BNC, exists_BN)
        loss_B = span_error_of(centred_BNC, weights_BKN @ centred_BNC)
        if prototype_weight:
            loss_B = loss_B + prototype_weight * prototype_error_of(tokens_BNC, weights_BKN @ tokens_BNC, exists_BN)
        return loss_B.mean()


def _straight_through(attention_BKN: Tensor, picks_BK: Tensor, temperature: float) -> Tensor:
    """One at each slot's token, with the gradient of what the slot's attention over tokens is at a temperature."""
    soft_BKN = over_tokens(attention_BKN, temperature)
    hard_BKN = torch.zeros_like(soft_BKN).scatter(2, picks_BK[:, :, None], 1.0)
    return hard_BKN + (soft_BKN - soft_BKN.detach())


def over_tokens(attention_BKN: Tensor, temperature: float) -> Tensor:
    """Attention of slots (softmax over slots) as a distribution of each slot over tokens; below 1 sharpens."""
    sharp_BKN = attention_BKN.clamp(min=1e-12)
    if temperature != 1:
        sharp_BKN = sharp_BKN / sharp_BKN.detach().amax(2, keepdim=True)
        sharp_BKN = sharp_BKN ** (1 / temperature)
    return sharp_BKN / sharp_BKN.sum(2, keepdim=True)
