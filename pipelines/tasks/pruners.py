"""The task of stage `train`: one pruner, resumed where an attempt that died had stopped."""

from pathlib import Path
from typing import Any

from cluster import progress
from ocvtp.pruner.config import PrunerConfig
from ocvtp.pruner.provenance import TrainedFor
from ocvtp.pruner.training.answers import Teacher
from ocvtp.pruner.training.coverage_loss import Segmentations
from ocvtp.pruner.training.run import TrainConfig, train
from ocvtp.tokens.loader import TokenDataset
from ocvtp.tokens.manifest import ShardMeta
from pipelines.tasks.places import device, in_store


def pruner(spec: dict[str, Any], folder: Path, inputs: dict[str, Any]) -> None:
    """`config.json`, `model.safetensors` (best), `last.safetensors`, `curves.csv`, `metrics.json`."""
    trained(spec, folder, inputs)


def trained(
    spec: dict[str, Any],
    folder: Path,
    inputs: dict[str, Any],
    *,
    teacher: Teacher | None = None,
    objects: Segmentations | None = None,
) -> None:
    """The same, taught by a VLM, or by segmented objects, where there are some."""
    meta = ShardMeta.from_dict(spec["tokens"]["meta"], "the spec of the task")
    train(
        PrunerConfig.from_dict(spec["pruner"]),
        TrainConfig.from_dict(spec["train"]),
        _dataset(spec["tokens"], inputs["shards"], folder),
        folder,
        resume=folder / "resume",
        progress=progress,
        device=device(),
        trained_for=trained_for(meta),
        teacher=teacher,
        objects=objects,
        handed_on=_dataset(spec["handed_on"], inputs["handed_on"], folder) if "handed_on" in spec else None,
    )


def _dataset(listing: dict[str, Any], paths: list[str], folder: Path) -> TokenDataset:
    """The tokens of a layer, whose shards are at these places of the store."""
    shards = [{**shard, "path": path} for shard, path in zip(listing["shards"], paths, strict=True)]
    return TokenDataset.from_listing({**listing, "shards": shards}, in_store(folder, "."))


def trained_for(meta: ShardMeta) -> TrainedFor:
    """What is known from the tokens."""
    names = ("vlm", "revision", "weights", "layer", "tower_layer", "preprocessing")
    return TrainedFor(**{name: getattr(meta, name) for name in names})
