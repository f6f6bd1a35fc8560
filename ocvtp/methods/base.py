"""What a pruning method is, and what it may look at.

Letters: G images of a group (all with the same N), N tokens of an image, C tower width, k tokens kept of an image,
V width of the values that the projector reads.
"""

import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ocvtp.errors import BadInput
from ocvtp.vlms.family import Family, Vision
from ocvtp.vlms.images import Grid, Images, Layout

Acts = Literal["nowhere", "before the LLM", "inside the LLM"]


@dataclass(frozen=True)
class Encoded:
    """Images whose tokens stand alike, as a method before the LLM sees them.

    Attributes:
        vision: what the tower made of the batch.
        members: which images of it these are.
        keep: k.
        seeds: one an image, a function of the run's seed and of the image alone.
        grids: rows and columns of each image's tokens.
        prompts: token ids of the prompt that each image stands in, without placeholders and padding.
        project: values [k, V] of each of some images as the language model reads them.
    """

    vision: Vision
    members: Sequence[int]
    keep: int
    seeds: list[int]
    grids: list[Grid]
    prompts: list[list[int]]
    project: Callable[[Sequence[Tensor]], list[Tensor]] = list

    @property
    def layout(self) -> Layout:
        """Where the tokens of each of these images stand."""
        return self.vision.layout(self.members[0])

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

    def attention(self, block: int, *, cls: bool) -> Tensor:
        """How much tokens matter in a block, [G, N]: attention that CLS pays, or, without one, that they receive."""
        return self.vision.from_cls(block, self.members) if cls else self.received(block)

    def projected(self) -> Tensor:
        """All tokens as the language model would read them, [G, N, D]: the projector runs on each of them."""
        return torch.stack(self.project(list(self.vision.values(self.members))))


@dataclass(frozen=True)
class Kept:
    """What stays of the images of a group.

    A method that puts something in the place of tokens, such as their mean, says which token it stands for: its number
    is kept, others of them are not. So k is always what the LLM reads, and kept numbers are always places in the image.

    Attributes:
        indices_Gk: numbers of tokens, ascending and distinct; -1 at the end stands for none.
        values_GkV: what is handed on in place of those tokens' own values, in the order in which the LLM reads it;
            None: their own.
        scores_Gk: a number for each of them that a method inside the LLM asks for (`Inside.reads_tower`).
    """

    indices_Gk: Tensor
    values_GkV: Tensor | None = None
    scores_Gk: Tensor | None = None


class Method(ABC):
    """A way to choose tokens before the LLM, made for one model."""

    name: str = ""
    """Of its entry in the register."""
    fewer: bool = False
    """It may keep fewer tokens than it is asked for."""
    needs_text: bool = False
    """It reads the prompts, if it is given to `ocvtp.prune` itself; of one in the register its entry says so."""
    random: bool = False
    """It reads the seeds, likewise."""
    by_states: bool = False
    """It chooses by `layers` alone (`Encoded.tokens`, `received`), and hands on the tokens' own values, so that it need
    not wait for the rest of the tower (`ocvtp.streams`)."""

    def layers(self) -> Collection[int]:
        """Indices into `hidden_states` of the layers that it looks at."""
        return ()

    def encode(self, family: Family, images: Images, keeps: Sequence[int]) -> Vision:
        """Run the tower once. A method that changes what the tower does has a pass of its own here.

        `keeps` is k of each image.
        """
        return family.encode(images, self.layers())

    @abstractmethod
    def choose(self, encoded: Encoded) -> Kept:
        """Choose `encoded.keep` tokens of each image."""

    def slots(self, encoded: Encoded) -> Tensor | None:
        """Attention of K slots over the tokens by which it chooses, [G, K, N]; None of methods without slots."""
        return None


@dataclass(frozen=True, kw_only=True)
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
        positions: of the tokens that stay, unless the caller wants it otherwise.
        per_layer: inside the LLM: from tokens of an image, keep, layers of the LLM and all options, how many tokens of
            the image each layer reads; `BadInput` for a budget that cannot be reached. None: `keep` in each.
        text_asks: inside the LLM: tokens are ranked by every token of the text after an image, not by the last alone.
        without_cls: what it does where the vision tower has no CLS token, if it reads that.
        needs: what a VLM must have.
        loses: options, and values of them with which it may keep fewer tokens than it is asked for.
    """

    name: str
    build: Callable[[Family, Any, Mapping[str, Any]], Method | None]
    source: str
    acts: Acts = "before the LLM"
    needs_text: bool = False
    random: bool = False
    trained: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    positions: Literal["compact", "original"] = "compact"
    per_layer: Callable[[int, int, int, Mapping[str, Any]], list[int]] | None = None
    text_asks: bool = False
    without_cls: str = ""
    needs: frozenset[Literal["clip tower", "text tower"]] = frozenset()
    loses: Mapping[str, Collection[Any]] = field(default_factory=dict)

    def by_layer(self, tokens: int, keep: int, depth: int, given: Mapping[str, Any]) -> list[int]:
        """Tokens of an image of `tokens` that each of the `depth` layers of the LLM reads.

        Args:
            tokens: of the unpruned image.
            keep: of them, the budget.
            depth: layers of the LLM.
            given: options of the method; those that are not given have their defaults.

        Raises:
            BadInput: the method cannot keep so few; names how many it can.
        """
        if self.per_layer is None:
            return [keep] * depth
        return self.per_layer(tokens, keep, depth, options_of(self, given))


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


BEHAVIOURS = ("default", "reference")
"""Default does what is right, reference what the authors' code does."""


def behave(name: str, options: Mapping[str, Any], reference: Mapping[str, tuple[Any, Any]]) -> dict[str, Any]:
    """Options in which those that were left None are as the behaviour has them.

    Args:
        name: of the method.
        options: as `options_of` returns them, `behaviour` among them.
        reference: what default and reference have for each option on which they differ.

    Raises:
        BadInput: an unknown behaviour.
    """
    one_of(name, options, "behaviour", BEHAVIOURS)
    which = BEHAVIOURS.index(options["behaviour"])
    return {
        **options,
        **{option: both[which] for option, both in reference.items() if options[option] is None},
    }


def one_of(name: str, options: Mapping[str, Any], option: str, legal: Sequence[Any]) -> None:
    """`BadInput` unless an option has one of its legal values."""
    value = options[option]
    if not any(value == each and type(value) is type(each) for each in legal):
        raise BadInput(f"{name} has no {option}={value!r}: legal: {', '.join(map(repr, legal))}")


def whole(name: str, options: Mapping[str, Any], option: str, least: int = 0) -> None:
    """`BadInput` unless an option is None or a whole number that is large enough."""
    value = options[option]
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
        raise BadInput(f"{name} has no {option}={value!r}: a whole number, at least {least}, is needed")
