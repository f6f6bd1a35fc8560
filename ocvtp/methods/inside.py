"""What a method inside the LLM is: which layers drop tokens, by whose attention, and how many.

The prompt enters the language model whole. At each stage tokens of every image are scored by rows of one layer's
attention, the best stay, and from the layer `pruned` on the model reads the shorter prompt. How many tokens stay
follows from the number of tokens and the budget alone, never from what an image shows: so the cost of each layer is
known before, without weights (`Entry.per_layer`).

Budgets. `budget="average"` counts truly: the tokens of an image that each layer reads, summed over the layers and
divided by their number, come as near to `keep` as whole numbers allow and never above. The first layers read
everything, so there is a least average; a budget below it is refused with that number. `budget="reference"` counts as
the authors of each method do; their pages say how.

Depth. Authors give layers for models of 32. In a model of another depth they stand at the same share of it, rounded,
at least one layer after each other, the first never before the second layer; stages past the end are left out. Four
layers (tiny-llava): tokens are dropped before layers 1, 2 and 3, counted from 0.

Several images in a prompt: each has its own budget. Their scores come from the same attention rows, each a softmax
over the whole prompt, but they compete within one image only.

Letters: G images of a group, N tokens of an image, d tokens dropped, c tokens made of them, T tokens of a text,
D width of the LLM.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from ocvtp.errors import BadInput, Incompatible
from ocvtp.methods.base import Encoded, Kept, Method, one_of
from ocvtp.vlms.family import Family

BUDGETS = ("average", "reference")
AUTHORS_DEPTH = 32
"""Layers of the models for which authors give theirs."""


@dataclass(frozen=True)
class PruneStage:
    """Scored by the attention of layer `scored`; layer `pruned` is the first that reads the shorter prompt."""

    scored: int
    pruned: int


@dataclass(frozen=True)
class Step:
    """What stays of an image at a stage: tokens `kept` as they are, and tokens `merged` from the others."""

    kept: int
    merged: int = 0

    @property
    def tokens(self) -> int:
        """Together."""
        return self.kept + self.merged


class HeadRows(NamedTuple):
    """HeadRows of attention of some images, for a method that weighs heads and rows itself.

    Attributes:
        weights_IHRT: of each head, float32; each row a softmax over what it sees.
        real_IR: which rows count.
        vision_IT: which columns are tokens of the image.
        near_IRT: how alike the positions of row and column are to a query and a key of ones, 1 for the same position;
            computed when it is called.
    """

    weights_IHRT: Tensor
    real_IR: Tensor
    vision_IT: Tensor
    near_IRT: Callable[[], Tensor]


class Attention(Protocol):
    """Attention that tokens receive."""

    def __call__(self, weigh: Callable[[HeadRows], Tensor] | None = None) -> Tensor:
        """[I, N] float32: mean over heads and rows, or what `weigh` makes of them, [I, T]."""


@dataclass(frozen=True)
class Scored:
    """What a layer is about to read of some images, for a stage that scores their tokens.

    Attributes:
        states_IND: hidden states of each image's tokens, filled up with its first where it has fewer than others.
        there_IN: which of them are tokens.
        attention: attention that they receive from the rows that ask (`raters`, or the last token of the prompt);
            computed when it is called.
        keys: length of the layer's keys at their positions, sum of absolute values, of each image's tokens [I, N] and
            of the tokens that ask [I, R]; computed when it is called.
        stage: its number.
        tower_IN: what the method's own `choose` said of the tokens (`Kept.scores_Gk`); 0 where it said nothing.
    """

    states_IND: Tensor
    there_IN: Tensor
    attention: Attention
    keys: Callable[[], tuple[Tensor, Tensor]]
    stage: int
    tower_IN: Tensor


@dataclass(frozen=True)
class Later:
    """What the layer is about to read that drops tokens, for a method that ranks them anew there (`rank`).

    Attributes:
        states_IND: hidden states of each image's tokens, after the model's last norm.
        there_IN: which of them are tokens.
        asks_IRD: hidden states of the tokens that ask, likewise.
        asks_IR: which of these count.
        asks_keys_IR: length of their keys at the layer that scored.
        asking: of each image how many ask.
        counts: of each image how many tokens there are.
        kept: of each image how many are to stay.
    """

    states_IND: Tensor
    there_IN: Tensor
    asks_IRD: Tensor
    asks_IR: Tensor
    asks_keys_IR: Tensor
    asking: list[int]
    counts: list[int]
    kept: list[int]


class Inside(Method):
    """A way to drop tokens between layers of the language model, made for models of one depth."""

    positions: Literal["compact", "original"]
    """Of the tokens that stay, unless the caller wants it otherwise."""
    reads_attention: bool = True
    """Its scores are made of a layer's attention, whose parts must be such as can be read."""
    reads_text: bool = False
    """It has raters. Without them the one row of attention is that of the token which asks, the last of the prompt."""
    reads_later: bool = False
    """It ranks tokens once more at the layer that drops them (`rank`)."""
    adapts_at: int | None = None
    """The stage after whose scores it knows how many tokens of each image stay (`adapted`); None: it always does."""

    def __init__(self, depth: int, budget: str, stages: Sequence[PruneStage]) -> None:
        one_of(self.name, {"budget": budget}, "budget", BUDGETS)
        if not stages:
            raise BadInput(f"{self.name} drops tokens between layers, but the language model has {depth} of them")
        for needed in ("information", "adapted"):
            if self.adapts_at is not None and getattr(type(self), needed) is getattr(Inside, needed):
                raise BadInput(f"{self.name} adapts to each image (adapts_at is {self.adapts_at}): write `{needed}`")
        self.depth, self.budget, self.stages = depth, budget, tuple(stages)
        self._plans: dict[tuple[int, int], list[Step]] = {}

    @abstractmethod
    def steps(self, tokens: int, keep: int) -> list[Step]:
        """What stays of an image of so many tokens, one step a stage.

        Raises:
            BadInput: a budget that cannot be reached; names the least that can.
        """

    def planned(self, tokens: int, keep: int) -> list[Step]:
        """As `steps`, found once for images of a size."""
        if (tokens, keep) not in self._plans:
            self._plans[tokens, keep] = self.steps(tokens, keep)
        return self._plans[tokens, keep]

    def raters(self, vision_ND: Tensor, text_TD: Tensor) -> Tensor:
        """Which tokens of the text after an image rate it, [T] bool, from the embeddings of both.

        If none does, the token that asks is the one rater.
        """
        return torch.zeros(len(text_TD), dtype=torch.bool, device=text_TD.device)

    def score(self, scored: Scored) -> Tensor:
        """Scores of the images' tokens at a stage, [I, N]: the highest stay, of equals the first. Here: attention."""
        return scored.attention()

    def rank(self, scores_IN: Tensor, later: Later) -> Tensor:
        """Scores anew, [I, N], of a method that `reads_later`. Here: as they are."""
        return scores_IN

    def information(self, scored: Scored) -> Tensor:
        """What `adapted` reads of each image, [I], at the stage `adapts_at`; a method that has one must say so."""
        raise BadInput(f"{self.name} does not say what it reads of an image: write `information`")

    def adapted(self, tokens: int, keep: int, information: float) -> list[Step]:
        """As `steps`, for an image of which that is known: costs may not be above those of `steps` on average."""
        raise BadInput(f"{self.name} does not say how many tokens of an image stay: write `adapted`")

    def enter(self, tokens: int, keep: int) -> int:
        """How many tokens of an image enter the language model. Here: all."""
        return tokens

    def merge(self, dropped_GdD: Tensor, scores_Gd: Tensor, merged: int) -> tuple[Tensor, Tensor]:
        """Tokens made of dropped ones, [G, c, D], and which of those [G, c] each stands for; none by default."""
        none_G0 = torch.empty(len(scores_Gd), 0, dtype=torch.long, device=scores_Gd.device)
        return dropped_GdD[:, :0], none_G0

    def per_layer(self, tokens: int, keep: int) -> list[int]:
        """Tokens of an image that each layer reads."""
        return counts(self.depth, tokens, self.stages, self.planned(tokens, keep))

    def choose(self, encoded: Encoded) -> Kept:
        """Hand everything on."""
        return Kept(torch.arange(encoded.count).expand(len(encoded.members), -1))

    def refuse(self, tokens: int, keep: int, least: int, *, ways: Sequence[str] = ()) -> BadInput:
        """The error about a budget below the least average, and ways around it."""
        first = self.stages[0].pruned
        who = "the first layer reads" if first == 1 else f"the first {first} layers read"
        return BadInput(
            f"{self.name} cannot keep {keep} of {tokens} tokens an image on average over {self.depth} layers: {who} "
            f"all of them, so at least {-(-least // self.depth)} are needed" + "".join(f"; {way}" for way in ways)
        )


