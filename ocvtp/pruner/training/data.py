"""Which images a step sees: a function of the seed and the step alone.

Letters: B images, N tokens, C token width.
"""

from collections.abc import Callable, Generator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from ocvtp.errors import BadInput
from ocvtp.pruner.layout import Grid
from ocvtp.pruner.seeding import generator
from ocvtp.pruner.training.coverage_loss import Segmentations
from ocvtp.tokens.read_ahead import read_ahead

_AHEAD = 2


class TokenSource(Protocol):
    """Tokens of images by number, as `ocvtp.tokens.loader.TokenDataset` has them."""

    def __len__(self) -> int:
        """How many images."""

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor | None, Sequence[Grid]]:
        """Tokens [B, N, C], mask [B, N] (True where there is a token; None if everywhere) and grids, one an image."""

    def split(self, validation_share: float, seed: int) -> tuple[list[int], list[int]]:
        """Images to train on, and to validate on."""


class Batch(NamedTuple):
    """Tokens of some images, in single precision, on the device.

    `names` are their ids, if the source has some; `handed_on_BNV` the same tokens in the layer that goes to the LLM;
    `touched_BSN` which tokens lie on each of an image's objects, if they are known.
    """

    indices: list[int]
    tokens_BNC: Tensor
    mask_BN: Tensor | None
    grids: list[Grid]
    names: list[str] | None = None
    handed_on_BNV: Tensor | None = None
    touched_BSN: Tensor | None = None


class WithRoom:
    """A source whose batches have at least so many columns: images of few tokens are padded for as many slots."""

    def __init__(self, source: TokenSource, columns: int) -> None:
        self.source, self.columns = source, columns
        self.image_ids: Sequence[str] | None = getattr(source, "image_ids", None)
        self.split = source.split

    def __len__(self) -> int:
        return len(self.source)

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor | None, Sequence[Grid]]:
        """As the source has it, padded at the end."""
        tokens_BNC, mask_BN, grids = self.source.batch(indices)
        missing = self.columns - tokens_BNC.shape[1]
        if missing <= 0:
            return tokens_BNC, mask_BN, grids
        there_BN = torch.ones(tokens_BNC.shape[:2], dtype=torch.bool) if mask_BN is None else mask_BN
        return pad(tokens_BNC, (0, 0, 0, missing)), pad(there_BN, (0, missing)), grids


class WithMore:
    """A source of whose images more is known: segmented objects, tokens in the layer that goes to the LLM."""

    def __init__(
        self, source: TokenSource, objects: Segmentations | None = None, handed_on: TokenSource | None = None
    ) -> None:
        self.source, self.objects, self.handed_on = source, objects, handed_on
        self.image_ids: Sequence[str] | None = getattr(source, "image_ids", None)
        self.split, self.batch = source.split, source.batch

    def __len__(self) -> int:
        return len(self.source)


def with_room(source: TokenSource, slots: int) -> TokenSource:
    """The source itself where all images of the VLM have as many tokens, else one with room for so many slots.

    There an image of few tokens takes part in a step with more slots, as it does beside larger images of its batch.
    """
    meta = getattr(source, "meta", None)
    return source if meta is None or meta.grid is not None else WithRoom(source, slots)


def fetch(source: TokenSource, indices: Sequence[int], device: torch.device) -> Batch:
    """The tokens of these images."""
    tokens_BNC, mask_BN, grids = source.batch(indices)
    mask_BN = None if mask_BN is None else mask_BN.to(device, non_blocking=True)
    tokens_BNC = tokens_BNC.to(device, non_blocking=True).float()
    ids: Sequence[str] | None = getattr(source, "image_ids", None)
    names = None if ids is None else [ids[index] for index in indices]
    handed_on_BNV, touched_BSN = None, None
    if isinstance(source, WithMore):
        if source.handed_on is not None:
            handed_on_BNV = fetch(source.handed_on, indices, device).tokens_BNC
        if source.objects is not None and names is not None:
            touched_BSN = source.objects.touched(names, grids, tokens_BNC.shape[1]).to(device, non_blocking=True)
    sides = [(height, width) for height, width in grids]
    return Batch(list(indices), tokens_BNC, mask_BN, sides, names, handed_on_BNV, touched_BSN)


class Order:
    """The images of each step: a new permutation each epoch."""

    def __init__(self, images: Sequence[int], batch_size: int, *, drop_last: bool, seed: int) -> None:
        if not images:
            raise BadInput("there are no images to train on")
        self.images = list(images)
        self.seed = seed
        self.batch_size = min(batch_size, len(self.images))
        whole, rest = divmod(len(self.images), self.batch_size)
        self.steps_per_epoch = whole + (rest > 0 and not drop_last)
        self._epoch: tuple[int, list[int]] = (-1, [])

    def indices(self, step: int) -> list[int]:
        """The images of a step."""
        epoch, place = divmod(step, self.steps_per_epoch)
        known, images = self._epoch
        if known != epoch:
            order = torch.randperm(len(self.images), generator=generator("ocvtp order", self.seed, epoch)).tolist()
            images = [self.images[i] for i in order]
            self._epoch = (epoch, images)
        return images[place * self.batch_size : (place + 1) * self.batch_size]

    def batches(
        self,
        source: TokenSource,
        first: int,
        last: int,
        device: torch.device,
        part: Callable[[list[int]], list[int]] = list,
    ) -> Generator[Batch]:
        """The batches of steps `first` to before `last`, or a `part` of each, read ahead."""
        steps = (part(self.indices(step)) for step in range(first, last))
        return read_ahead(lambda indices: fetch(source, indices, device), steps, _AHEAD)
