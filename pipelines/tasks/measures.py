"""The task of stage `measure`: what one method keeps of some images, without a language model."""

import json
from pathlib import Path
from typing import Any

from cluster import progress
from ocvtp.evaluation.setting import EvaluationSetting, ready
from ocvtp.inspection.measure import Asked, Subject, measure
from ocvtp.inspection.segments import Picture, pictures
from pipelines.tasks.checked import check_file
from pipelines.tasks.places import check_same, device, in_store

MEASURES = "measures.json"
UNTIMED = ("milliseconds",)
"""What differs from run to run, and so is none of a result that is a function of its spec."""


def measures(spec: dict[str, Any], folder: Path, inputs: dict[str, Any]) -> None:
    """`measures.json`: a row for each budget and seed, as `ocvtp.inspection.measure.Row`, without times."""
    found = [Picture(in_store(folder, path)) for path in inputs["images"]]
    for picture, sha256 in zip(found, spec["images"], strict=True):
        check_file(picture.path, sha256)
    if inputs["masks"] is not None:
        known = {one.path.name: one.segments for one in pictures(in_store(folder, inputs["masks"]))}
        found = [Picture(picture.path, known[picture.path.name]) for picture in found]
    asked = Asked(
        spec["method"],
        pruner=None if inputs["pruner"] is None else in_store(folder, inputs["pruner"]),
        options=spec["options"],
    )
    with ready(EvaluationSetting(spec["vlm"], dtype=spec["dtype"]), device()) as unpruned:
        vlm = unpruned.vlm
        check_same(spec["vlm"], vlm.entry.identity, spec["model"])
        rows = measure(
            Subject(vlm.family, vlm.processor, spec["fit"]),
            found,
            [asked],
            spec["keep"],
            spec["seeds"],
            layer=spec["layer"],
            batch_size=spec["batch_size"],
            progress=progress,
        )
    listed = [{key: value for key, value in row.to_dict().items() if key not in UNTIMED} for row in rows]
    (folder / MEASURES).write_text(json.dumps(listed, indent=1) + "\n")
