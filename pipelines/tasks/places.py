"""Where a task finds its inputs, whether they are those of its spec, and what it computes on."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ocvtp.errors import BadInput, Incompatible


def in_store(folder: Path, path: str) -> Path:
    """A file or folder of the store, by the relative path that stands in a task's `inputs`.

    An attempt works in `<store>/<kind>/.<key>.tmp-<attempt>/result`, on whichever machine it runs.
    """
    root = folder.resolve().parents[2]
    found = root / path
    if not found.exists():
        raise BadInput(f"{found} is not in the store: run the stage that makes it again")
    return found


def check_same(what: str, here: Mapping[str, Any], planned: Mapping[str, Any]) -> None:
    """Make sure that what a worker has loaded is what the key of its task says.

    Raises:
        Incompatible: it is not; names the entries that differ.
    """
    if dict(here) != dict(planned):
        other = ", ".join(_differing(here, planned))
        raise Incompatible(f"{what} here is not what the task was planned for ({other}): make it the same everywhere")


def _differing(here: Mapping[str, Any], planned: Mapping[str, Any]) -> list[str]:
    found = []
    for name in sorted({*here, *planned}):
        one, other = here.get(name), planned.get(name)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            found += [f"{name}.{inner}" for inner in _differing(one, other)]
        elif one != other:
            found.append(name)
    return found


def device() -> str:
    """A GPU if this task was given one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
