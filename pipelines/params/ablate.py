"""The section `ablate` of params.yaml: other values of single entries, tried one at a time beside the grid.

    ablate: {loss: [mse], layer: [10, -2], train: {steps: [50, 800]}}

adds to the grid of the other entries the same grid with `loss: mse`, with `layer: 10`, and so on: five small grids, not
their product. A value that the grid has already adds nothing.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from pipelines.params.schema import Check, Problems, Wrong, choice, many, show, whole

Change = tuple[str, Any]
"""The dotted path of an entry of params.yaml, and another value of it."""
Changes = tuple[Change, ...]
LOSSES = ("aw_mse", "mse", "span")
AXES: Mapping[str, Check] = {
    "layer": whole(-1000, 1000),
    "loss": choice(*LOSSES),
    "slots": lambda value: slots(value),
    "top_k": whole(1),
}
"""The axes that can be ablated; `keep`, `method`, `benchmark`, `seed` and `vlm` take lists of their own."""
TRAIN, OPTIONS = "train.", "evaluate.options."
"""Where the other entries that can be ablated lie."""


def slots(value: Any) -> tuple[int, ...]:
    """A check: slot counts in ascending order, each once."""
    if not isinstance(value, list):
        raise Wrong(f"{show(value)} is not a list of slot counts, such as [16, 32, 48]")
    counts: tuple[int, ...] = many(whole(1))(value)
    if list(counts) != sorted(counts):
        raise Wrong(f"{list(counts)} is not in ascending order: {sorted(counts)}")
    return counts


def read_ablate(value: Any, problems: Problems, path: str) -> Changes:
    """Read the section: nested mappings that end in lists of values."""
    if value is None:
        return ()
    if not isinstance(value, Mapping):
        problems.add(path, f"{show(value)} is not a mapping of entries to lists of values")
        return ()
    return tuple(dict.fromkeys(_changes(value, "", problems, path)))


def _changes(data: Mapping[str, Any], above: str, problems: Problems, path: str) -> Iterator[Change]:
    for key, value in data.items():
        name = f"{above}{key}"
        if isinstance(value, Mapping):
            yield from _changes(value, f"{name}.", problems, path)
        elif name not in AXES and not name.startswith((TRAIN, OPTIONS)):
            legal = f"{', '.join(AXES)}, or what lies in train or evaluate.options"
            problems.add(f"{path}.{name}", f"cannot be ablated (legal: {legal})")
        elif not isinstance(value, list):
            problems.add(f"{path}.{name}", f"{show(value)} is not a list of values to try")
        else:
            yield from _values(name, value, problems, f"{path}.{name}")


def _values(name: str, values: list[Any], problems: Problems, path: str) -> Iterator[Change]:
    for index, value in enumerate(values):
        try:
            if name in AXES:
                yield name, AXES[name](value)
            elif isinstance(value, list | Mapping):
                raise Wrong(f"{show(value)} is not a single value")
            else:
                yield name, value
        except Wrong as wrong:
            problems.add(f"{path}[{index}]{wrong.at}", wrong.text)


def word(change: Change) -> str:
    """A change in a folder's name: `steps_800`, `fill_next_best`, `pruner.decoder_mlp`."""
    path, value = change
    tail = path.removeprefix(TRAIN) if path.startswith(TRAIN) else path.removeprefix(OPTIONS).split(".", 1)[-1]
    return f"{tail}_{value}".replace("/", "-").replace(" ", "-")
