"""Pruning methods, one file each, behind one small interface."""

from collections.abc import Mapping
from typing import Any

from ocvtp.errors import BadInput
from ocvtp.methods import (
    downsample,
    fastv,
    hiprune,
    oc_vtp,
    pyramiddrop,
    random,
    selections,
    sparsevlm,
    tome,
    trim,
    vanilla,
    visionzip,
)
from ocvtp.methods.base import Encoded, Entry, Kept, Method, nearest, options_of
from ocvtp.methods.budget import Budget, Keep

REGISTRY: Mapping[str, Entry] = {
    entry.name: entry
    for entry in (
        vanilla.ENTRY,
        random.ENTRY,
        downsample.ENTRY,
        oc_vtp.ENTRY,
        oc_vtp.UNTRAINED,
        *selections.ENTRIES,
        visionzip.ENTRY,
        hiprune.ENTRY,
        trim.ENTRY,
        tome.ENTRY,
        fastv.ENTRY,
        sparsevlm.ENTRY,
        pyramiddrop.ENTRY,
    )
}

__all__ = ["REGISTRY", "Budget", "Encoded", "Entry", "Keep", "Kept", "Method", "describe", "entry_of", "options_of"]


def entry_of(name: str) -> Entry:
    """The method of a name; `BadInput` offers the nearest."""
    if name not in REGISTRY:
        raise BadInput(f"no method {name!r}{nearest(str(name), REGISTRY)}")
    return REGISTRY[name]


def describe() -> list[dict[str, Any]]:
    """Name, where it acts, whether it reads the prompt, and source of each method."""
    return [{"name": e.name, "acts": e.acts, "needs_text": e.needs_text, "source": e.source} for e in REGISTRY.values()]
