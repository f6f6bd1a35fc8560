"""Options of the methods of this package by name and type, for editors and type checkers."""

from collections.abc import Sequence
from typing import Any, Literal, TypedDict


class Options(TypedDict, total=False):
    """What `ocvtp.prune` takes beside its own arguments; which method takes which, with defaults, stands in its entry
    (`ocvtp.methods.REGISTRY[method].options`), and what they mean in the docstring of its module.
    """

    behaviour: Literal["default", "reference"]
    """Do what is right, or what the authors' code does."""
    layer: int
    """That the choice is made on, counted as in the paper: 9 is `hidden_states[9]`, -2 the last but one."""
    tiles: Literal["even", "floor", "together"]
    """How tiles of an image share its budget."""

    # oc-vtp, oc-vtp-untrained
    slots: int
    top_k: int
    fill: Literal["slot_mass", "attention", "next_best", "random", "none"]
    assignment: str
    surplus: str
    precision: str
    queries: Any
    other_vlm: bool
    weights_seed: int

    # visionzip, tome
    contextual: int
    cls: bool
    merge: Literal["mean", "sum"]
    order: Literal["raster", "appended", "merged"]

    # hiprune
    object_layer: int
    alpha: float
    edges: Literal["cut", "wrap"]
    exclude: Literal["always", "minus one"]

    # trim
    clip: Any
    clip_tokenizer: Any
    tokenizer: Any
    question: str
    similarity: Literal["cosine", "dot"]
    rank: Literal["similarity", "softmax"]
    mean: Literal["place", "end"]

    # inside the LLM
    budget: Literal["average", "reference"]
    k: int
    layers: Sequence[int]
    recycle: bool
