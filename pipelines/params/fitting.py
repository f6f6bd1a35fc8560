"""Whether a method has a meaning on a VLM, and a budget that it can reach there: known before anything is loaded."""

from collections.abc import Mapping
from typing import Any

from ocvtp.errors import BadInput
from ocvtp.methods import Entry as Method
from ocvtp.methods import inside_tower
from ocvtp.methods.budget import Budget
from ocvtp.vlms import CatalogEntry
from ocvtp.vlms.catalogue import catalog
from ocvtp.vlms.families import family_class

MANY = 1000
"""Tokens of an image so large that rounding does not matter."""


def slots_of(slots: tuple[tuple[int, ...], ...], vlm: str) -> tuple[tuple[int, ...], ...]:
    """The values of the axis `slots` for a VLM: as given, or of `slots: own` those of the catalogue.

    Raises:
        BadInput: the catalogue has none for it.
    """
    if slots:
        return slots
    found: list[int] = catalog().get(vlm, {}).get("slots", [])
    if not found:
        raise BadInput(f"the catalogue has no slot counts of {vlm}: give a list, such as [16, 32, 48]")
    return (tuple(found),)


def lacking(method: Method, vlm: CatalogEntry, options: Mapping[str, Any]) -> str | None:
    """What the VLM lacks, as the rest of a sentence; None if nothing."""
    if "clip tower" in method.needs and not vlm.facts.cls:
        return f"needs a CLIP tower, and {vlm.name} has another"
    if "text tower" in method.needs and not vlm.text_tower and not options.get("clip"):
        return (
            f"needs the text tower of the CLIP that {vlm.name}'s tower was trained with, and the catalogue names none "
            f"(evaluate.options.{method.name}.clip may)"
        )
    if options.get(inside_tower.OPTION) and (why := inside_tower.unfit(family_class(vlm.family, vlm.name))):
        return f"with {inside_tower.OPTION} {why}"
    first = _first_pruned(method, vlm, options)
    if first < vlm.facts.added:
        return (
            f"drops tokens before layer {first} (from 0), and {vlm.name} adds features of its tower (DeepStack) to the "
            f"first {vlm.facts.added} layers"
        )
    return None


def _first_pruned(method: Method, vlm: CatalogEntry, options: Mapping[str, Any]) -> int:
    """First layer of the language model that reads fewer tokens than there are, for a method between layers."""
    if method.per_layer is None:
        return vlm.llm_layers
    try:
        read = method.by_layer(MANY, MANY - 1, vlm.llm_layers, options)
    except BadInput:
        return vlm.llm_layers  # `unreachable` says so of each budget
    return next((layer for layer, tokens in enumerate(read) if tokens < MANY), vlm.llm_layers)


def unreachable(method: Method, vlm: CatalogEntry, keep: Budget | None, options: Mapping[str, Any]) -> str | None:
    """Why the method cannot keep so few tokens of each image; None if it can, or if that depends on the image.

    A share does not: it is asked of an image of many tokens where images have different numbers.
    """
    whole = vlm.tokens or MANY
    if keep is None or (vlm.tokens is None and keep.share is None):
        return None
    try:
        method.by_layer(whole, keep.tokens(whole), vlm.llm_layers, options)
    except BadInput as error:
        return str(error)
    return None


def tokens_kept(keep: Budget, whole: int | None) -> int | None:
    """Of an image of `whole` tokens; None where that depends on the image, of which `whole` is then None."""
    return keep.count if whole is None else keep.tokens(whole)
