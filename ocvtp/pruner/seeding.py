"""Random numbers that are a function of what they are for: not of order, batch or machine.

Letters: B images, K slots, D slot width.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

import torch
from torch import Tensor

_BLOCK: Final = 16
"""PyTorch makes normal numbers on a CPU in blocks of this many; whole blocks are the same in a longer draw."""


def derive(*parts: int | str) -> int:
    """A seed of 63 bits that belongs to these words and numbers."""
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8]) >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A generator on the CPU, seeded with `derive`."""
    return torch.Generator().manual_seed(derive(*parts))


@lru_cache(maxsize=4096)
def slot_noise(seed: int, sample: int, slots: int, width: int) -> Tensor:
    """Standard normal noise of one sample, [slots, width], on the CPU.

    Noise for fewer slots is the beginning of noise for more.
    """
    count = -(-slots * width // _BLOCK) * _BLOCK
    flat = torch.randn(count, generator=generator("ocvtp slots", seed, sample))
    return flat[: slots * width].view(slots, width)


def batch_noise(seed: int, samples: Sequence[int], slots: int, width: int) -> Tensor:
    """`slot_noise` of several samples, [B, K, D], on the CPU."""
    return torch.stack([slot_noise(seed, sample, slots, width) for sample in samples])
