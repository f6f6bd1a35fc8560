"""params.yaml: every entry, what is legal in it, and which stage reads it.

`READS` is the one table of which stage depends on which entry: `Params.seen_by` hands a stage its own entries only, and
dvc.yaml must list the same ones. The section `train` holds options of the library's `TrainConfig` and `PrunerConfig`,
which check them themselves: an option that they gain is legal here at once.
"""

from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import BeforeValidator, Field, ValidationInfo, create_model, field_validator, model_validator

from cluster import ClusterConfig
from cluster.validation import Section, Text, show
from ocvtp.data.scenes import SIZE, BackgroundName, Style
from ocvtp.evaluation.benchmarks import NATIVE, Protocol
from ocvtp.methods.budget import Budget
from ocvtp.pruner.config import PrunerConfig
from ocvtp.pruner.training.train_config import TrainConfig
from pipelines.params.ablate import TRAIN, Ablate, Change
from pipelines.params.schema import Axis, Dtype, Keep, Layer, Loss, Natural, Positive, Seed, SlotsAxis

READS: Mapping[str, tuple[str, ...]] = {
    "sample": ("ablate", "sample", "train.on"),
    "extract": ("vlm", "layer", "ablate", "extract", "train.on", "train.handed_on"),
    "train": ("vlm", "layer", "loss", "slots", "seed", "ablate", "train", "sample.annotations", "sample.training"),
    "evaluate": (
        "vlm", "layer", "loss", "slots", "top_k", "keep", "method", "benchmark", "seed", "ablate", "evaluate",
        "train.on",
    ),
    "measure": (
        "vlm", "layer", "loss", "slots", "top_k", "keep", "method", "seed", "ablate", "extract", "evaluate", "measure",
        "train.on",
    ),
    "efficiency": ("vlm", "top_k", "keep", "method", "train", "evaluate", "efficiency"),
    "report": (),
}  # fmt: skip
"""Which entries of params.yaml each stage depends on, as in dvc.yaml: whole sections, or entries of one with a dot."""
WHERE_AND_HOW = ("cluster", "mlflow")
"""Sections that change where and how work runs, never what comes out: every stage reads them, none depends on them."""
PRUNER = "pruner."
SAMPLED = "sample"
"""Value of `train.on`: the images of `sample.source`."""
MOST_SHARDS = 1024
"""Tasks that answer one benchmark's questions in one setting."""
OR_NULL = BeforeValidator(lambda value: {} if value is None else value)


class SceneStyle(Section):
    """How scenes look: `ocvtp.data.scenes.Style`."""

    small_share: float = Field(default=0.45, ge=0, le=1)
    background: BackgroundName = "soft"
    clutter: Natural = 0
    sides: list[int] = Field(default=[SIZE, SIZE])

    @field_validator("sides")
    @classmethod
    def _of_scenes(cls, sides: list[int]) -> list[int]:
        Style(sides=sides)  # type: ignore[arg-type] # checks
        return sides


class Pictures(Section):
    """Images of a data set: a list in COCO's format, and the folder of their files."""

    annotations: Text
    image_folder: Text


class Sample(Section):
    """Which images train the pruners, and which questions are asked."""

    source: Literal["scenes", "coco"] = "scenes"
    images: Positive = 2048
    seed: Natural = 0
    annotations: Text | None = None
    image_folder: Text | None = None
    max_reject_rate: float = Field(default=0.001, ge=0, le=1)
    questions: Natural = 320
    style: SceneStyle = SceneStyle()
    training: dict[str, Pictures] = Field(default={})


class Extract(Section):
    """How vision tokens are computed and stored."""

    dtype: Dtype = "float16"
    compute_dtype: Dtype = "float32"
    preprocessing: Literal["pad", "squash"] = "pad"
    shard_images: int = Field(default=256, ge=1, le=100_000)
    batch_size: Positive = 64


class _Options(Section):
    """Options of a config of the library."""

    @property
    def given(self) -> dict[str, Any]:
        """Those that the file gives, none of its sections."""
        present = (name for name in type(self).model_fields if name in self.model_fields_set)
        return {name: value for name in present if not isinstance(value := getattr(self, name), Section)}


