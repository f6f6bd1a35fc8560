"""The section `ablate` of params.yaml: other values of single entries, tried one at a time beside the grid.

    ablate: {loss: [mse], layer: [10, -2], train: {steps: [50, 800]}}

adds to the grid of the other entries the same grid with `loss: mse`, with `layer: 10`, and so on: five small grids, not
their product. A value that the grid has already adds nothing.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field

from cluster.validation import Section, show
from pipelines.params.schema import Layer, Loss, Many, Positive, Slots

Change = tuple[str, Any]
"""The dotted path of an entry of params.yaml, and another value of it."""
Changes = tuple[Change, ...]
AXES = ("layer", "loss", "slots", "top_k")
"""The axes that can be ablated; `keep`, `method`, `benchmark`, `seed` and `vlm` take lists of their own."""
TRAIN, OPTIONS = "train.", "evaluate.options."
"""Where the other entries that can be ablated lie."""


def _single(value: Any) -> Any:
    if isinstance(value, list | dict):
        raise ValueError(f"{show(value)} is not a single value")
    return value


Values = Many[Annotated[Any, AfterValidator(_single)]]


class TrainValues(Section):
    """Of options of `TrainConfig` and `PrunerConfig`, which check them."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Values] = Field(init=False)
    pruner: dict[str, Values] = Field(default={})


class EvaluateValues(Section):
    """Of options of methods: method -> option -> values."""

    options: dict[str, dict[str, Values]] = Field(default={})


class Ablate(Section):
    """Values to try of each entry."""

    layer: Many[Layer] = ()
    loss: Many[Loss] = ()
    slots: Many[Slots] = ()
    top_k: Many[Positive] = ()
    train: TrainValues = TrainValues()
    evaluate: EvaluateValues = EvaluateValues()

    @classmethod
    def of(cls, changes: Iterable[Change]) -> "Ablate":
        """The inverse of `changes`."""
        data: dict[str, Any] = {}
        for path, value in changes:
            *above, key = path.split(".")
            place = data
            for name in above:
                place = place.setdefault(name, {})
            place.setdefault(key, []).append(value)
        return cls.model_validate(data)

    @property
    def changes(self) -> Changes:
        """Each value with the path of its entry."""
        return tuple(_leaves(self.model_dump()))


def _leaves(data: Mapping[str, Any], above: str = "") -> Iterator[Change]:
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{above}{key}.")
        else:
            yield from ((f"{above}{key}", item) for item in value)


def word(change: Change) -> str:
    """A change in a folder's name: `steps_800`, `fill_next_best`, `pruner.decoder_mlp`."""
    path, value = change
    tail = path.removeprefix(TRAIN) if path.startswith(TRAIN) else path.removeprefix(OPTIONS).split(".", 1)[-1]
    return f"{tail}_{value}".replace("/", "-").replace(" ", "-")
