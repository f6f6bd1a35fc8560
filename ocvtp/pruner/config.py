"""What an OC-Pruner is made of. Two behaviours wherever the authors' code and good sense differ.

Every option may be given by itself; what is left "auto" follows `behaviour`. A config holds no "auto" once made, so
that the JSON of it says all.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, Literal, TypeVar

from torch import Tensor

from ocvtp.errors import BadInput

C = TypeVar("C")
AUTO: Final[Any] = "auto"
Behaviour = Literal["default", "reference"]
BEHAVIOURS: Final = ("default", "reference")
DECODERS: Final = ("random_ar", "mlp", "ar")
QUERIES: Final = ("shared_gaussian", "separate_gaussian", "qr", "fps")
FILLS: Final = ("slot_mass", "attention", "next_best", "random", "none")

VISIBLE_SHARES: Final[Mapping[str, float]] = {"4%": 24 / 576, "10%": 0.1}
"""Shares of visible tokens by name: what the authors' constant of 24 is of 576, and what it was meant to be."""

CHOICES: Final[Mapping[str, tuple[Any, ...]]] = {
    "behaviour": BEHAVIOURS,
    "queries": QUERIES,
    "query_noise": ("fixed", "fresh"),
    "truncation": ("bilevel", "none"),
    "decoder": (*DECODERS, None),
    "positions": ("grid", "table"),
    "eval_visible": ("share", "all"),
    "assignment": ("shared", "distinct", "residual", "gain", "mass"),
    "residual_of": ("own", "handed_on"),
    "fill": FILLS,
    "surplus": ("attention", "hash"),
}

BY_BEHAVIOUR: Final[Mapping[str, tuple[Any, Any]]] = {
    # option: (default, reference)
    "query_noise": ("fixed", "fresh"),  # the authors draw at inference too, so that no answer can be repeated
    "ffn_dropout": (0.0, 0.01),  # noise that buys nothing measurable and costs time
    "equal_layers": (False, True),  # the authors' decoder layers are copies of one at first
    "positions": ("grid", "table"),  # a table of 576 fits one grid only
    "visible_count": (None, 24),  # a constant taken over from images of 256 tokens
    "eval_visible": ("share", "all"),  # with all tokens visible, validation measures copying
    "extra_slot": (False, True),  # one slot more than tokens to keep; it is drawn, then thrown away or doubled
    "fill": ("slot_mass", "attention"),  # needs no attention weights of the tower
    "surplus": ("attention", "hash"),  # which pick goes if there is one too many
}
"""Where the behaviours differ in the model and in its use; `training.train_config` has the same for training."""


