"""What Ray would copy of a working dir, and whether it is too much: Ray zips first and fails afterwards.

`python -m cluster.ray.upload [FOLDER]` tells it before `ray job submit --working-dir FOLDER`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from cluster.errors import NotAvailable

MIB = 2**20
LIMIT = 100 * MIB  # what the servers of Ray take in one piece
NAMED = 5  # folders to name
# As in Ray, which lets this variable replace them.
DEFAULT_EXCLUDES = os.environ.get("RAY_OVERRIDE_RUNTIME_ENV_DEFAULT_EXCLUDES", ".git,.venv,venv,__pycache__")
IGNORE_FILES = (".gitignore", ".rayignore")  # Ray reads both, in every folder


def uploaded(folder: Path) -> dict[Path, int]:
    """Size in bytes of every file that Ray would copy, by its path in `folder`."""
    from pathspec import PathSpec

    rules = [(folder, PathSpec.from_lines("gitwildmatch", DEFAULT_EXCLUDES.split(",")))]

    def below(parent: Path, rules: list[tuple[Path, Any]]) -> Iterator[Path]:
        for name in IGNORE_FILES:
            if (parent / name).is_file():
                lines = (parent / name).read_text().splitlines()
                rules = [*rules, (parent, PathSpec.from_lines("gitwildmatch", lines))]
        for path in sorted(parent.iterdir()):
            slash = "/" if path.is_dir() else ""
            if any(rule.match_file(f"{path.relative_to(base).as_posix()}{slash}") for base, rule in rules):
                continue
            if path.is_dir() and not path.is_symlink():
                yield from below(path, rules)
            elif path.is_file():
                yield path

    return {path.relative_to(folder): path.stat().st_size for path in below(folder, rules)}


def largest(sizes: dict[Path, int]) -> list[tuple[Path, int]]:
    """The largest folders or files of the top two levels, with their sizes, largest first."""
    totals: dict[Path, int] = {}
    for path, size in sizes.items():
        place = Path(*path.parts[:2])
        totals[place] = totals.get(place, 0) + size
    return sorted(totals.items(), key=lambda item: (-item[1], item[0]))[:NAMED]


def check_size(folder: Path, limit: int = LIMIT) -> int:
    """Make sure that Ray takes a working dir; returns its size in bytes, before it is zipped.

    Raises:
        NotAvailable: it is too large, or no folder; the largest folders in it are named.
    """
    if not folder.is_dir():
        raise NotAvailable(f"the working dir {folder} is not a folder")
    sizes = uploaded(folder)
    total = sum(sizes.values())
    if total > limit:
        raise NotAvailable(
            f"{folder} has {total / MIB:.0f} MiB to copy to the nodes, and Ray takes {limit / MIB:.0f} MiB: name what "
            f"they do not need in {folder / '.rayignore'}. The largest are: {_listing(sizes)}"
        )
    return total


def _listing(sizes: dict[Path, int]) -> str:
    return ", ".join(f"{path.as_posix()} ({size / MIB:.1f} MiB)" for path, size in largest(sizes))


def main(arguments: list[str]) -> int:
    """Say what would be copied; 2 if it is too much."""
    folder = Path(arguments[0] if arguments else ".")
    try:
        total = check_size(folder)
    except NotAvailable as error:
        Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print(str(error), style="red")
        return 2
    listing = _listing(uploaded(folder))
    Console(soft_wrap=True, highlight=False, markup=False).print(f"{total / MIB:.1f} MiB: {listing}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
