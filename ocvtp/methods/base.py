"""What a pruning method is, and what it may look at.

Letters: G images of a group (all with the same N), N tokens of an image, C tower width, k tokens kept of an image,
V width of the values that the projector reads.
"""

import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from ocvtp.errors import BadInput
from ocvtp.vlms.family import Family, Grid, Vision

Acts = Literal["nowhere", "before the LLM", "inside the LLM"]


@dataclass(frozen=True)
class Look:
    """Images with equally many tokens, as a method before the LLM sees them.

    Attributes:
        vision: what the tower made of the batch.
        members: which images of it these are.
        keep: k.
        seeds: one an image, a function of the run's seed and of the image alone.
        grids: rows and columns of each image's tokens.
        prompts: token ids of the prompt that each image stands in, without placeholders and padding.
    """

    vision: Vision
    members: Sequence[int]
    keep: int
    seeds: list[int]
    grids: list[Grid]
    prompts: list[list[int]]

    @property
    def count(self) -> int:
        """N."""
        return self.vision.counts[self.members[0]]

    def tokens(self, layer: int) -> Tensor:
        """`hidden_states[layer]` without CLS, [G, N, C]; of the layers that the method asked for."""
        return self.vision.tokens(layer, self.members)

    def received(self, block: int) -> Tensor:
        """Attention that tokens receive in a block, [G, N], from `hidden_states[block]`."""
        return self.vision.received(block, self.members)


@dataclass(frozen=True)
class Kept:
    """What stays of the images of a group.

    Attributes:
        indices_Gk: numbers of tokens, ascending and distinct.
        values_GkV: what is handed on in place of those tokens' own values; None: their own.
    """

    indices_Gk: Tensor
    values_GkV: Tensor | None = None


class Method(ABC):
    """A way to choose tokens before the LLM, made for one model."""

    def layers(self) -> Collection[int]:
        """Indices into `hidden_states` of the layers that it looks at."""
        return ()

    @abstractmethod
    def choose(self, look: Look) -> Kept:
        """Choose `look.keep` tokens of each image."""


@dataclass(frozen=True)
class Entry:
    """A method in the register.

    Attributes:
        name: as in params.yaml.
        acts: where it takes tokens out.
        needs_text: it reads the prompt.
        source: where it comes from.
        random: its choice depends on the seed, so that several seeds are worth evaluating.
        trained: it needs a trained pruner.
        options: names of its options with their defaults.
        build: makes the method from the model's adapter, the pruner and all options; None prunes nothing.
    """

    name: str
    acts: Acts
    needs_text: bool
    source: str
    random: bool
    trained: bool
    options: Mapping[str, Any]
    build: Callable[[Family, Any, Mapping[str, Any]], Method | None]


def nearest(name: str, legal: Collection[str]) -> str:
    """What to add to a message about an unknown name: the nearest legal one, and all of them."""
    near = difflib.get_close_matches(name, list(legal), 1, 0.4)
    return (f"; did you mean {near[0]!r}?" if near else ";") + f" legal: {', '.join(legal) or 'none'}"


def options_of(entry: Entry, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options with defaults filled in; `BadInput` names an unknown one and the nearest."""
    for key in given:
        if key not in entry.options:
            raise BadInput(f"{entry.name} has no option {key!r}{nearest(key, entry.options)}")
    return {**entry.options, **given}


def no_pruner(entry_name: str, pruner: Any) -> None:
    """`BadInput` if a pruner is given to a method that has no use for it."""
    if pruner is not None:
        raise BadInput(f"{entry_name} uses no pruner: leave pruner out, or choose method='oc-vtp'")
