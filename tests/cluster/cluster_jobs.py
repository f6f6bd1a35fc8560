"""Calls that the tests hand to workers: small, and each with one way to behave or misbehave."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cluster

Spec = dict[str, Any]


def square(spec: Spec, folder: Path) -> None:
    """The plain case: two files, one in a subfolder; `seconds` of work."""
    time.sleep(spec.get("seconds", 0))
    (folder / "result.json").write_text(json.dumps({"x": spec["x"], "square": spec["x"] ** 2}))
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "deep" / "er" / "data.bin").write_bytes(bytes([spec["x"] % 256]) * 1000)


def count_calls(spec: Spec, folder: Path) -> None:
    """Appends one line to `spec["calls"]` each time it is called: how often a task really ran."""
    handle = os.open(spec["calls"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(handle, f"{spec['x']}\n".encode())
    os.close(handle)
    square(spec, folder)


def _times(spec: Spec) -> int:
    """How often this task was called before, this time included: kept outside of the attempt."""
    path = Path(spec["calls"])
    with path.open("a") as file:
        file.write(".")
    return path.stat().st_size


def killed(spec: Spec, folder: Path) -> None:
    """Killed by SIGKILL in its first `times` attempts, with a half written file behind it."""
    (folder / "half").write_text("half")
    if _times(spec) <= spec["times"]:
        os.kill(os.getpid(), signal.SIGKILL)
    (folder / "half").write_text("whole")


def raises(spec: Spec, folder: Path) -> None:
    _times(spec)
    (folder / "half").write_text("half")
    sys.stdout.write("about to fail\n")
    raise ValueError("no good <[bold]>")


def leaves(spec: Spec, folder: Path) -> None:
    _times(spec)
    sys.exit(3)


def big(spec: Spec, folder: Path) -> None:
    """One file of `bytes`, and a small one."""
    (folder / "data.bin").write_bytes(bytes(range(256)) * (spec["bytes"] // 256))
    (folder / "note.txt").write_text("big")


def empty(spec: Spec, folder: Path) -> None:
    (folder / "nothing").mkdir()


def links(spec: Spec, folder: Path) -> None:
    (folder / "file").write_text("a result")
    (folder / "link").symlink_to(spec.get("to", "/etc/hostname"))


def full_disk(spec: Spec, folder: Path) -> None:
    """A real ENOSPC from the kernel."""
    _times(spec)
    (folder / "half").write_text("half")
    with Path("/dev/full").open("wb", buffering=0) as file:
        file.write(b"x")
    raise AssertionError(errno.ENOSPC)


def resumes(spec: Spec, folder: Path) -> None:
    """Ten steps with a checkpoint each; dies (`how`) after the steps in `spec["die_after"]`, once each."""
    checkpoint = folder / "resume" / "state.json"
    checkpoint.parent.mkdir(exist_ok=True)
    steps = json.loads(checkpoint.read_text()) if checkpoint.exists() else []
    attempt = _times(spec)
    for step in range(len(steps), 10):
        steps.append([step, attempt])
        fresh = checkpoint.with_name("state.new")
        fresh.write_text(json.dumps(steps))
        fresh.replace(checkpoint)
        if step in spec["die_after"] and steps[-1][1] == attempt:
            if spec["how"] == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            elif spec["how"] == "hang":
                time.sleep(600)
            else:
                raise RuntimeError("dies")
    (folder / "steps.json").write_text(json.dumps(steps))


def hangs(spec: Spec, folder: Path) -> None:
    """Never ends, nor does its child; says who they are."""
    _times(spec)
    child = subprocess.Popen(["sleep", "600"])
    Path(spec["pids"]).write_text(f"{os.getpid()} {child.pid}")
    (folder / "half").write_text("half")
    time.sleep(600)


def eats(spec: Spec, folder: Path) -> None:
    """Holds `megabytes` of memory for a while."""
    _times(spec)
    block = bytearray(os.urandom(1)) * (spec["megabytes"] << 20)
    time.sleep(spec.get("seconds", 3))
    (folder / "size").write_text(str(len(block)))


HOARD: list[bytearray] = []


def hoards(spec: Spec, folder: Path) -> None:
    """Leaves memory behind in its worker."""
    HOARD.append(bytearray(os.urandom(1)) * (spec["megabytes"] << 20))
    (folder / "pid").write_text(str(os.getpid()))


def memory_error(spec: Spec, folder: Path) -> None:
    if _times(spec) == 1:
        raise MemoryError("cannot allocate 3 TB")
    (folder / "fine").write_text("fine")


def environment(spec: Spec, folder: Path) -> None:
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "PYTHONHASHSEED")
    started = time.time()
    time.sleep(spec.get("seconds", 0))
    found = {name: os.environ.get(name) for name in names}
    found |= {"pid": os.getpid(), "from": started, "to": time.time()}
    (folder / "environment.json").write_text(json.dumps(found))


def talks(spec: Spec, folder: Path) -> None:
    """Writes to stdout, stderr, logging, and through a child process; reports progress."""
    import logging

    sys.stdout.write("on stdout\n")
    sys.stderr.write("on stderr\n")
    logging.getLogger("talks").info("on logging")
    subprocess.run(["echo", "from a child"], check=True)
    for step in range(3):
        cluster.progress(step + 1, 3, note=f"step {step}")
        time.sleep(0.25)
    (folder / "said").write_text("all")


def publishes_then_dies(spec: Spec, folder: Path) -> None:
    """Killed between its publication and its last word: the thread waits for the rename."""
    import threading

    out = folder.parent.parent / spec["out"]

    def watch() -> None:
        while not (out / "manifest.json").exists():
            pass
        os.kill(os.getpid(), signal.SIGKILL)

    _times(spec)
    threading.Thread(target=watch, daemon=True).start()
    for number in range(50):
        (folder / f"{number}.txt").write_text("x")


def moves(spec: dict[str, Any], folder: Path, inputs: dict[str, Any]) -> None:
    """Writes where its inputs lie."""
    (folder / "result.json").write_text(json.dumps(inputs))
