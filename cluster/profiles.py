"""Profiles: how to use a cluster, in a file of `cluster/ray/` or `cluster/slurm/`, or of one's own.

`default.yaml` of each kind has every legal key with its default. A profile names those that differ.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import yaml

from cluster.errors import BadConfig

Kind = Literal["ray", "slurm"]
_FOLDER = Path(__file__).parent
_DEFAULT = "default"
_SUFFIXES = (".yaml", ".yml")


def load_profile(kind: Kind, name: str | None) -> dict[str, Any]:
    """Every key of a profile with its value.

    Args:
        kind: of cluster.
        name: of a file in `cluster/<kind>/` without its suffix, or the path of a YAML file; None: the defaults.

    Raises:
        BadConfig: no such file, one that is not YAML, an unknown key or a value of the wrong type; the message names
            the file, the key and the nearest legal one.
    """
    defaults = _read(_FOLDER / kind / f"{_DEFAULT}.yaml")
    path = _path(kind, name or _DEFAULT)
    given = _read(path)
    for key, value in given.items():
        if key not in defaults:
            raise BadConfig(f"{path}: unknown key {key!r}: {nearest(str(key), defaults)}")
        if not _alike(value, defaults[key]):
            wanted = _kind_of(defaults[key])
            raise BadConfig(f"{path}: {key} is {value!r}: {wanted} is needed, such as {defaults[key]!r}")
    return {**defaults, **given}


def profile_names(kind: Kind) -> list[str]:
    """Profiles that come with this version."""
    return sorted(path.stem for path in (_FOLDER / kind).glob("*.yaml") if path.stem != "cluster")


def _path(kind: Kind, name: str) -> Path:
    if name.endswith(_SUFFIXES) or "/" in name:
        path = Path(name)
        if not path.is_file():
            raise BadConfig(f"cluster.profile: there is no file {name}")
        return path
    path = _FOLDER / kind / f"{name}.yaml"
    if name not in profile_names(kind):
        raise BadConfig(
            f"cluster.profile: there is no {kind} profile {name!r} ({nearest(name, profile_names(kind))}); a path of "
            "your own ends with .yaml"
        )
    return path


def _read(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise BadConfig(f"cannot read {path}: {error}") from error
    except yaml.YAMLError as error:
        raise BadConfig(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise BadConfig(f"{path} does not hold a mapping of keys to values")
    return found


def nearest(name: str, legal: Iterable[str]) -> str:
    """A hint for who wrote a wrong name."""
    near = difflib.get_close_matches(name, list(legal), n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"legal: {', '.join(legal)}"


def _alike(value: Any, default: Any) -> bool:
    """Whether a value may stand where the default does; what is null by default is for its user to check."""
    if default == "auto":
        return True  # or a number: its user checks
    if default is None or value is None:
        return default is None
    if isinstance(default, bool):
        return isinstance(value, bool)
    if isinstance(default, int | float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, type(default))


def _kind_of(default: Any) -> str:
    names = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a text",
        list: "a list",
        dict: "a mapping",
    }
    return names[type(default)]
