"""Keeps lmms-eval to itself: what it prints goes to logging, what it changes in the process is put back."""

import contextlib
import io
import logging
import os
import random
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

LOG = logging.getLogger("ocvtp.evaluation.lmms")


class LogStream(io.TextIOBase):
    """A text stream whose lines become log records; what a log handler writes to it goes to the original."""

    def __init__(self, original: TextIO) -> None:
        self.original = original
        self._rest = ""
        self._state = threading.local()

    def writable(self) -> bool:
        """Yes."""
        return True

    def isatty(self) -> bool:
        """No: progress bars need not draw."""
        return False

    def write(self, text: str) -> int:
        """Log whole lines; of a line that was drawn over, what it showed last."""
        if getattr(self._state, "busy", False):
            return self.original.write(text)
        *lines, self._rest = (self._rest + text).split("\n")
        self._state.busy = True
        try:
            for line in lines:
                shown = line.rstrip("\r").rsplit("\r", 1)[-1].strip()
                if shown:
                    LOG.debug("%s", shown)
        finally:
            self._state.busy = False
        return len(text)

    def flush(self) -> None:
        """Nothing is held back but an unfinished line."""


@contextlib.contextmanager
def aside() -> Iterator[tuple[TextIO, TextIO]]:
    """Within it, standard output and error become log records; yields the two as they were."""
    out, err = sys.stdout, sys.stderr
    with contextlib.redirect_stdout(LogStream(out)), contextlib.redirect_stderr(LogStream(err)):
        yield out, err


@contextlib.contextmanager
def aloud(streams: tuple[TextIO, TextIO]) -> Iterator[None]:
    """Within it, standard output and error are what they were before `aside`."""
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        yield


@contextlib.contextmanager
def environment(changes: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for a while."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute for a while."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def import_lmms_eval() -> None:
    """Import lmms-eval (many seconds the first time), and undo what that does to the whole process.

    It switches off all warnings, lets Pillow take truncated images for whole ones, and logs to standard output.
    """
    if "lmms_eval.evaluator" in sys.modules:
        return
    from PIL import ImageFile

    with warnings.catch_warnings(), attribute(ImageFile, "LOAD_TRUNCATED_IMAGES", False):
        import lmms_eval.evaluator
        import lmms_eval.tasks  # noqa: F401
    from loguru import logger

    logger.remove()
    logger.add(_to_logging, format="{message}")


def _to_logging(message: Any) -> None:
    """From loguru to logging; what lmms-eval calls information and warnings is about its own configuration."""
    level = logging.ERROR if message.record["level"].no >= logging.ERROR else logging.DEBUG
    LOG.log(level, "%s", str(message).rstrip("\n"))


@contextlib.contextmanager
def sandbox(cache: Path, *, offline: bool) -> Iterator[None]:
    """The process as one evaluation needs it: alone in its world, no drawing, its caches in a folder of its own.

    Args:
        cache: folder for what `datasets` and lmms-eval cache of local data; the user's cache is left alone.
        offline: the hub is not to be asked for anything; `cache` is used then only.
    """
    import datasets
    import huggingface_hub.constants as hub
    from lmms_eval.api import task
    from PIL import ImageFile

    alone = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "TOKENIZERS_PARALLELISM": "false"}
    local = {
        "HF_HUB_OFFLINE": "1",
        "LMMS_EVAL_DATASETS_CACHE": str(cache),
        "LMMS_LOCAL_CACHE": str(cache),
    }
    # Which cache is used is decided once a process and remembered; it must be decided anew before and after.
    decided = task._resolve_hf_datasets_cache_dir
    drawn = datasets.is_progress_bar_enabled()
    drawing = random.getstate()
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        stack.enter_context(environment(alone | (local if offline else {})))
        if offline:
            stack.enter_context(attribute(hub, "HF_HUB_OFFLINE", True))
            stack.enter_context(attribute(datasets.config, "HF_HUB_OFFLINE", True))
            # A truncated image in our own data is an error, not half a picture.
            stack.enter_context(attribute(ImageFile, "LOAD_TRUNCATED_IMAGES", False))
        else:
            stack.enter_context(attribute(ImageFile, "LOAD_TRUNCATED_IMAGES", True))
        stack.callback(decided.cache_clear)
        stack.callback(random.setstate, drawing)
        if drawn:
            datasets.disable_progress_bars()
            stack.callback(datasets.enable_progress_bars)
        decided.cache_clear()
        yield
