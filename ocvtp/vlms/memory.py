"""What a tower made of batches of images, kept for the next method that asks about the same batch.

An evaluation shows the same batches of questions to one method after another, and the tower is most of the work of a
small VLM. Nothing changes in results: a batch is found again only if every pixel of it is the same, in the same order.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Collection
from typing import Any

import torch

from ocvtp.vlms.family import Early, Family, Vision
from ocvtp.vlms.images import Images


class VisionMemory:
    """Encoded batches, the ones used last.

    Args:
        limit: bytes of tokens to hold, about. On a GPU nothing is held: its memory has better uses.
    """

    def __init__(self, limit: int = 512 * 2**20) -> None:
        self._limit, self._held = limit, 0
        self._layers = frozenset[int]()  # that anyone has asked for
        self._found: OrderedDict[bytes, tuple[Vision, frozenset[int], int]] = OrderedDict()

    def encode(self, family: Family, images: Images, layers: Collection[int]) -> Vision:
        """As `family.encode`, with values; may have more layers than are asked for."""
        if images.pixels.device.type != "cpu":
            return family.encode(images, layers)
        key, wanted = _digest(images), frozenset(layers)
        self._layers |= wanted
        known, there, size = self._found.pop(key, (None, frozenset[int](), 0))
        self._held -= size
        if known is None or not wanted <= there:
            wanted = self._layers  # so that a batch is seldom encoded twice: one method's layers are soon another's
            known = family.encode(images, wanted)
            tokens = sum(known.counts) * (len(wanted) + 1)  # and what values come from
            there, size = wanted, tokens * family.facts.width * images.pixels.element_size()
        self._found[key] = known, there, size
        self._held += size
        while self._held > self._limit:
            self._held -= self._found.popitem(last=False)[1][2]
        return known


class Remembering:
    """A family whose `encode` asks a memory first; all else is the family's own."""

    def __init__(self, family: Family, memory: VisionMemory) -> None:
        self._family, self._memory = family, memory

    def __getattr__(self, name: str) -> Any:
        return getattr(self._family, name)

    def encode(
        self, images: Images, layers: Collection[int], *, values: bool = True, ready: Early | None = None
    ) -> Vision:
        """As the family's; what is wanted before the tower is done is not in the memory."""
        if not values or ready is not None:
            return self._family.encode(images, layers, values=values, ready=ready)
        return self._memory.encode(self._family, images, layers)


def _digest(images: Images) -> bytes:
    digest = hashlib.sha256(repr(images.videos).encode())
    for tensor in (images.pixels, images.sizes):
        if tensor is not None:
            digest.update(repr((tensor.shape, tensor.dtype)).encode())
            digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.digest()