def _options_of(config: Any, **known: Any) -> type[_Options]:
    """A section with the fields of a config, which checks them: one by one, then together.

    Args:
        config: a dataclass that raises what is wrong with its values.
        known: its fields that come from elsewhere, with values to check the others beside.
    """

    def check(options: Mapping[str, Any]) -> None:
        try:
            config(**known, **options)
        except TypeError as error:
            raise ValueError(str(error)) from None

    def one(cls: type[Section], value: Any, about: ValidationInfo) -> Any:
        check({str(about.field_name): value})
        return value

    def together(self: _Options) -> _Options:
        check(self.given)
        return self

    names = [item.name for item in fields(config) if item.name not in known]
    validators: dict[str, Any] = {
        "one": field_validator(*names)(one),
        "together": model_validator(mode="after")(together),
    }
    options: dict[str, Any] = dict.fromkeys(names, (Any, None))
    return create_model(config.__name__, __base__=_Options, __validators__=validators, **options)


_PrunerOptions: Any = _options_of(PrunerConfig, token_dim=64, grid=(24, 24), behaviour="default")
_TrainOptions: Any = _options_of(TrainConfig, loss="mse", slots=(16,), seed=0)


class Pruner(_PrunerOptions):
    """What the pruner is made of."""


class Train(_TrainOptions):
    """How a pruner is trained: entries of `TrainConfig`, and of `PrunerConfig` under `pruner`.

    What is left out or "auto" follows `behaviour`. No options of the library are `on`, an axis of the grid: on which
    images; and `handed_on`: whether trainings see the tokens of the layer that goes to the LLM, too.
    """

    on: Axis[Text] = (SAMPLED,)
    handed_on: bool = False
    pruner: Annotated[Pruner, OR_NULL] = Pruner()

    @property
    def given(self) -> dict[str, Any]:
        """Options of `TrainConfig` that the file gives."""
        return {name: value for name, value in super().given.items() if name not in ("on", "handed_on")}

    def with_changes(self, changes: Iterable[Change]) -> dict[str, Any]:
        """The section as in the file, with other values of some entries."""
        options, pruner = {"handed_on": self.handed_on, **self.given}, self.pruner.given
        for path, value in changes:
            key = path.removeprefix(TRAIN)
            target, name = (pruner, key.removeprefix(PRUNER)) if key.startswith(PRUNER) else (options, key)
            target[name] = value
        return {**options, "pruner": pruner}

    def changed(self, changes: Iterable[Change]) -> "Train":
        """With other values of some entries."""
        return cast(Train, Train.model_validate(self.with_changes(changes)))

    def config(self, loss: str, slots: tuple[int, ...], seed: int) -> TrainConfig:
        """Of one training."""
        return TrainConfig(**self.given, loss=loss, slots=slots, seed=seed)

    def pruner_config(self, token_dim: int, grid: tuple[int, int] | None) -> PrunerConfig:
        """Of the pruner to train on tokens of this width and grid (None where it depends on the image)."""
        given: dict[str, Any] = {} if grid is None else {"grid": grid}
        return PrunerConfig(token_dim, self.given.get("behaviour", "default"), **given, **self.pruner.given)


class Evaluate(Section):
    """How questions are asked and scored."""

    data: Literal["scenes", "official"] = "scenes"
    protocol: Protocol = NATIVE
    batch_size: Positive = 32
    dtype: Dtype = "float32"
    max_new_tokens: Positive = 16
    bootstrap: int = Field(default=2000, ge=100)
    minutes_per_task: float = Field(default=30.0, gt=0)
    shards: int | None = Field(default=None, ge=1, le=MOST_SHARDS)
    limit: Positive | None = None
    options: dict[str, dict[str, Any]] = Field(default={"qr": {"layer": -2}, "css": {"layer": -2}})


class Measure(Section):
    """On what the choices of methods are measured without a language model."""

    images: Positive = 256


class Efficiency(Section):
    """What the closed-form cost counts."""

    text_tokens: Natural = 32
    image_tokens: Positive | Literal["auto"] = "auto"


class Demand(Section):
    """What one task of a stage needs. `gpus: auto`: one where the executor is local and this machine has one."""

    cpus: Positive = 1
    gpus: Natural | Literal["auto"] = "auto"
    memory_gb: float = Field(default=4.0, gt=0)
    minutes: float = Field(default=240.0, gt=0)


