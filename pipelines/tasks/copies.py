"""A task of stage `sample`: copies of images of a data set, so that the store has them whatever becomes of the set."""

import hashlib
from pathlib import Path
from typing import Any

from cluster import progress
from ocvtp.data.decoding import read_image_file, safe_join
from ocvtp.errors import BadInput


def copies(spec: dict[str, Any], folder: Path, inputs: dict[str, Any]) -> None:
    """`images/<name in the data set>`, each compared with its checksum."""
    for done, image in enumerate(spec["images"], start=1):
        path = safe_join(inputs["folder"], image["file"])
        data = read_image_file(path)
        if hashlib.sha256(data).hexdigest() != image["sha256"]:
            raise BadInput(f"image {image['id']}: {path} has changed since it was sampled; run the stage again")
        target = folder / "images" / image["file"]
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        progress(done, len(spec["images"]))
