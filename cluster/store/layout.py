"""Names beside a target, the one place that knows them.

<parent>/<name>                     the published folder
<parent>/.<name>.tmp-<attempt>/     one attempt: owner.json, result/ (what the call writes), resume/
<parent>/.<name>.corrupt-<random>/  a published folder that no longer agreed with its manifest
"""

from __future__ import annotations

import contextlib
import os
import re
import uuid
from pathlib import Path

from cluster.errors import BadTask

RESULT, RESUME = "result", "resume"
TEMPORARY = re.compile(r"\.(?P<name>.+)\.tmp-(?P<attempt>[0-9a-f]{32})", re.DOTALL)
LONGEST_NAME = 180  # bytes of a folder name, so that the names beside it stay within the usual 255


def new_attempt() -> str:
    """A fresh name for an attempt."""
    return uuid.uuid4().hex


def check_out(out: Path) -> None:
    """Make sure that `out` can have temporaries beside it.

    Raises:
        BadTask: no folder name, or one that is too long.
    """
    if out.name in ("", ".", "..") or "\0" in str(out):
        raise BadTask(f"{str(out)!r} is not the path of a folder to publish")
    if len(os.fsencode(out.name)) > LONGEST_NAME:
        raise BadTask(f"the folder name of {out} is longer than {LONGEST_NAME} bytes: use a shorter one")


def temporary(out: Path, attempt: str) -> Path:
    """Temporary folder of one attempt to make `out`."""
    return out.parent / f".{out.name}.tmp-{attempt}"


def temporaries(parent: Path, name: str | None = None) -> list[tuple[Path, str, str]]:
    """(folder, name of its target, attempt) of every temporary in `parent`, or of those of one target."""
    found = []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(parent) as entries:
        for entry in entries:
            match = TEMPORARY.fullmatch(entry.name)
            if match and name in (None, match["name"]):
                found.append((parent / entry.name, match["name"], match["attempt"]))
    return sorted(found)
