"""The side of a driver of `cluster.worker.guardian`."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

log = logging.getLogger(__name__)

GRACE = 2.0  # seconds it may take to end


class Guardian:
    """A process that kills what is left of us, should we be killed."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("guardian.py")
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(script)], stdin=subprocess.PIPE, start_new_session=True
        )

    def tell(self, sign: str, group: int) -> None:
        """`+`: kill this group if the driver dies; `-`: it is gone."""
        if self._process.stdin is None:
            return
        try:
            self._process.stdin.write(f"{sign}{group}\n".encode())
            self._process.stdin.flush()
        except OSError:
            log.debug("the guardian is gone; workers still watch the driver themselves")

    def close(self) -> None:
        """Let it end."""
        if self._process.stdin is not None:
            try:
                self._process.stdin.close()
            except OSError:
                log.debug("the guardian was gone already")
        try:
            self._process.wait(GRACE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
