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
    inside_tower: bool
    """The tower's blocks after the layer that chooses see the kept tokens alone (`ocvtp.methods.inside_tower`)."""

    # css
    spread: float
    """What a pick gains is multiplied by its distance from the nearest one to this power; 0: is not."""
    spread_layer: int
    """In which distances are taken."""

    # oc-vtp, oc-vtp-untrained
    slots: int
    top_k: int
    fill: Literal["slot_mass", "attention", "next_best", "random", "none"]
    assignment: str
    mass_power: float
    surplus: str
    precision: str
    queries: Any
    other_vlm: bool
    weights_seed: int

    # visionzip, tome, prunesid, holov, promprune
    contextual: int
    cls: bool
    merge: Literal["mean", "sum"]
    order: Literal["raster", "appended", "merged", "picked"]

    # hiprune, scope, holov
    object_layer: int
    alpha: float
    edges: Literal["cut", "wrap"]
    exclude: Literal["always", "minus one"]

    # holov, promprune, vispruner, vscan-before
    strips: int
    overflow: Literal["shared", "lost"]
    single: Literal["scaled", "raw"]
    mu: float
    tau: float
    important: float
    removed: int
    window: int

    # trim, cdpruner
    clip: Any
    clip_tokenizer: Any
    tokenizer: Any
    question: str
    similarity: Literal["dot", "cosine"]
    rank: Literal["similarity", "softmax"]
    mean: Literal["place", "end"]

    # inside the LLM
    budget: Literal["average", "reference"]
    k: int | Literal["middle"]
    layers: Sequence[int]
    recycle: bool
    image_pivots: int
    text_pivots: int

    # vscan, and other pairs of a method before the LLM and one inside it; each also takes what its methods take, with
    # before_ and inside_ in front
    split: float
    before_behaviour: Literal["default", "reference"]
    before_window: int
    before_recycle: bool
    before_tiles: Literal["even", "floor"]
    inside_budget: Literal["average", "reference"]
