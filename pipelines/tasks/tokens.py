"""The task of stage `extract`: the tokens of some images, all layers asked for in one pass of the tower."""

from functools import lru_cache
from pathlib import Path
from typing import Any

from cluster import progress
from ocvtp.errors import Incompatible
from ocvtp.tokens.extract import ImageRecord, extract_tokens
from ocvtp.vlms import VLM, load
from pipelines.tasks.places import device, in_store


def tokens(spec: dict[str, Any], folder: Path) -> None:
    """`layer_<l>/tokens.arrow` and its manifest, for each layer of the spec."""
    vlm = _vlm(spec["vlm"], spec["compute_dtype"], device())
    if vlm.weights != spec["weights"]:
        raise Incompatible(
            f"the weights of {spec['vlm']} on this machine are {vlm.weights[:12]}, the task was planned for "
            f"{spec['weights'][:12]}: make them the same on all machines"
        )
    records = [
        ImageRecord(image["id"], in_store(folder, path), image["sha256"])
        for image, path in zip(spec["images"], spec["at"]["images"], strict=True)
    ]
    extract_tokens(
        vlm,
        records,
        spec["layers"],
        folder,
        dtype=spec["dtype"],
        batch_size=spec["batch_size"],
        preprocessing=spec["preprocessing"],
        progress=progress,
    )


@lru_cache(maxsize=1)
def _vlm(name: str, dtype: str, where: str) -> VLM:
    """Loaded once for all tasks of a worker."""
    return load(name, device=where, dtype=dtype)
