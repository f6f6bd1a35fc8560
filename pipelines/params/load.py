"""params.yaml: every entry, what is legal in it, and which stage reads it.

`load` checks the whole file and raises one error that lists all that is wrong, before any work starts. `READS` is the
one table of which stage depends on which entry: `Params.seen_by` hands a stage its own entries only, and dvc.yaml must
list the same ones.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ocvtp.errors import BadInput
from ocvtp.methods.budget import Budget
from pipelines.params.ablate import LOSSES, Changes, read_ablate, slots
from pipelines.params.model import (
    Cluster,
    Efficiency,
    Evaluate,
    Extract,
    Mlflow,
    Sample,
    Train,
    read_cluster,
    read_train,
)
from pipelines.params.schema import Problems, Wrong, axis, choice, entry, load_yaml, many, nested, read, text, whole

READS: Mapping[str, tuple[str, ...]] = {
    "sample": ("sample",),
    "extract": ("vlm", "layer", "ablate", "extract"),
    "train": ("vlm", "layer", "loss", "slots", "seed", "ablate", "train"),
    "evaluate": (
        "vlm", "layer", "loss", "slots", "top_k", "keep", "method", "benchmark", "seed", "ablate", "evaluate",
    ),
    "efficiency": ("vlm", "top_k", "keep", "method", "train", "evaluate", "efficiency"),
    "report": (),
}  # fmt: skip
"""Which entries of params.yaml each stage depends on, as in dvc.yaml."""
WHERE_AND_HOW = ("cluster", "mlflow")
"""Sections that change where and how work runs, never what comes out: every stage reads them, none depends on them."""


# --- Checks of our own -----------------------------------------------------------------------------------------------


def keep(value: Any) -> Budget:
    """A check: 48 is a count, 0.333 and "33.3%" are shares."""
    try:
        return Budget.parse(value)
    except BadInput as error:
        raise Wrong(str(error)) from None


def slots_axis(value: Any) -> tuple[tuple[int, ...], ...]:
    """A check: [16, 32] is one value, [[16, 32], [64]] is a grid of two."""
    if isinstance(value, list) and any(isinstance(item, list) for item in value):
        return tuple(many(slots)(value))
    return (slots(value),)


# --- All of it -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Params:
    """All of params.yaml. The axes of the grid are tuples, also where the file has one value."""

    vlm: tuple[str, ...] = entry("tiny-llava", axis(text))
    layer: tuple[int, ...] = entry(9, axis(whole(-1000, 1000)))
    loss: tuple[str, ...] = entry("aw_mse", axis(choice(*LOSSES)))
    slots: tuple[tuple[int, ...], ...] = entry([16, 32, 48], slots_axis)
    top_k: tuple[int, ...] = entry(1, axis(whole(1)))
    keep: tuple[Budget, ...] = entry([48, 32, 16], axis(keep))
    method: tuple[str, ...] = entry(
        ["vanilla", "random", "downsample", "oc-vtp-untrained", "oc-vtp", "qr", "css", "fps", "medoids",
         "visionzip", "hiprune", "tome", "fastv", "sparsevlm", "pyramiddrop"], axis(text),
    )  # fmt: skip
    benchmark: tuple[str, ...] = entry(["gqa", "mme", "pope", "textvqa"], axis(text))
    seed: tuple[int, ...] = entry([0, 1, 2], axis(whole(0, 2**31 - 1)))
    ablate: Changes = field(default=(), metadata=nested(tuple, read_ablate))
    sample: Sample = field(default_factory=Sample, metadata=nested(Sample))
    extract: Extract = field(default_factory=Extract, metadata=nested(Extract))
    train: Train = field(default_factory=Train, metadata=nested(Train, read_train))
    evaluate: Evaluate = field(default_factory=Evaluate, metadata=nested(Evaluate))
    efficiency: Efficiency = field(default_factory=Efficiency, metadata=nested(Efficiency))
    cluster: Cluster = field(default_factory=Cluster, metadata=nested(Cluster, read_cluster))
    mlflow: Mlflow = field(default_factory=Mlflow, metadata=nested(Mlflow))

    def seen_by(self, stage: str) -> "Params":
        """The same, but reading an entry that the stage does not list in `READS` raises `LookupError`."""
        return _seen_by(self, stage)


_NAMES = frozenset(item.name for item in fields(Params))


class _Seen(Params):
    """Params of which only some entries may be read; `_view` is the stage and those entries."""

    def __getattribute__(self, name: str) -> Any:
        if name in _NAMES:
            stage, allowed = object.__getattribute__(self, "_view")
            if name not in allowed:
                raise LookupError(
                    f"stage {stage} reads the entry {name!r} of params.yaml but does not declare it: "
                    "add it to READS in pipelines/params/load.py and to the stage in dvc.yaml"
                )
        return object.__getattribute__(self, name)


def _seen_by(params: Params, stage: str) -> Params:
    view = object.__new__(_Seen)
    for name in _NAMES:
        object.__setattr__(view, name, object.__getattribute__(params, name))
    object.__setattr__(view, "_view", (stage, frozenset(READS[stage]) | set(WHERE_AND_HOW)))
    return view


# --- Loading ---------------------------------------------------------------------------------------------------------


def load(path: Path | str = "params.yaml") -> Params:
    """Read and check params.yaml.

    Raises:
        BadInput: with every unknown key, wrong type and impossible value, its path and the nearest legal one.
    """
    from pipelines.params.crosscheck import crosscheck

    file = Path(path)
    data = load_yaml(file)
    problems = Problems(file.name)
    params = read(Params, {} if data is None else data, problems)
    params = crosscheck(params, problems)
    problems.raise_if_any()
    return params
