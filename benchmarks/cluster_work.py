"""What the tasks of `benchmarks/cluster.py` do, here so that workers can import it by name; runs as a script too."""

import sys
import time
from pathlib import Path
from typing import Any


def wait(spec: dict[str, Any], folder: Path) -> None:
    """Take some time without computing, and write a result."""
    time.sleep(spec["seconds"])
    (folder / "result").write_text(str(spec["x"]))


def compute(spec: dict[str, Any], folder: Path) -> None:
    """Keep one core busy for some time of its own, and write a result."""
    start = time.process_time()
    total = 0
    while time.process_time() - start < spec["seconds"]:
        total += sum(range(1000))
    (folder / "result").write_text(str(total))


def plain(call: str, spec: dict[str, Any], folder: str) -> None:
    """The same without anything of ours: a folder with a result."""
    path = Path(folder)
    path.mkdir(parents=True)
    {"wait": wait, "compute": compute}[call](spec, path)


if __name__ == "__main__":
    plain("wait", {"x": sys.argv[1], "seconds": float(sys.argv[2])}, sys.argv[3])
