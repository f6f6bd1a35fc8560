"""Prompts with fewer vision tokens: which columns stay, where they go, and what positions they have.

Positions. `original`: each token has that of the whole prompt. `compact`: gaps are closed. Where positions count
tokens, those that stay follow one another; where they are places in a picture (M-RoPE), rows and columns of it of which
nothing stays are left out. What follows begins after the largest position of the image, as in a whole prompt.

Letters: B prompts, L columns of the caller's prompts, S columns of the shortened ones, X tokens of an image that stay
and what stays for their sake, P rows of positions (1, or 3 for M-RoPE), D width of the language model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ocvtp.vlms.images import Kind, Placed

Positions = Literal["compact", "original"]


@dataclass(frozen=True)
class Spot(Placed):
    """An image in the prompts.

    Attributes:
        row, start, length: where its placeholders stand.
        kind: of these.
        tokens: of the image, before any is dropped.
    """

    row: int
    start: int
    length: int
    kind: Kind = "image"
    tokens: int = 0

    @property
    def columns_X(self) -> Tensor:
        """Columns of the caller; of places that have no placeholder the last one's."""
        return self.start + self.places_X.clamp(max=self.length - 1)

    def moved(self, positions_PL: Tensor, mode: Positions) -> tuple[Tensor, int]:
        """Positions of the tokens that stay, [P, X], and by how much what follows them moves."""
        span_PN = positions_PL[:, self.start : self.start + self.length]
        columns_X = self.columns_X
        positions_PX = positions_PL[:, columns_X] + (self.start + self.places_X - columns_X)
        if mode == "original":
            return positions_PX, self.whole - self.length
        first_P1, length = span_PN[:, :1], int((span_PN.amax(1) - span_PN[:, 0]).max()) + 1
        ranks_PX = torch.stack([torch.unique(row_X, return_inverse=True)[1] for row_X in positions_PX])
        left = int(ranks_PX.max()) + 1 if len(columns_X) else 0
        return first_P1 + ranks_PX, left - length


@dataclass(frozen=True)
class Spliced:
    """Shortened prompts.

    Attributes:
        columns_BS: the caller's column that each column comes from; -1 for padding.
        image_BS: True where a vision token goes.
        mask_BS: 1 for tokens, 0 for padding.
        positions_PBS: of the tokens; 0 for padding.
        next_B: the position of the next token of each prompt.
        features: of all vision tokens of a kind, row by row, [X, D].
        right: padding stands on the right.
    """

    columns_BS: Tensor
    image_BS: Tensor
    mask_BS: Tensor
    positions_PBS: Tensor
    next_B: Tensor
    features: Mapping[Kind, Tensor]
    right: bool

    def gather(self, rows_BL: Tensor, filler: int) -> Tensor:
        """Something with an entry a column, such as ids or labels, [B, S]."""
        return cut(rows_BL, self.columns_BS, filler)


def cut(rows_BL: Tensor, columns_BS: Tensor, filler: int) -> Tensor:
    """Some columns of something, [B, S]; a filler where there are none (-1)."""
    columns_BS = columns_BS.to(rows_BL.device)
    return rows_BL.gather(1, columns_BS.clamp(min=0)).masked_fill(columns_BS < 0, filler)


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
    features = dict[Kind, list[Tensor]]()
    for spot in sorted(spots, key=lambda spot: (spot.row, spot.start)):
        features.setdefault(spot.kind, []).append(spot.features_XD)
    return Spliced(
        columns_BS=torch.stack(columns).to(device),
        image_BS=torch.stack(images).to(device),
        mask_BS=torch.stack(masks).to(device),
        positions_PBS=torch.stack(positions, 1).to(device),
        next_B=torch.tensor(nexts, device=device),
        features={kind: torch.cat(parts) for kind, parts in features.items()},
        right=right,
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
    columns, positions, images, done, shift = list[Tensor](), list[Tensor](), list[Tensor](), 0, 0
    for spot in sorted(spots, key=lambda spot: spot.start):
        moved_PX, further = spot.moved(positions_PL, mode)
        columns += [torch.arange(done, spot.start), spot.columns_X]
        positions += [positions_PL[:, done : spot.start] + shift, moved_PX + shift]
        images += [torch.zeros(spot.start - done, dtype=torch.bool), torch.ones(len(spot.places_X), dtype=torch.bool)]
        done, shift = spot.start + spot.length, shift + further
    columns.append(torch.arange(done, len(mask_L)))
    positions.append(positions_PL[:, done:] + shift)
    images.append(torch.zeros(len(mask_L) - done, dtype=torch.bool))
    columns_S, image_S, positions_PS = torch.cat(columns), torch.cat(images), torch.cat(positions, 1)
    mask_S = mask_L[columns_S]
    real = mask_S.nonzero()[:, 0]
    # What comes next follows the largest position: of the whole prompt where gaps stay.
    last = positions_PS[:, real] if mode == "compact" else positions_PL[:, mask_L.bool()] + shift
    following = int(last.max()) + 1 if last.numel() else 0
    part = slice(0, int(real[-1]) + 1) if right and len(real) else slice(int(real[0]) if len(real) else 0, None)
    positions_PS = positions_PS.masked_fill(mask_S == 0, 0)
    return _Row(columns_S[part], image_S[part], mask_S[part], positions_PS[:, part], following)
