"""The grid that params.yaml spans: which pruners are trained and which settings are evaluated, and their names.

An axis multiplies only what it changes: methods without a trained pruner have no loss or slots, methods without
randomness no seed, and the unpruned model is one setting. It is always evaluated, being the 100 % of all others.
What `ablate` changes at once adds the part of the grid that it concerns once more.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

from ocvtp.methods import Entry as MethodEntry
from ocvtp.methods.budget import Budget
from ocvtp.vlms import CatalogEntry
from ocvtp.vlms.hidden_states import resolve_layers
from pipelines.params import ablate
from pipelines.params.ablate import ON, Change, Changes
from pipelines.params.fitting import slots_of, tokens_kept
from pipelines.params.model import SAMPLED, Params

VANILLA = "vanilla"
HANDED_ON = f"{ablate.TRAIN}handed_on"


@dataclass(frozen=True)
class PrunerCell:
    """One pruner to train.

    `changes` are other values of entries of the section `train`: on which images too, if not those of `sample.source`.
    """

    vlm: str
    layer: int
    loss: str
    slots: tuple[int, ...]
    seed: int
    changes: Changes = ()

    @property
    def folder(self) -> str:
        """Where it goes below `models/`."""
        return f"{vlm_folder(self.vlm)}/{self.group}-seed_{self.seed}"

    @property
    def on(self) -> str:
        """On which images: those of `sample.source`, or a benchmark's own."""
        return str(dict(self.changes).get(ON, SAMPLED))

    @property
    def group(self) -> str:
        """Its name without VLM and seed."""
        slots = "_".join(map(str, self.slots))
        return "-".join([f"layer_{self.layer}", self.loss, f"slots_{slots}", *map(ablate.word, self.changes)])


@dataclass(frozen=True)
class Cell:
    """One way to run one VLM; None where the method has no such axis.

    Attributes:
        tokens: kept of an image; None where that depends on the image.
        share: kept of all tokens; None where that depends on the image.
        pruner: the one it uses.
        given: options of the method, as params.yaml has them.
        changes: what `ablate` changed, and `train.on` where the pruner was trained on a benchmark's own images.
    """

    vlm: str
    method: str
    keep: Budget | None
    tokens: int | None
    share: float | None
    seed: int | None = None
    layer: int | None = None
    top_k: int | None = None
    pruner: PrunerCell | None = None
    given: tuple[tuple[str, Any], ...] = ()
    changes: Changes = ()

    @property
    def options(self) -> dict[str, Any]:
        """Of the method. A trained pruner knows its layer."""
        axes = {"top_k": self.top_k, "layer": None if self.pruner else self.layer}
        return {**dict(self.given), **{name: value for name, value in axes.items() if value is not None}}

    @property
    def axes(self) -> dict[str, Any]:
        """Every axis but seed and benchmark, as in the rows of scores and summaries."""
        return {
            "vlm": self.vlm,
            "method": self.method,
            "keep": None if self.keep is None else self.keep.written,
            "tokens": self.tokens,
            "share": self.share,
            "layer": self.layer,
            "loss": self.pruner.loss if self.pruner else None,
            "slots": list(self.pruner.slots) if self.pruner else None,
            "top_k": self.top_k,
            "changes": {path: list(value) if isinstance(value, tuple) else value for path, value in self.changes},
        }

    def asks(self, benchmark: str) -> bool:
        """Whether it is evaluated on a benchmark: with a pruner trained on a benchmark's images, on that one alone."""
        return self.pruner is None or self.pruner.on in (SAMPLED, benchmark)

    @property
    def name(self) -> str:
        """Of its folder: all axes that it has."""
        parts = [self.method]
        if self.keep is not None:
            parts.append(budget_name(self.keep))
        if self.pruner is not None:
            parts.append(self.pruner.group)
        elif self.layer is not None:
            parts.append(f"layer_{self.layer}")
        if self.top_k is not None:
            parts.append(f"top_{self.top_k}")
        parts += [ablate.word(change) for change in self.changes if change[0].startswith(ablate.OPTIONS)]
        if self.seed is not None:
            parts.append(f"seed_{self.seed}")
        return "-".join(parts)