class Demands(Section):
    """What one task of each stage needs."""

    sample: Demand = Demand()
    extract: Demand = Demand()
    train: Demand = Demand()
    evaluate: Demand = Demand()


class Cluster(ClusterConfig):
    """Where tasks run: what `cluster` has to know of us, and entries of ours beside its own.

    OCVTP_EXECUTOR and OCVTP_STORE override `executor` and `store`.
    """

    application: ClassVar[str] = "ocvtp"
    passed_on: ClassVar[tuple[str, ...]] = ("HF_", "TRANSFORMERS_", "TORCH_", "CUBLAS_")
    moved_by: ClassVar[str] = "OCVTP_ROOT (or OCVTP_STORE)"

    store: Path = Path(".ocvtp/store")
    remote: str | None = None  # where `push` and `pull` keep results besides, such as s3://bucket/results
    fail_fast: bool = False
    resources: Demands = Demands()

    @field_validator("remote")
    @classmethod
    def _address(cls, url: str | None) -> str | None:
        if url is not None and "://" not in url:
            raise ValueError(f"{show(url)} is not the address of a folder, such as s3://bucket/results")
        return url


class Mlflow(Section):
    """Where runs are tracked."""

    enabled: bool = True
    uri: Text = "sqlite:///mlflow.db"
    experiment: Text = "ocvtp"


class Params(Section):
    """All of params.yaml. The axes of the grid are tuples, also where the file has one value."""

    vlm: Axis[Text] = ("tiny-llava",)
    layer: Axis[Layer] = (9,)
    loss: Axis[Loss] = ("aw_mse",)
    slots: SlotsAxis = ((16, 32, 48),)
    top_k: Axis[Positive] = (1,)
    keep: Axis[Keep] = tuple(map(Budget.parse, (48, 32, 16, 8, 4)))
    method: Axis[Text] = (
        "vanilla", "random", "downsample", "oc-vtp-untrained", "oc-vtp", "qr", "css", "fps", "visionzip",
        "hiprune", "tome", "fastv", "sparsevlm", "pyramiddrop",
    )  # fmt: skip
    benchmark: Axis[Text] = ("gqa", "mme", "pope", "textvqa")
    seed: Axis[Seed] = (0, 1, 2)
    ablate: Annotated[Ablate, OR_NULL] = Ablate()
    sample: Sample = Sample()
    extract: Extract = Extract()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    measure: Measure = Measure()
    efficiency: Efficiency = Efficiency()
    cluster: Cluster = Cluster()
    mlflow: Mlflow = Mlflow()

    def seen_by(self, stage: str) -> "Params":
        """The same, but reading an entry that the stage does not list in `READS` raises `LookupError`."""
        return cast(Params, _Seen(self, stage))


class _Seen:
    """Params of which a stage may read some entries only."""

    def __init__(self, params: Params, stage: str) -> None:
        self._params, self._stage = params, stage

    def __getattr__(self, name: str) -> Any:
        reads = (*READS[self._stage], *WHERE_AND_HOW)
        if name not in Params.model_fields or name in reads:
            return getattr(self._params, name)
        entries = [one.removeprefix(f"{name}.") for one in reads if one.startswith(f"{name}.")]
        if not entries:
            raise _undeclared(self._stage, name)
        return _SeenSection(
            self._stage, name, {entry: getattr(getattr(self._params, name), entry) for entry in entries}
        )


class _SeenSection:
    """Entries of a section of which a stage may read no others."""

    def __init__(self, stage: str, section: str, entries: Mapping[str, Any]) -> None:
        self._stage, self._section, self._entries = stage, section, entries

    def __getattr__(self, name: str) -> Any:
        if name not in self._entries:
            raise _undeclared(self._stage, f"{self._section}.{name}")
        return self._entries[name]


def _undeclared(stage: str, entry: str) -> LookupError:
    return LookupError(
        f"stage {stage} reads the entry {entry!r} of params.yaml but does not declare it: "
        "add it to READS in pipelines/params/model.py and to the stage in dvc.yaml"
    )
