"""Room on the disk: asked for before writing, and a plain message when it runs out all the same."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ocvtp.errors import NotAvailable

MARGIN = 1.1
"""Free space asked for, over the bytes that will be written."""


class DiskFull(NotAvailable):
    """There is no room for what is to be written. Nothing half-written is left."""


def ensure_space(folder: Path, need: int) -> None:
    """`DiskFull` unless the disk of `folder` (which exists) has room for `need` bytes and a tenth more."""
    wanted, free = int(need * MARGIN), shutil.disk_usage(folder).free
    if free < wanted:
        raise DiskFull(
            f"{folder}: {wanted} bytes are needed, {free} are free on that disk: make room or choose another folder"
        )


@contextmanager
def explain_full_disk(path: Path, written: int | None = None) -> Iterator[None]:
    """Turn the operating system's "no space left" (or "quota exceeded") into `DiskFull` that names the file."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        size = "" if written is None else f" for {written} bytes more"
        raise DiskFull(f"{path}: the disk is full, no room{size}; the partial file was removed") from error
