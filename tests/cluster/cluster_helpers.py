"""What several test files of `cluster` need."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from cluster import Task, verify
from cluster.protocol import Job
from cluster.store.layout import new_attempt

OWN = ("logs", "locks", "verdicts", "code")
"""Folders of a store that hold no results."""
# Names that break whatever is built as a shell string or split at white space.
WEIRD = ["plain", "a b", "quo'te\"", "new\nline;$(x)", "ünïcödé ✓"]


def tree(folder: Path) -> dict[str, bytes]:
    """Path -> content of every file below."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def results(root: Path) -> dict[str, bytes]:
    """Everything below a store but its own folders, strays included."""
    return {name: data for name, data in tree(root).items() if name.split("/")[0] not in OWN}


def strays(root: Path) -> list[str]:
    """Files and folders in a store that belong to no published result; verifies the results, too."""
    found = []
    for kind in root.iterdir():
        if kind.name not in OWN:
            for folder in kind.iterdir():
                if folder.name.startswith("."):
                    found.append(str(folder))
                else:
                    listed = {file.path for file in verify(folder).files} | {"manifest.json"}
                    found += sorted(set(tree(folder)) - listed)
    locks = root / "locks"
    return found + ([str(lock) for lock in locks.iterdir()] if locks.exists() else [])


def job_of(task: Task, *, number: int = 1, supersedes: tuple[str, ...] = (), lease: float = 60.0) -> Job:
    """An attempt of the task, as `run` would make it."""
    log = task.out.parent.parent / "logs" / f"{task.name}-{number}.log"
    return Job(
        new_attempt(), task.name, number, task.call_name, task.spec, task.out, task.key, task.kind, task.code,
        task.resources, log, lease, supersedes,
    )  # fmt: skip


def forked(work: Callable[[], None]) -> int:
    """Run `work` in a forked child; its exit code, or minus the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def descendants(pid: int) -> list[int]:
    """Running processes below `pid`."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] not in "ZX":
            parents[int(entry.name)] = int(fields[1])
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found[1:]


def is_worker(pid: int) -> bool:
    """Whether it is a local worker, rather than the guardian or a child of a task."""
    try:
        return b"cluster.worker.attempt" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def wait_for(condition: Callable[[], object], seconds: float = 30.0) -> None:
    """Wait until it holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.02)


def kill(pid: int) -> None:
    """SIGKILL, if it is still there."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