def budget_name(keep: Budget) -> str:
    """`48`, or `33.3pct`."""
    return str(keep.count) if keep.share is None else f"{100 * keep.share:.6g}pct"


def vlm_folder(vlm: str) -> str:
    """A folder name for a VLM: a name of the catalogue as it is, a path as its last part and a digest."""
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", vlm):
        return vlm
    last = re.sub(r"[^A-Za-z0-9._-]+", "-", vlm.rstrip("/").rsplit("/", 1)[-1]).strip(".-") or "vlm"
    return f"{last}-{hashlib.sha256(vlm.encode()).hexdigest()[:8]}"


def tokens_listing(vlm: str, on: str, layer: int) -> str:
    """Where a layer's tokens of some images (as `PrunerCell.on`) are listed below `data/tokens/`."""
    return f"{vlm_folder(vlm)}/layer_{layer}{'' if on == SAMPLED else f'-on_{on}'}.json"


@dataclass(frozen=True)
class _Part:
    """Axes of pruners and of their use, once for the grid and once for each change."""

    layer: tuple[int, ...]
    loss: tuple[str, ...]
    slots: tuple[tuple[int, ...], ...]
    on: tuple[str, ...]
    top_k: tuple[int, ...] = (1,)
    changes: Changes = ()

    def changed(self, changes: Changes) -> "_Part":
        """With one value instead of those of its axis for each change that is of one."""
        axes = {name: getattr(self, name) for name in ablate.AXES}
        axes |= {path: (value,) for path, value in changes if path in axes}
        on = tuple(value for path, value in changes if path == ON)
        return _Part(**axes, on=on or self.on, changes=tuple(change for change in changes if change[0] != ON))

    @property
    def training(self) -> Changes:
        """The changes of the section `train`."""
        return tuple(change for change in self.changes if change[0].startswith(ablate.TRAIN))


def pruner_cells(params: Params) -> list[PrunerCell]:
    """The pruners to train, in the order of the axes; those of `ablate` last."""
    grid = _Part(params.layer, params.loss, params.slots, params.train.on)
    training = [tuple(filter(_trains, changes)) for changes in params.ablate.changes]
    concerned = [changes for changes in training if changes]
    found = [
        PrunerCell(vlm, layer, loss, slots, seed, part.training + _trained_on(on))
        for part in (grid, *map(grid.changed, concerned))
        for vlm in params.vlm
        for on, layer, loss, slots, seed in product(
            part.on, part.layer, part.loss, slots_of(part.slots, vlm), params.seed
        )
    ]
    return list(dict.fromkeys(found))


def _trained_on(on: str) -> Changes:
    return () if on == SAMPLED else ((ON, on),)


def trained_on(params: Params) -> list[str]:
    """The benchmarks on whose own images pruners are trained."""
    return [on for on in dict.fromkeys((*params.train.on, *params.ablate.values(ON))) if on != SAMPLED]


def token_sets(params: Params, vlm: CatalogEntry) -> list[tuple[str, int]]:
    """Images (as `PrunerCell.on`) and layers whose tokens are needed, those of `ablate` last.

    With `train.handed_on` of all these images also those of `handed_on_layer`.
    """
    found = list(product(params.train.on, params.layer))
    for changed in map(dict, params.ablate.changes):
        found += product([changed[ON]] if ON in changed else params.train.on,
                         [changed["layer"]] if "layer" in changed else params.layer)  # fmt: skip
    if params.train.handed_on or True in params.ablate.values(HANDED_ON):
        found += [(on, handed_on_layer(params, vlm)) for on, _ in found]
    return list(dict.fromkeys(found))


