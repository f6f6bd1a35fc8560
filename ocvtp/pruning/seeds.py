"""A seed for each image that follows from the run's seed and the image alone: not from batch, order or machine."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def seeds_of(seed: int, samples: Sequence[str]) -> list[int]:
    """A seed of 63 bits for each sample."""
    digests = [hashlib.sha256(f"{seed}/{sample}".encode()).digest() for sample in samples]
    return [int.from_bytes(digest[:8], "big") >> 1 for digest in digests]


def name_of(pixels: Tensor) -> str:
    """A name for a picture that the caller gave none, from its pixels.

    They are rounded to bfloat16, so that a caller who casts them to the type of the model gets the same.
    """
    rounded = pixels.detach().to(torch.bfloat16).contiguous().cpu().view(torch.uint8)
    return hashlib.sha256(rounded.numpy().tobytes()).hexdigest()
