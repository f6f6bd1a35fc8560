"""What a worker process is started with, and where its output goes."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from cluster.fingerprint import dotted_name

_THREADS = ("OMP", "MKL", "OPENBLAS", "NUMEXPR", "VECLIB", "BLIS")


def worker_environment(threads: int, gpus: Sequence[str]) -> dict[str, str]:
    """Environment of a worker: threads as the task asked, so that results do not depend on the machine."""
    limits = {f"{library}_NUM_THREADS": str(threads) for library in _THREADS}
    fixed = {"CUDA_VISIBLE_DEVICES": ",".join(gpus), "PYTHONUNBUFFERED": "1"}
    return {"PYTHONHASHSEED": "0", **os.environ, **limits, **fixed}


def worker_path() -> list[str]:
    """Our `sys.path`, with a script's folder inside a package replaced by the parent of the package."""
    path: dict[str, None] = {}
    for entry in sys.path:
        folder = Path(entry or ".").absolute()
        if (folder / "__init__.py").exists():
            folder = folder.resolve()
            folder = folder.parents[len(dotted_name(folder / "__init__.py").split(".")) - 2]
        path[str(folder)] = None
    return list(path)


@contextlib.contextmanager
def output_to(log: Path) -> Iterator[None]:
    """Send stdout and stderr, of C code and child processes too, to the log of the attempt."""
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    except OSError as error:  # the work goes on: its output stays in the log of the worker
        logging.getLogger(__name__).warning("cannot open %s: %s", log, error)
        yield
        return
    saved = [(number, os.dup(number)) for number in (1, 2)]
    for number, _ in saved:
        os.dup2(handle, number)
    os.close(handle)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        for number, copy in saved:
            os.dup2(copy, number)
            os.close(copy)
        remove_if_empty(log)


def remove_if_empty(log: Path) -> None:
    """Drop a log that says nothing."""
    with contextlib.suppress(OSError):
        if log.stat().st_size == 0:
            log.unlink()
