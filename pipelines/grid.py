"""The grid that params.yaml spans: which pruners are trained and which settings are evaluated, and their names.

An axis multiplies only what it changes: methods without a trained pruner have no loss or slots, methods without
randomness no seed, and the unpruned model is one setting. It is always evaluated, being the 100 % of all others.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from ocvtp.methods import Entry as MethodEntry
from ocvtp.methods.budget import Budget
from pipelines.params import Params

VANILLA = "vanilla"


@dataclass(frozen=True)
class PrunerCell:
    """One pruner to train."""

    vlm: str
    layer: int
    loss: str
    slots: tuple[int, ...]
    seed: int

    @property
    def folder(self) -> str:
        """Where it goes below `models/`."""
        return f"{vlm_folder(self.vlm)}/{self.group}-seed_{self.seed}"

    @property
    def group(self) -> str:
        """Its name without VLM and seed."""
        return f"layer_{self.layer}-{self.loss}-slots_{'_'.join(map(str, self.slots))}"


@dataclass(frozen=True)
class Setting:
    """One way to run one VLM; None where the method has no such axis.

    Attributes:
        tokens: kept of an image; None where that depends on the image.
        share: kept of all tokens; None where that depends on the image.
        pruner: the one it uses.
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

    @property
    def options(self) -> dict[str, Any]:
        """Of the method. A trained pruner knows its layer."""
        given = {"top_k": self.top_k, "layer": None if self.pruner else self.layer}
        return {name: value for name, value in given.items() if value is not None}

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
        }

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
        if self.seed is not None:
            parts.append(f"seed_{self.seed}")
        return "-".join(parts)


def tokens_kept(keep: Budget, whole: int | None) -> int | None:
    """Of an image of `whole` tokens; None where that depends on the image, of which `whole` is then None."""
    return keep.count if whole is None else keep.tokens(whole)


def budget_name(keep: Budget) -> str:
    """`48`, or `33.3pct`."""
    return str(keep.count) if keep.share is None else f"{100 * keep.share:.6g}pct"


def vlm_folder(vlm: str) -> str:
    """A folder name for a VLM: a name of the catalogue as it is, a path as its last part and a digest."""
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", vlm):
        return vlm
    last = re.sub(r"[^A-Za-z0-9._-]+", "-", vlm.rstrip("/").rsplit("/", 1)[-1]).strip(".-") or "vlm"
    return f"{last}-{hashlib.sha256(vlm.encode()).hexdigest()[:8]}"


def pruner_cells(params: Params) -> list[PrunerCell]:
    """The pruners to train, in the order of the axes."""
    return [PrunerCell(*values) for values in product(params.vlm, params.layer, params.loss, params.slots, params.seed)]


def settings(params: Params, methods: Mapping[str, MethodEntry], tokens: Mapping[str, int | None]) -> list[Setting]:
    """The settings to evaluate, each VLM's unpruned model first.

    Args:
        params: of which the axes are read.
        methods: the register.
        tokens: of an image, by VLM; None where they depend on the image.
    """
    found = []
    for vlm in params.vlm:
        found.append(Setting(vlm, VANILLA, None, tokens[vlm], 1.0))
        for name in params.method:
            if name != VANILLA:
                found += _of_method(params, methods[name], vlm, tokens[vlm])
    return found


def _of_method(params: Params, method: MethodEntry, vlm: str, whole: int | None) -> Iterator[Setting]:
    """Budgets outermost, seeds innermost."""
    seeds = params.seed if method.random or method.trained else (None,)
    layers = params.layer if method.trained or "layer" in method.options else (None,)
    trained = list(product(params.loss, params.slots)) if method.trained else [None]
    top_ks = params.top_k if "top_k" in method.options else (None,)
    for keep, layer, made, top_k, seed in product(params.keep, layers, trained, top_ks, seeds):
        pruner = None
        if made is not None and layer is not None and seed is not None:
            pruner = PrunerCell(vlm, layer, *made, seed)
        count = tokens_kept(keep, whole)
        share = keep.share if whole is None or count is None else count / whole
        yield Setting(vlm, method.name, keep, count, share, seed, layer, top_k, pruner)
