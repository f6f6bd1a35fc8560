"""Whether a file that a task reads is still the one that it was planned for: hours may lie between."""

import hashlib
from pathlib import Path

from ocvtp.errors import Incompatible


def check_file(path: Path, sha256: str | None) -> Path:
    """The path again.

    Raises:
        Incompatible: the file is not there, or has another SHA-256.
    """
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        found = ""
    if found != sha256:
        raise Incompatible(f"{path} has changed since the task was planned (SHA-256 differs): run the stage again")
    return path
