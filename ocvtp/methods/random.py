"""Tokens at random: the baseline that every method must beat. Uniform without replacement, over the whole image.

Letters: G images of a group, N tokens of an image, k tokens kept.
"""

from collections.abc import Mapping
from typing import Any

import torch

from ocvtp.methods.base import Encoded, Entry, Kept, Method, no_pruner
from ocvtp.vlms.family import Family


class Random(Method):
    """A sample of each image's tokens from its own generator."""

    def choose(self, encoded: Encoded) -> Kept:  # noqa: D102 - as in Method
        rows = [
            torch.randperm(encoded.count, generator=torch.Generator().manual_seed(seed))[: encoded.keep].sort().values
            for seed in encoded.seeds
        ]
        return Kept(torch.stack(rows))


def _build(family: Family, pruner: Any, options: Mapping[str, Any]) -> Method:
    no_pruner("random", pruner)
    return Random()


ENTRY = Entry(
    name="random",
    acts="before the LLM",
    needs_text=False,
    source="uniform without replacement",
    random=True,
    trained=False,
    options={},
    build=_build,
)
