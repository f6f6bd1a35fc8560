"""Tokens for training: any row of any shard, in memory when they fit, else from memory-mapped files.

Letters: B images of a batch, N tokens (of the largest image of the batch), C width of a token.
"""

import hashlib
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ocvtp.errors import BadInput
from ocvtp.tokens.manifest import Shard, ShardMeta, check_agreement, read_layer_listing
from ocvtp.tokens.reader import open_shard
from ocvtp.tokens.rows import TokenRow

MEMORY_BUDGET: Final = 2 * 2**30
"""Bytes of tokens that are held in memory by default."""


class TokenBatch(NamedTuple):
    """Some images.

    Attributes:
        tokens_BNC: in the stored dtype, zero where an image has fewer tokens than the largest one.
        mask_BN: True where there is a token; None if all images have the same number.
        grids: height and width in tokens, one an image.
    """

    tokens_BNC: Tensor
    mask_BN: Tensor | None
    grids: list[tuple[int, int]]


class TokenDataset:
    """The rows of shards that were made alike, in the order given.

    Every row is checked against its checksum when it is first read; a damaged one is never handed out.

    Attributes:
        meta: common to all shards.
        image_ids, grids: of each row.
        in_memory: whether the tokens fit the memory budget and are loaded on first use.
    """

    def __init__(self, shards: Sequence[Shard], *, memory_budget: int = MEMORY_BUDGET) -> None:
        """Open the shards; reads no token yet.

        Args:
            shards: folder and manifest of each.
            memory_budget: bytes of tokens up to which all are held in memory.

        Raises:
            Incompatible: shards of another VLM, revision, layer, width, dtype or preprocessing; lists what differs.
            Corrupt: a shard is missing, truncated or not what its manifest says.
            BadInput: no shards, or an image in more than one row.
        """
        self.meta: ShardMeta = check_agreement(shards)
        self._shards = [open_shard(folder, manifest) for folder, manifest in shards]
        self._places = [(shard, row) for shard in self._shards for row in range(len(shard))]
        self.image_ids: list[str] = [name for shard in self._shards for name in shard.ids]
        self.grids: list[tuple[int, int]] = [grid for shard in self._shards for grid in shard.grids]
        if len(set(self.image_ids)) < len(self.image_ids):
            seen = set[str]()
            twice = next(name for name in self.image_ids if name in seen or seen.add(name))  # type: ignore[func-returns-value]
            where = [str(shard.path) for shard in self._shards if twice in shard.ids]
            raise BadInput(f"image {twice!r} is in the token shards more than once: {', '.join(where)}")
        self.in_memory = sum(manifest.bytes for _, manifest in shards) <= memory_budget
        self._held: list[NDArray[np.uint8]] | None = None
        self._lock = threading.Lock()

    @classmethod
    def from_listing(
        cls, listing: Path | str | dict[str, Any], root: Path | str, *, memory_budget: int = MEMORY_BUDGET
    ) -> "TokenDataset":
        """The data set of one layer, as stage `extract` lists it; `root` is the store."""
        return cls(read_layer_listing(listing, root), memory_budget=memory_budget)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> TokenRow:
        tokens_1NC, _, grids = self.batch([index])
        return TokenRow(self.image_ids[index], tokens_1NC[0], grids[0])

    def batch(self, indices: Sequence[int] | Tensor) -> TokenBatch:
        """The rows at `indices`, padded to the largest; `BadInput` if there are none or one is out of range.

        Raises:
            Corrupt: a row is damaged; names its shard, row and image.
        """
        chosen = [int(index) for index in indices]
        if not chosen:
            raise BadInput("a batch of no images was asked for")
        for index in chosen:
            if not 0 <= index < len(self):
                raise BadInput(f"row {index} of token shards with {len(self)} rows (0 to {len(self) - 1})")
        rows = [self._row(index) for index in chosen]
        grids = [self.grids[index] for index in chosen]
        counts = [height * width for height, width in grids]
        shape, dtype = (len(rows), max(counts), self.meta.width), self.meta.torch_dtype
        tokens_BNC = torch.empty(shape, dtype=dtype)
        bytes_BX = tokens_BNC.view(len(rows), -1).view(torch.uint8).numpy()
        for target_X, row in zip(bytes_BX, rows, strict=True):
            target_X[: row.size] = row
            target_X[row.size :] = 0
        if min(counts) == shape[1]:
            return TokenBatch(tokens_BNC, None, grids)
        mask_BN = torch.arange(shape[1]) < torch.tensor(counts)[:, None]
        return TokenBatch(tokens_BNC, mask_BN, grids)

    def split(self, validation_share: float, seed: int) -> tuple[list[int], list[int]]:
        """Rows for training and for validation.

        An image's side depends on the seed and its id alone (but for the first image, so that neither side is ever
        empty), and so does the order within each side: not on how the rows lie in shards.

        Args:
            validation_share: from 0 (no validation) to below 1; expected share of the images.
            seed: of the split.

        Raises:
            BadInput: the share is outside of that range, or leaves no image to train on.
        """
        if not 0 <= validation_share < 1:
            raise BadInput(f"validation_share is {validation_share}: 0 to below 1 is needed")
        draws = [_draw(seed, name) for name in self.image_ids]
        order = sorted(range(len(self)), key=lambda index: (draws[index], self.image_ids[index]))
        count = sum(draw < validation_share for draw in draws)
        if validation_share > 0:
            if len(self) < 2:
                raise BadInput("one image cannot be split: validation_share needs at least two, or 0")
            count = min(max(count, 1), len(self) - 1)
        return order[count:], order[:count]

    def _row(self, index: int) -> NDArray[np.uint8]:
        if not self.in_memory:
            shard, row = self._places[index]
            return shard.read_bytes(row)
        with self._lock:
            if self._held is None:
                self._held = self._load()
        return self._held[index]

    def _load(self) -> list[NDArray[np.uint8]]:
        """All rows as views into one block of memory."""
        rows = [shard.read_bytes(row) for shard, row in self._places]
        ends = np.cumsum([row.size for row in rows])
        block = np.empty(int(ends[-1]), np.uint8)
        views = [block[end - row.size : end] for row, end in zip(rows, ends, strict=True)]
        for view, row in zip(views, rows, strict=True):
            view[:] = row
        return views


def _draw(seed: int, image_id: str) -> float:
    """A number in [0, 1) that belongs to an image."""
    digest = hashlib.sha256(f"ocvtp split {seed} {image_id}".encode()).digest()
    return int.from_bytes(digest[:6]) / 2**48
