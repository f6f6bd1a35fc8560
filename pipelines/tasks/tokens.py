"""The task of stage `extract`: the tokens of some images, all layers asked for in one pass of the tower."""

from functools import lru_cache
from pathlib import Path
from typing import Any

from cluster import progress
from ocvtp.tokens.extract import ImageRecord, extract_tokens
from ocvtp.vlms import VLM, load
from pipelines.tasks.places import check_same, device, in_store


def tokens(spec: dict[str, Any], folder: Path, inputs: dict[str, Any]) -> None:
    """`layer_<l>/tokens.arrow` and its manifest, for each layer of the spec."""
    vlm = _vlm(spec["vlm"], spec["compute_dtype"], device())
    check_same(spec["vlm"], vlm.entry.identity, spec["model"])
    records = [
        ImageRecord(image["id"], in_store(folder, path), image["sha256"])
        for image, path in zip(spec["images"], inputs["images"], strict=True)
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
