"""The section `ablate` of params.yaml: other values of single entries, tried one at a time beside the grid.

    ablate: {loss: [mse], layer: [10, -2], train: {steps: [50, 800]}}

adds to the grid of the other entries the same grid with `loss: mse`, with `layer: 10`, and so on: five small grids, not
their product. A value that the grid has already adds nothing. What only makes sense together is changed at once:

    ablate: {together: [{loss: span, layer: -2, slots: [4, 8], train: {steps: 1500}}]}
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from cluster.validation import Section, show
from pipelines.params.schema import Layer, Loss, Many, Positive, Slots

Change = tuple[str, Any]
"""The dotted path of an entry of params.yaml, and another value of it."""
Changes = tuple[Change, ...]
AXES = ("layer", "loss", "slots", "top_k")
"""The axes that can be ablated; `keep`, `method`, `benchmark`, `seed` and `vlm` take lists of their own."""
TRAIN, OPTIONS = "train.", "evaluate.options."
"""Where the other entries that can be ablated lie."""
ON = "train.on"
"""The axis of images that pruners are trained on."""


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


class _Values(Section):
    layer: Many[Layer] = ()
    loss: Many[Loss] = ()
    slots: Many[Slots] = ()
    top_k: Many[Positive] = ()
    train: TrainValues = TrainValues()
    evaluate: EvaluateValues = EvaluateValues()

    @property
    def leaves(self) -> Changes:
        """Each value with the path of its entry."""
        return tuple(_leaves(self.model_dump(exclude={"together"})))


class Together(_Values):
    """One value of each of several entries."""

    @model_validator(mode="before")
    @classmethod
    def _as_lists(cls, data: Any) -> Any:
        return _listed(data)


class Ablate(_Values):
    """Values to try of each entry, and of several at once."""

    together: Many[Together] = ()

    def only(self, wanted: Callable[[Change], bool]) -> "Ablate":
        """Without the values, and of combinations the entries, that are not wanted."""
        kept = _nested((change for change in self.leaves if wanted(change)), many=True)
        combinations = [_nested(change for change in one.leaves if wanted(change)) for one in self.together]
        if left := [one for one in combinations if one]:
            kept["together"] = left
        return Ablate.model_validate(kept)

    @property
    def changes(self) -> tuple[Changes, ...]:
        """What is changed at once: single values first, then combinations."""
        return (*((change,) for change in self.leaves), *(one.leaves for one in self.together))

    def values(self, path: str) -> tuple[Any, ...]:
        """All values of one entry."""
        found = (value for changes in self.changes for name, value in changes if name == path)
        return tuple(dict.fromkeys(found))


def _listed(data: Any) -> Any:
    """One value of each entry as the list of values that a section of this kind has."""
    if not isinstance(data, Mapping):
        return data
    return {key: _listed(value) if isinstance(value, Mapping) else [value] for key, value in data.items()}


def _nested(changes: Iterable[Change], *, many: bool = False) -> dict[str, Any]:
    """A section from the paths of its entries."""
    data: dict[str, Any] = {}
    for path, value in changes:
        *above, key = path.split(".")
        place = data
        for name in above:
            place = place.setdefault(name, {})
        if many:
            place.setdefault(key, []).append(value)
        else:
            place[key] = value
    return data


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