def handed_on_layer(params: Params, vlm: CatalogEntry) -> int:
    """The layer that goes to the LLM, as the axis `layer` or `ablate` names it, or else counted from the end."""
    counted = resolve_layers((*params.layer, *params.ablate.values("layer")), vlm.depth, vlm=vlm.name)
    named = (layer for layer, index in counted.items() if index == vlm.feature_layer)
    return next(named, vlm.feature_layer - vlm.depth - 1)


def settings(params: Params, methods: Mapping[str, MethodEntry], tokens: Mapping[str, int | None]) -> list[Cell]:
    """The settings to evaluate, each VLM's unpruned model first, those of `ablate` last.

    Args:
        params: of which the axes are read.
        methods: the register.
        tokens: of an image, by VLM; None where they depend on the image.
    """
    grid = _Part(params.layer, params.loss, params.slots, params.train.on, params.top_k)
    found: list[Cell] = []
    for vlm in params.vlm:
        found.append(Cell(vlm, VANILLA, None, tokens[vlm], 1.0))
        make = partial(_of_method, params, vlm=vlm, whole=tokens[vlm])
        chosen = [methods[name] for name in params.method if name != VANILLA]
        found += [setting for method in chosen for setting in make(method, grid)]
        for changes in params.ablate.changes:
            for method in chosen:
                if concerned := tuple(change for change in changes if _concerns(change, method, params)):
                    found += make(method, grid.changed(concerned))
    first: dict[str, Cell] = {}
    for one in found:
        first.setdefault(_identity(one), one)
    return list(first.values())


def _identity(cell: Cell) -> str:
    """What it runs: changes that come to the same are one setting, the first."""
    return repr((cell.vlm, cell.method, cell.keep, cell.seed, sorted(cell.options.items()), cell.pruner))


def _trains(change: Change) -> bool:
    return change[0] in ("layer", "loss", "slots") or change[0].startswith(ablate.TRAIN)


def _own_layer(method: MethodEntry, options: Mapping[str, Any]) -> tuple[int, ...]:
    """The layer that its options give a method without a pruner, in place of the axis; empty if none."""
    return (options["layer"],) if "layer" in options and not method.trained else ()


def _concerns(change: Change, method: MethodEntry, params: Params) -> bool:
    """Whether a method does anything else after a change."""
    path = change[0]
    if path == "layer" and _own_layer(method, params.evaluate.options.get(method.name, {})):
        return False
    if path in ("layer", "top_k"):
        return path in method.options or (method.trained and path == "layer")
    if path.startswith(ablate.OPTIONS):
        return path.startswith(f"{ablate.OPTIONS}{method.name}.")
    return method.trained


def _of_method(params: Params, method: MethodEntry, part: _Part, *, vlm: str, whole: int | None) -> Iterator[Cell]:
    """Budgets outermost, seeds innermost."""
    seeds = params.seed if method.random or method.trained else (None,)
    trained = list(product(part.on, part.loss, slots_of(part.slots, vlm))) if method.trained else [None]
    top_ks = part.top_k if "top_k" in method.options else (None,)
    given = dict(params.evaluate.options.get(method.name, {}))
    start = f"{ablate.OPTIONS}{method.name}."
    given |= {path.removeprefix(start): value for path, value in part.changes if path.startswith(start)}
    axis = part.layer if method.trained or "layer" in method.options else (None,)
    layers_ = _own_layer(method, given) or axis
    for keep, layer, made, top_k, seed in product(params.keep, layers_, trained, top_ks, seeds):
        pruner, changes = None, part.changes
        if made is not None and layer is not None and seed is not None:
            on, loss, slots = made
            pruner = PrunerCell(vlm, layer, loss, slots, seed, part.training + _trained_on(on))
            changes += _trained_on(on)
        count = tokens_kept(keep, whole)
        share = keep.share if whole is None or count is None else count / whole
        drawn = {"weights_seed": seed} if "weights_seed" in method.options and seed is not None else {}
        options = tuple(sorted({**drawn, **given}.items()))
        yield Cell(vlm, method.name, keep, count, share, seed, layer, top_k, pruner, options, changes)
