"""Whether a method has a meaning on a VLM, and a budget that it can reach there: known before anything is loaded."""

from collections.abc import Mapping
from typing import Any

from ocvtp.errors import BadInput
from ocvtp.methods import Entry as Method
from ocvtp.methods import options_of
from ocvtp.methods.budget import Budget
from ocvtp.vlms import CatalogEntry


def lacking(method: Method, vlm: CatalogEntry, options: Mapping[str, Any]) -> str | None:
    """What the VLM lacks, as the rest of a sentence; None if nothing."""
    if "clip tower" in method.needs and not vlm.facts.cls:
        return f"needs a CLIP tower, and {vlm.name} has another"
    if "text tower" in method.needs and not vlm.text_tower and not options.get("clip"):
        return (
            f"needs the text tower of the CLIP that {vlm.name}'s tower was trained with, and the catalogue names none "
            f"(evaluate.options.{method.name}.clip may)"
        )
    return None


def by_layer(method: Method, vlm: CatalogEntry, whole: int, keep: int, options: Mapping[str, Any]) -> list[int]:
    """Tokens of an image that each layer of the language model reads.

    Raises:
        BadInput: the method cannot keep so few; names how many it can.
    """
    if method.per_layer is None:
        return [keep] * vlm.llm_layers
    return method.per_layer(whole, keep, vlm.llm_layers, options_of(method, options))


def unreachable(method: Method, vlm: CatalogEntry, keep: int | None, options: Mapping[str, Any]) -> str | None:
    """Why the method cannot keep so few tokens of each image; None if it can, or if that depends on the image."""
    if keep is None or vlm.tokens is None:
        return None
    try:
        by_layer(method, vlm, vlm.tokens, keep, options)
    except BadInput as error:
        return str(error)
    return None


def tokens_kept(keep: Budget, whole: int | None) -> int | None:
    """Of an image of `whole` tokens; None where that depends on the image, of which `whole` is then None."""
    return keep.count if whole is None else keep.tokens(whole)
