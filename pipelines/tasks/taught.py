"""The task of stage `train` for the loss `answers`: as `pipelines.tasks.pruners`, with a VLM that teaches.

A task of its own: the keys of other losses hold no code of VLMs and of pruning them.
"""

from pathlib import Path
from typing import Any

from ocvtp.answers.teacher import teacher_of
from ocvtp.data.scenes import SceneSet, Style
from ocvtp.pruner.training.train_config import TrainConfig
from ocvtp.tokens.extract import ImageRecord
from ocvtp.vlms.loading import load
from pipelines.tasks.checked import check_file
from pipelines.tasks.places import check_same, device, in_store
from pipelines.tasks.pruners import trained


def taught(spec: dict[str, Any], folder: Path, inputs: dict[str, Any]) -> None:
    """`config.json`, `model.safetensors` (best), `last.safetensors`, `curves.csv`, `metrics.json`."""
    config, about = TrainConfig.from_dict(spec["train"]), spec["answers"]
    vlm = load(about["vlm"], device=device(), dtype=config.vlm_dtype)
    check_same(about["vlm"], vlm.entry.identity, about["model"])
    records = [
        ImageRecord(image["id"], in_store(folder, path), image["sha256"])
        for image, path in zip(about["images"], inputs["images"], strict=True)
    ]
    teacher = teacher_of(
        vlm,
        config,
        records,
        scenes=None if (scenes := about["scenes"]) is None else SceneSet(scenes["seed"], Style(**scenes["style"])),
        preprocessing=spec["tokens"]["meta"]["preprocessing"],
        prompts_file=_prompts(about["prompts"], inputs["prompts"]),
    )
    trained(spec, folder, inputs, teacher=teacher)


def _prompts(sha256: str | None, path: str | None) -> Path | None:
    """The file of prompts, if it is the one that the task was planned for."""
    return None if path is None else check_file(Path(path), sha256)