def counts(depth: int, tokens: int, stages: Sequence[PruneStage], steps: Sequence[Step]) -> list[int]:
    """Tokens of an image that each layer reads."""
    found = [tokens] * depth
    for stage, step in zip(stages, steps, strict=True):
        found[stage.pruned :] = [step.tokens] * (depth - stage.pruned)
    return found


def scaled(layers: Sequence[int], depth: int) -> list[int]:
    """Layers of a model of 32 at the same share of another depth: rounded, rising, from 1 on, within the model."""
    found: list[int] = []
    for layer in layers:
        found.append(max(round(layer * depth / AUTHORS_DEPTH), found[-1] + 1 if found else 1))
    return [layer for layer in found if layer < depth]


def listed(name: str, option: str, given: Any, low: int, high: int) -> list[int]:
    """Layers that the caller wants: whole numbers that rise, within bounds; `BadInput` otherwise."""
    layers = list(given) if isinstance(given, list | tuple) else [given]
    whole = all(isinstance(layer, int) and not isinstance(layer, bool) and low <= layer <= high for layer in layers)
    if not layers or not whole or layers != sorted(set(layers)):
        raise BadInput(f"{name} has no {option}={given!r}: rising whole numbers from {low} to {high} are needed")
    return layers


def largest(fits: Callable[[float], bool]) -> float:
    """The largest number in [0, 1] that fits, where all below one do; 0 is taken for granted."""
    if fits(1.0):
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def fill(kept: Sequence[int], total: Callable[[Sequence[int]], int | None], limit: int) -> list[int]:
    """Raise numbers one by one as long as their total stays within a limit, the one that costs most first.

    `total` is None for numbers that cannot be.
    """
    best = list(kept)
    while True:
        more = [[number + (i == stage) for i, number in enumerate(best)] for stage in range(len(best))]
        sums = [total(each) for each in more]
        costs = [(cost, -stage) for stage, cost in enumerate(sums) if cost is not None and cost <= limit]
        if not costs:
            return best
        best = more[-max(costs)[1]]


def depth_of(name: str, family: Family) -> int:
    """Layers of the language model, for the method of that name.

    Raises:
        Incompatible: layers without attention, or that look at a window only, whose masks and caches follow another
            rule.
    """
    config = family.model.get_decoder().config
    kinds = set(getattr(config, "layer_types", None) or [])
    window = getattr(config, "sliding_window", None)
    if kinds - {"full_attention"} or (window is not None and not kinds):
        raise Incompatible(
            f"{name} drops tokens inside the language model, which cannot be done here: its layers are not all of full "
            f"attention (sliding_window={window}, layer_types={sorted(kinds)}); choose a method before the LLM"
        )
    return int(config.num_hidden_layers)


def per_layer(build: Callable[[int, Mapping[str, Any]], Inside]) -> Callable[[int, int, int, Mapping[str, Any]], Any]:
    """`Entry.per_layer` of a method that is made from depth and options."""

    def found(tokens: int, keep: int, depth: int, options: Mapping[str, Any]) -> list[int]:
        return build(depth, options).per_layer(tokens, keep)

    return found
