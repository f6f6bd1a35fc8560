"""Prompts with fewer vision tokens: which columns stay, where they go, and what positions they have.

Letters: B prompts, L columns of the caller's prompts, S columns of the shortened ones, k tokens kept of an image,
P rows of positions (1, or 3 for M-RoPE), D width of the language model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Positions = Literal["compact", "original"]


@dataclass(frozen=True)
class Spot:
    """An image in the prompts.

    Attributes:
        row, start, length: where its placeholders stand.
        places_k: which of them stay, ascending; on the CPU.
        features_kD: what is put there.
    """

    row: int
    start: int
    length: int
    places_k: Tensor
    features_kD: Tensor


@dataclass(frozen=True)
class Spliced:
    """Shortened prompts.

    Attributes:
        columns_BS: the caller's column that each column comes from; -1 for padding.
        image_BS: True where a vision token goes.
        mask_BS: 1 for tokens, 0 for padding.
        positions_PBS: of the tokens; 0 for padding.
        next_B: the position of the next token of each prompt.
        features_XD: of all vision tokens, row by row.
    """

    columns_BS: Tensor
    image_BS: Tensor
    mask_BS: Tensor
    positions_PBS: Tensor
    next_B: Tensor
    features_XD: Tensor

    def gather(self, rows_BL: Tensor, filler: int) -> Tensor:
        """Something with an entry a column, such as ids or labels, [B, S]."""
        chosen_BS = rows_BL.gather(1, self.columns_BS.clamp(min=0).to(rows_BL.device))
        return chosen_BS.masked_fill((self.columns_BS < 0).to(rows_BL.device), filler)


def splice(mask_BL: Tensor, positions_PBL: Tensor, spots: Sequence[Spot], mode: Positions) -> Spliced:
    """Take placeholders out of prompts.

    Rows that lose more than others are padded on the side where the prompts have their padding; the left one if they
    have none.

    Args:
        mask_BL: the caller's attention mask.
        positions_PBL: positions of the whole prompts.
        spots: images in the order of their placeholders.
        mode: `compact` closes the gaps in the positions, `original` leaves them.
    """
    device = positions_PBL.device
    mask_BL, positions_PBL = mask_BL.cpu(), positions_PBL.cpu()
    right = bool((mask_BL[:, -1] == 0).any())
    rows = [
        _row(mask_BL[row], positions_PBL[:, row], [s for s in spots if s.row == row], mode, right=right)
        for row in range(len(mask_BL))
    ]
    length = max(len(row.columns_S) for row in rows)
    columns, images, masks, positions, nexts = zip(*(row.padded(length, right=right) for row in rows), strict=True)
    ordered = [spot.features_kD for row in range(len(rows)) for spot in spots if spot.row == row]
    return Spliced(
        columns_BS=torch.stack(columns).to(device),
        image_BS=torch.stack(images).to(device),
        mask_BS=torch.stack(masks).to(device),
        positions_PBS=torch.stack(positions, 1).to(device),
        next_B=torch.tensor(nexts, device=device),
        features_XD=torch.cat(ordered),
    )


@dataclass(frozen=True)
class _Row:
    """One shortened prompt without common padding."""

    columns_S: Tensor
    image_S: Tensor
    mask_S: Tensor
    positions_PS: Tensor
    next: int

    def padded(self, length: int, *, right: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
        missing = length - len(self.columns_S)
        sides = (0, missing) if right else (missing, 0)
        pad = torch.nn.functional.pad
        return (
            pad(self.columns_S, sides, value=-1),
            pad(self.image_S, sides, value=False),
            pad(self.mask_S, sides, value=0),
            pad(self.positions_PS, sides, value=0),
            self.next,
        )


def _row(mask_L: Tensor, positions_PL: Tensor, spots: Sequence[Spot], mode: Positions, *, right: bool) -> _Row:
    columns, shifts, images, done, shift = list[Tensor](), list[Tensor](), list[Tensor](), 0, 0
    for spot in sorted(spots, key=lambda spot: spot.start):
        kept = len(spot.places_k)
        columns += [torch.arange(done, spot.start), spot.start + spot.places_k]
        images += [torch.zeros(spot.start - done, dtype=torch.bool), torch.ones(kept, dtype=torch.bool)]
        # Closed gaps: the tokens that stay follow one another from where the image began.
        shifts += [torch.full((spot.start - done,), shift), shift + torch.arange(kept) - spot.places_k]
        done, shift = spot.start + spot.length, shift + kept - spot.length
    columns.append(torch.arange(done, len(mask_L)))
    images.append(torch.zeros(len(mask_L) - done, dtype=torch.bool))
    shifts.append(torch.full((len(mask_L) - done,), shift))
    columns_S, image_S = torch.cat(columns), torch.cat(images)
    mask_S, positions_PS = mask_L[columns_S], positions_PL[:, columns_S]
    if mode == "compact":
        positions_PS = positions_PS + torch.cat(shifts)
    real = mask_S.nonzero()[:, 0]
    # What comes next follows the largest position: of the whole prompt where gaps stay.
    last = positions_PS[:, real] if mode == "compact" else positions_PL[:, mask_L.bool()]
    following = int(last.max()) + 1 if last.numel() else 0
    part = slice(0, int(real[-1]) + 1) if right and len(real) else slice(int(real[0]) if len(real) else 0, None)
    positions_PS = positions_PS.masked_fill(mask_S == 0, 0)
    return _Row(columns_S[part], image_S[part], mask_S[part], positions_PS[:, part], following)
