"""What was found whole once is not read again as long as the file system says that nobody touched it.

<store>/verdicts/<kind>/<key>.json has what the file system said of the files of a result when they were read and found
whole. A file that was changed since, or replaced under an old mtime, has another ctime or inode: all are read again.
What a disk loses by itself does not show: `verify` without verdicts reads every byte.
"""

import json
import logging
import time
from pathlib import Path

from cluster.store import lease
from cluster.store.layout import VERDICTS, replace_text
from cluster.store.lease import Marks

log = logging.getLogger(__name__)

TICK_NS = 20_000_000  # two changes within a tick of a file system's clock (10 ms at most) may leave the same times


def marks(folder: Path) -> Marks:
    """Those of every file below `folder`; none if one was changed just now, since its next change might not show."""
    found = lease.marks(folder)
    return [] if any(time.time_ns() - int(one[4]) <= TICK_NS for one in found) else found


def recall(folder: Path) -> Marks:
    """The marks of a published folder when it was read; empty if never."""
    found: Marks = []
    try:
        found = json.loads(_path(folder).read_bytes())
    except (OSError, ValueError) as error:
        if not isinstance(error, FileNotFoundError):
            log.warning("%s: %r; the files are read again", _path(folder), error)
    return found


def remember(folder: Path, whole: Marks) -> None:
    """Keep what `recall` gives; a store that cannot be written to remembers nothing."""
    try:
        _path(folder).parent.mkdir(parents=True, exist_ok=True)
        replace_text(_path(folder), json.dumps(whole))
    except OSError as error:
        log.info("%s is not remembered to be whole: %s", folder, error)


def forget_absent(root: Path) -> None:
    """Drop the verdicts on results that the store `root` no longer has."""
    for path in (root / VERDICTS).glob("*/*"):
        if not (root / path.parent.name / path.name.removesuffix(".json")).is_dir():
            path.unlink(missing_ok=True)


def _path(folder: Path) -> Path:
    return folder.parents[1] / VERDICTS / folder.parent.name / f"{folder.name}.json"