@dataclass(frozen=True)
class PrunerConfig:
    """Everything that determines an OC-Pruner but its weights.

    Attributes:
        token_dim: width C of the vision tokens.
        behaviour: `default` or `reference` (the authors' code), for all that is "auto".
        grid: height and width in tokens of the images to train on: the size of the table of positions, and what
            `grid=None` means in a call with as many tokens.
        slot_dim: width D of a slot; half of the tokens' unless given, at least 64.
        hidden_dim: inside the projection; twice the tokens' width.
        ffn_dim: inside the FFN of slot attention; four times the slots' width.
        ffn_dropout: of that FFN.
        iterations: of slot attention.
        truncation: `bilevel` lets gradients through the last iteration only, and straight to the queries.
        queries: `shared_gaussian` (any number of slots), `separate_gaussian` (one Gaussian a slot), or the projected
            tokens that `qr` or `fps` of `ocvtp.selection` chooses, as many as there are slots: no noise.
        max_slots: number of slots of `separate_gaussian`, which can have no other; None otherwise.
        query_noise: `fixed` draws the noise of a sample from `query_seed`; `fresh` from a generator at each call.
        query_seed: of the fixed noise.
        decoder: `random_ar`, `mlp`, `ar`, or None for a pruner that only prunes.
        decoder_layers, decoder_heads, decoder_ffn_dim: its size; its width is the tokens'.
        equal_layers: the layers of the decoder start as copies of one.
        positions: `grid` (two-dimensional, resampled to any grid) or `table` (learnt, one length).
        visible: share of the tokens that `random_ar` sees when it does not draw a number; "4%" and "10%" are names.
        visible_count: an absolute number instead, as in the authors' code.
        random_visible: how often it does draw a number, uniform from none to all but two.
        eval_visible: what it sees outside training, `share` (as `visible` says, always the same) or `all`.
        extra_slot: selection uses one slot more than tokens to keep; the authors' code for towers with a CLS token.
        assignment: `shared` (slots may pick the same token, then `fill`), `distinct` (each gets its own), `residual`
            (the same, and those that earlier picks leave most of come first), `gain` (those that lower the residual
            of all tokens most), or `mass` (as `gain`, times the slot mass of the token to the power `mass_power`):
            `ocvtp.selection.proposals`.
        residual_of: of which tokens the last three look at what picks leave, and the loss `span` at what they rebuild:
            of those that slots are gathered from (`own`), or of those of the layer that goes to the LLM (`handed_on`).
        mass_power: of `mass`: 0 is greedy column subset selection, much of it leaves the choice to the slots.
        fill: which tokens make up for picks that coincide: `slot_mass`, `attention` (scores given by the caller),
            `next_best`, `random` or `none` (fewer tokens).
        surplus: which pick goes if there are too many: the least attended, or by Python's `hash` order.
    """

    token_dim: int
    behaviour: Behaviour = "default"
    grid: tuple[int, int] = (24, 24)
    slot_dim: int = AUTO
    hidden_dim: int = AUTO
    ffn_dim: int = AUTO
    ffn_dropout: float = AUTO
    iterations: int = 3
    truncation: str = "bilevel"
    queries: str = "shared_gaussian"
    max_slots: int | None = None
    query_noise: str = AUTO
    query_seed: int = 0
    decoder: str | None = "random_ar"
    decoder_layers: int = 4
    decoder_heads: int = AUTO
    decoder_ffn_dim: int = AUTO
    equal_layers: bool = AUTO
    positions: str = AUTO
    visible: float = VISIBLE_SHARES["4%"]
    visible_count: int | None = AUTO
    random_visible: float = 0.5
    eval_visible: str = AUTO
    extra_slot: bool = AUTO
    assignment: str = "shared"
    residual_of: str = "own"
    mass_power: float = 0.08
    fill: str = AUTO
    surplus: str = AUTO

    def __post_init__(self) -> None:
        check_whole("token_dim", self.token_dim, 1)
        check_choices(self, CHOICES, skip_auto=True)
        for name, value in self._sizes().items():
            if getattr(self, name) == AUTO:
                object.__setattr__(self, name, value)
        resolve(self, BY_BEHAVIOUR)
        given: Any = self.visible
        if isinstance(given, str):
            if given not in VISIBLE_SHARES:
                raise BadInput(f"visible is {given!r}: a share, or one of {', '.join(VISIBLE_SHARES)}")
            object.__setattr__(self, "visible", VISIBLE_SHARES[given])
        sides: Any = self.grid
        if isinstance(sides, list):
            object.__setattr__(self, "grid", tuple(sides))
        self._check()

    @property
    def grid_tokens(self) -> int:
        """Tokens on `grid`."""
        return self.grid[0] * self.grid[1]

    def to_dict(self) -> dict[str, Any]:
        """JSON of this."""
        return {**asdict(self), "grid": list(self.grid)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "PrunerConfig":
        """The inverse of `to_dict`; `BadInput` names keys that are no options or are missing."""
        return from_dict(cls, data, "the config of a pruner")

    def judged(self, tokens: Tensor, handed_on: Tensor | None, assignment: str | None = None) -> Tensor:
        """Of which tokens an assignment looks at what picks leave: [B, N, C] or [B, N, V].

        Args:
            tokens: those that slots are gathered from, [B, N, C].
            handed_on: the same in the layer that goes to the LLM, [B, N, V].
            assignment: None for the config's.

        Raises:
            BadInput: they are needed and not there, or of other images.
        """
        return tokens if (assignment or self.assignment) in ("shared", "distinct") else self.rebuilt(tokens, handed_on)

    def rebuilt(self, tokens: Tensor, handed_on: Tensor | None) -> Tensor:
        """Which tokens the kept ones are to rebuild, by `residual_of`: [B, N, C] or [B, N, V]; raises as `judged`."""
        if self.residual_of == "own":
            return tokens
        if handed_on is None:
            raise BadInput("residual_of is handed_on: the same tokens in the layer that goes to the LLM are needed, "
                           "as handed_on")  # fmt: skip
        if handed_on.ndim != 3 or handed_on.shape[:2] != tokens.shape[:2]:
            raise BadInput(f"handed_on {list(handed_on.shape)} of tokens {list(tokens.shape)}: "
                           f"{list(tokens.shape[:2])} and a width are needed")  # fmt: skip
        return handed_on

    def _sizes(self) -> dict[str, int]:
        """Sizes that follow from the width of the tokens: those of the paper's pruner at width 1024."""
        slot_dim = max(64, self.token_dim // 2) if self.slot_dim == AUTO else self.slot_dim
        fits = (heads for heads in (4, 3, 2) if self.token_dim % heads == 0 and self.token_dim // heads >= 32)
        return {
            "slot_dim": slot_dim,
            "hidden_dim": 2 * self.token_dim,
            "ffn_dim": 4 * slot_dim,
            "decoder_heads": next(fits, 1),
            "decoder_ffn_dim": 4 * self.token_dim,
        }

    def _check(self) -> None:
        check_choices(self, CHOICES)
        for name in ("slot_dim", "hidden_dim", "ffn_dim", "iterations", "decoder_layers", "decoder_heads",
                     "decoder_ffn_dim"):  # fmt: skip
            check_whole(name, getattr(self, name), 1)
        check_whole("query_seed", self.query_seed, 0)
        sides: Any = self.grid
        if not isinstance(sides, tuple) or len(sides) != 2:
            raise BadInput(f"grid is {sides!r}: height and width in tokens are needed")
        for side in self.grid:
            check_whole("a side of grid", side, 1)
        for name in ("visible", "random_visible", "ffn_dropout"):
            check_share(name, getattr(self, name))
        check_number("mass_power", self.mass_power, 0)
        if self.assignment != "mass" and self.mass_power != PrunerConfig.mass_power:
            raise BadInput(f"mass_power is {self.mass_power}, but assignment is {self.assignment}: it is of mass alone")
        for name in ("equal_layers", "extra_slot"):
            if not isinstance(getattr(self, name), bool):
                raise BadInput(f"{name} is {getattr(self, name)!r}: true or false is needed")
        if self.visible_count is not None:
            check_whole("visible_count", self.visible_count, 0)
        if self.token_dim % self.decoder_heads:
            raise BadInput(f"decoder_heads {self.decoder_heads} does not divide token_dim {self.token_dim}")
        if self.queries == "separate_gaussian":
            check_whole("max_slots (the number of slots of separate_gaussian)", self.max_slots, 1)
        elif self.max_slots is not None:
            raise BadInput(f"max_slots is {self.max_slots}, but {self.queries} takes any number of slots: leave it out")


def resolve(config: Any, by_behaviour: Mapping[str, tuple[Any, Any]]) -> None:
    """Give each option that is "auto" the value of the config's behaviour."""
    column = BEHAVIOURS.index(config.behaviour)
    for name, values in by_behaviour.items():
        if getattr(config, name) == AUTO:
            object.__setattr__(config, name, values[column])


def from_dict(cls: type[C], data: Mapping[str, Any], what: str) -> C:
    """A dataclass from JSON; `BadInput` names keys that it does not know or lacks."""
    known = {field.name for field in fields(cls)}  # type: ignore[arg-type]
    if unknown := sorted(set(data) - known):
        raise BadInput(f"{what} has unknown keys {', '.join(unknown)}: known are {', '.join(sorted(known))}")
    try:
        return cls(**data)
    except TypeError as error:
        raise BadInput(f"{what} is not complete: {error}") from error


def check_choices(config: Any, choices: Mapping[str, tuple[Any, ...]], *, skip_auto: bool = False) -> None:
    """Compare options with their legal values."""
    for name, legal in choices.items():
        value = getattr(config, name)
        if value not in legal and not (skip_auto and value == AUTO):
            raise BadInput(f"{name} is {value!r}: one of {', '.join(str(item) for item in legal)} is needed")


def check_whole(name: str, value: object, least: int) -> None:
    """A whole number of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise BadInput(f"{name} is {value!r}: a whole number of at least {least} is needed")


def check_number(name: str, value: object, least: float, *, above: bool = False) -> None:
    """A finite number of at least, or above, `least`."""
    fine = isinstance(value, int | float) and not isinstance(value, bool) and least <= value < float("inf")
    if not fine or (above and value == least):
        raise BadInput(f"{name} is {value!r}: a number {'above' if above else 'of at least'} {least:g} is needed")


def check_share(name: str, value: object) -> None:
    """A number from 0 to 1."""
    check_number(name, value, 0)
    if isinstance(value, int | float) and value > 1:
        raise BadInput(f"{name} is {value!r}: a share from 0 to 1 is needed")
