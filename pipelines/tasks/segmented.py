"""The task of stage `train` for the loss `masks`: as `pipelines.tasks.pruners`, with the images' segmented objects.

A task of its own: the keys of other losses hold no code of masks and scenes.
"""

from pathlib import Path
from typing import Any

from ocvtp.data.scenes import SceneSet, Style
from ocvtp.errors import Incompatible
from ocvtp.tokens.manifest import ShardMeta
from ocvtp.tokens.object_masks import ObjectMasks
from pipelines.tasks.pruners import trained


def segmented(spec: dict[str, Any], folder: Path, inputs: dict[str, Any]) -> None:
    """`config.json`, `model.safetensors` (best), `last.safetensors`, `curves.csv`, `metrics.json`."""
    about, meta = spec["objects"], ShardMeta.from_dict(spec["tokens"]["meta"], "the spec of the task")
    fit, grid = meta.preprocessing, meta.grid
    if about["scenes"] is not None:
        scenes = SceneSet(about["scenes"]["seed"], Style(**about["scenes"]["style"]))
        objects = ObjectMasks.of_scenes(scenes, fit, grid)
    else:
        path = Path(inputs["segmentations"])
        objects = ObjectMasks.of_coco(path, about["images"], fit, grid)
        if objects.identity["coco"] != about["coco"]:
            raise Incompatible(f"{path} has changed since the task was planned (SHA-256 differs): run the stage again")
    trained(spec, folder, inputs, objects=objects)
