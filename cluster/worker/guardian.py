"""A process that kills what is left of a driver's workers, and of their children, should the driver be killed.

Run as a script, without any import of this package: it must be small and start at once.
"""

import contextlib
import os
import signal
import sys


class Guardian:
    """The driver's side."""

    def __init__(self) -> None:
        import subprocess  # not above: the script has no use for it

        read, self._pipe = os.pipe()
        self._process = subprocess.Popen([sys.executable, "-I", "-S", __file__], stdin=read)
        os.close(read)

    def tell(self, sign: str, group: int) -> None:
        """`+`: kill this group if the driver dies; `-`: it is gone."""
        with contextlib.suppress(OSError):  # it is gone
            os.write(self._pipe, f"{sign}{group}\n".encode())

    def close(self) -> None:
        """Let it end."""
        os.close(self._pipe)
        self._process.wait()


def main() -> None:
    """Follow the driver until it closes the pipe, by itself or by dying, then kill the groups that are left."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    # Nobody's child, in a session of its own: schedulers and terminals signal the children and groups of a driver.
    if os.fork():
        os._exit(0)
    os.setsid()
    groups: set[int] = set()
    for line in sys.stdin.buffer:
        if line.endswith(b"\n"):
            (groups.add if line[:1] == b"+" else groups.discard)(int(line[1:]))
    for group in groups:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    main()
