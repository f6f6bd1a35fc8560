"""Puts a result back into the store from a stage's output, which DVC brought from elsewhere."""

import hashlib
from pathlib import Path
from typing import Any

from ocvtp.errors import Corrupt

CODE_VERSION = "1"


def restored(spec: dict[str, Any], folder: Path, inputs: dict[str, Any]) -> None:
    """The files of the spec, each compared with its checksum."""
    for name, sha256 in spec["files"].items():
        data = (Path(inputs["source"]) / name).read_bytes()
        if hashlib.sha256(data).hexdigest() != sha256:
            raise Corrupt(f"{Path(spec['source']) / name} is not the file that was made (SHA-256 differs)")
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
