"""The loss `masks`: no object may be without a kept token. For images whose objects are segmented, as COCO's are.

The paper trains without annotations; this is for whoever has some, and to see what slots can be taught.

Letters: B images, N tokens, K slots, S objects (of the image with most).
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from ocvtp.pruner.layout import Grid
from ocvtp.pruner.span import over_tokens

NEEDS: Final = "loss is masks, which needs the segmented objects of the training images (`ocvtp.tokens.object_masks`)"
_CERTAIN: Final = 1e-3
"""What a slot at least leaves of an object, so that the gradient of the others does not vanish."""


class Segmentations(Protocol):
    """The objects of training images, by image id."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """All that determines them, as JSON."""

    def check(self, images: Sequence[str]) -> None:
        """`BadInput` names images of which nothing is known."""

    def touched(self, images: Sequence[str], grids: Sequence[Grid], count: int) -> Tensor:
        """Which of `count` tokens each object's mask touches, bool [B, S, N]; rows of nothing for no object."""


def missed(attention: Tensor, touched: Tensor, *, temperature: float = 1.0) -> Tensor:
    """How many of an image's objects are expected to have no pick, mean over images.

    Each slot draws a token by its attention over tokens, independently of the others; an object is missed if all of
    them draw tokens that its mask does not touch.

    Args:
        attention: of slot attention [B, K, N], softmax over slots.
        touched: bool [B, S, N].
        temperature: of a slot's attention as a distribution over tokens (`over_tokens`).
    """
    with torch.autocast(attention.device.type, enabled=False):
        share_BKN = over_tokens(attention.float(), temperature)
        hit_BKS = share_BKN @ touched.float().transpose(1, 2)
        without_BS = torch.log1p(-hit_BKS.clamp(max=1 - _CERTAIN)).sum(1).exp()
        return (without_BS * touched.any(2)).sum(1).mean()


def covered(kept: Tensor, touched: Tensor) -> Tensor:
    """Share of each image's objects that a kept token lies on, [B]; 1 without objects.

    Args:
        kept: [B, S], numbers of tokens, -1 for none.
        touched: bool [B, S, N].
    """
    count = touched.shape[2]
    kept_BN = torch.zeros(len(kept), count + 1, dtype=torch.bool, device=kept.device)
    kept_BN = kept_BN.scatter(1, torch.where(kept < 0, count, kept), True)[:, :count]
    there_BS = touched.any(2)
    hit_BS = (touched & kept_BN[:, None]).any(2)
    return torch.where(there_BS.any(1), hit_BS.sum(1) / there_BS.sum(1).clamp(min=1), 1.0)
