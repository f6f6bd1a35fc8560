"""Where a task finds its inputs, and what it computes on."""

from pathlib import Path

from ocvtp.errors import BadInput


def in_store(folder: Path, path: str) -> Path:
    """A file or folder of the store, by the relative path that a spec gives under `at`.

    An attempt works in `<store>/<kind>/.<key>.tmp-<attempt>/result`, on whichever machine it runs.
    """
    root = folder.resolve().parents[2]
    found = root / path
    if not found.exists():
        raise BadInput(f"{found} is not in the store: run the stage that makes it again")
    return found


def device() -> str:
    """A GPU if this task was given one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
