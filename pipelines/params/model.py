"""The sections of params.yaml: what is in each, and what is legal.

The sections `train` and `cluster` hold options of the library's `TrainConfig` and `PrunerConfig` and of the package
`cluster`, which check them themselves: an option that they gain is legal here at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from cluster import ClusterConfig, ClusterError
from ocvtp.errors import BadInput
from ocvtp.pruner.config import PrunerConfig
from ocvtp.pruner.training.train_config import TrainConfig
from pipelines.params.ablate import TRAIN, Changes
from pipelines.params.schema import (
    Problems,
    Wrong,
    choice,
    either,
    entry,
    flag,
    nearest,
    nested,
    number,
    optional,
    read,
    show,
    text,
    whole,
)

PRUNER = "pruner."
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Sample:
    """Which images train the pruners, and which questions are asked."""

    source: str = entry("scenes", choice("scenes", "coco"))
    images: int = entry(2048, whole(1))
    seed: int = entry(0, whole(0))
    annotations: str | None = entry(None, optional(text))
    image_folder: str | None = entry(None, optional(text))
    max_reject_rate: float = entry(0.001, number(0, 1))
    questions: int = entry(320, whole(0))


@dataclass(frozen=True)
class Extract:
    """How vision tokens are computed and stored."""

    dtype: str = entry("float16", choice(*DTYPES))
    compute_dtype: str = entry("float32", choice(*DTYPES))
    preprocessing: str = entry("pad", choice("pad", "squash"))
    shard_images: int = entry(256, whole(1, 100_000))
    batch_size: int = entry(64, whole(1))


@dataclass(frozen=True)
class Train:
    """How a pruner is trained: entries of `TrainConfig`, and of `PrunerConfig` under `pruner`.

    These two check them; what is left out or "auto" follows `behaviour`.
    """

    options: dict[str, Any] = field(default_factory=dict)
    pruner: dict[str, Any] = field(default_factory=dict)

    def changed(self, changes: Changes) -> "Train":
        """With other values of some entries."""
        options, pruner = dict(self.options), dict(self.pruner)
        for path, value in changes:
            key = path.removeprefix(TRAIN)
            target, name = (pruner, key.removeprefix(PRUNER)) if key.startswith(PRUNER) else (options, key)
            target[name] = value
        return Train(options, pruner)

    def config(self, loss: str, slots: tuple[int, ...], seed: int) -> TrainConfig:
        """Of one training."""
        return TrainConfig(**self.options, loss=loss, slots=slots, seed=seed)

    def pruner_config(self, token_dim: int, grid: tuple[int, int] | None) -> PrunerConfig:
        """Of the pruner to train on tokens of this width and grid (None where it depends on the image)."""
        given: dict[str, Any] = {} if grid is None else {"grid": grid}
        return PrunerConfig(token_dim, self.options.get("behaviour", "default"), **given, **self.pruner)


def read_train(value: Any, problems: Problems, path: str) -> Train:
    """Read the section `train`."""
    if not isinstance(value, Mapping):
        problems.add(path, f"{show(value)} is not a mapping of keys to values")
        return Train()
    value = dict(value)
    pruner = value.pop("pruner", None) or {}
    options = _checked_by(TrainConfig, value, problems, path, given=("loss", "slots", "seed"), more=("pruner",))
    if not isinstance(pruner, Mapping):
        problems.add(f"{path}.pruner", f"{show(pruner)} is not a mapping of keys to values")
        return Train(options)
    given = ("token_dim", "grid", "behaviour")
    return Train(options, _checked_by(PrunerConfig, pruner, problems, f"{path}.pruner", given=given, token_dim=64))


def _checked_by(
    config: type[Any],
    values: Mapping[str, Any],
    problems: Problems,
    path: str,
    *,
    given: tuple[str, ...],
    more: tuple[str, ...] = (),
    **needed: Any,
) -> dict[str, Any]:
    """The values that a config of the library takes, one by one and then together; it says what is wrong.

    Args:
        config: the dataclass.
        values: entries of the file.
        problems: takes what is wrong.
        path: of the section.
        given: its fields that come from elsewhere.
        more: legal keys that are none of its fields.
        needed: values of fields without a default.
    """
    legal = [item.name for item in fields(config) if item.name not in given]
    sound: dict[str, Any] = {}
    for key, value in values.items():
        if key not in legal:
            problems.add(f"{path}.{key}", f"unknown key{nearest(str(key), [*legal, *more])}")
            continue
        try:
            config(**needed, **{key: value})
        except (BadInput, TypeError) as error:
            problems.add(f"{path}.{key}", str(error))
        else:
            sound[key] = value
    try:
        config(**needed, **sound)
    except (BadInput, TypeError) as error:
        problems.add(path, str(error))
        return {}
    return sound


def _options(value: Any) -> dict[str, dict[str, Any]]:
    """A check: method -> option -> value."""
    if not isinstance(value, Mapping):
        raise Wrong(f"{show(value)} is not a mapping of methods to their options")
    for name, options in value.items():
        if not isinstance(options, Mapping):
            raise Wrong(f"{show(options)} is not a mapping of options to values", f".{name}")
    return {name: dict(options) for name, options in value.items()}


@dataclass(frozen=True)
class Evaluate:
    """How questions are asked and scored."""

    data: str = entry("scenes", choice("scenes", "official"))
    batch_size: int = entry(32, whole(1))
    dtype: str = entry("float32", choice(*DTYPES))
    max_new_tokens: int = entry(16, whole(1))
    bootstrap: int = entry(2000, whole(100))
    limit: int | None = entry(None, optional(whole(1)))
    options: Mapping[str, Mapping[str, Any]] = entry({}, _options)


@dataclass(frozen=True)
class Efficiency:
    """What the closed-form cost counts."""

    text_tokens: int = entry(32, whole(0))
    image_tokens: int = entry(999, whole(1))


@dataclass(frozen=True)
class Demand:
    """What one task of a stage needs. `gpus: auto`: one where the executor is local and this machine has one."""

    cpus: int = entry(1, whole(1))
    gpus: int | str = entry("auto", either("auto", whole(0)))
    memory_gb: float = entry(4.0, number(0, above=True))
    minutes: float = entry(240, number(0, above=True))


@dataclass(frozen=True)
class Demands:
    """What one task of each stage needs."""

    sample: Demand = field(default_factory=Demand, metadata=nested(Demand))
    extract: Demand = field(default_factory=Demand, metadata=nested(Demand))
    train: Demand = field(default_factory=Demand, metadata=nested(Demand))
    evaluate: Demand = field(default_factory=Demand, metadata=nested(Demand))


@dataclass(frozen=True)
class Cluster:
    """Where tasks run. All entries but these two are those of `cluster.ClusterConfig`, which checks them."""

    fail_fast: bool = entry(False, flag)
    resources: Demands = field(default_factory=Demands, metadata=nested(Demands))
    config: dict[str, Any] = field(default_factory=dict)


def read_cluster(value: Any, problems: Problems, path: str) -> Cluster:
    """Read the section `cluster`: our own entries, and the rest for the package `cluster` to check."""
    if not isinstance(value, Mapping):
        problems.add(path, f"{show(value)} is not a mapping of keys to values")
        return Cluster()
    own = {key: value[key] for key in ("fail_fast", "resources") if key in value}
    rest = {str(key): item for key, item in value.items() if key not in own}
    try:
        ClusterConfig.from_params(rest)
    except ClusterError as error:
        problems.add(path, str(error))
    return replace(read(Cluster, own, problems, path), config=rest)


@dataclass(frozen=True)
class Mlflow:
    """Where runs are tracked."""

    enabled: bool = entry(True, flag)
    uri: str = entry("sqlite:///mlflow.db", text)
    experiment: str = entry("ocvtp", text)
