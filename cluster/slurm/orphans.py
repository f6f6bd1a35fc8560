"""Jobs that a driver left behind when it was killed: the next run on the same store cancels them, and fences them.

Each run notes in its folder of logs who drives it, and which job runs which attempt. Jobs are named after their run.
Whether a driver on another login node is dead, the time of its file tells, which it renews.
"""

import contextlib
import getpass
import json
import logging
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

from cluster.host import Process
from cluster.slurm import queue as slurm_queue
from cluster.store.lease import fence

log = logging.getLogger(__name__)

FOLDER, DRIVER, ATTEMPTS = "slurm", "driver.json", "attempts.jsonl"
SILENCE = 300.0  # seconds without a sign of life of a driver on another host after which it counts as dead
LIMIT = 30.0  # seconds that cancelled jobs have to leave the queue
_NAME = re.compile(r".+-(?P<run>\d{8}-\d{6}-[0-9a-f]{8})")  # as the executor names the jobs of a run


@dataclass(frozen=True)
class Ledger:
    """The folder in which a run keeps its notes, beside the files of submitit."""

    folder: Path

    def open(self) -> None:
        """Say who drives the run."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / DRIVER).write_text(json.dumps(Process.me().to_json()))

    def renew(self) -> None:
        """Say that the driver is alive."""
        with contextlib.suppress(OSError):
            os.utime(self.folder / DRIVER)

    def note(self, job: str, attempt: str, out: Path) -> None:
        """Say which job runs an attempt."""
        with (self.folder / ATTEMPTS).open("a") as file:
            file.write(json.dumps({"job": job, "attempt": attempt, "out": str(out)}) + "\n")

    def abandoned(self, now: float) -> bool:
        """Whether its driver is dead at a time by the clock of the file system.

        Should it live all the same, its cancelled jobs come again, and nothing is lost.
        """
        try:
            alive = Process.from_json(json.loads((self.folder / DRIVER).read_bytes())).alive()
        except (OSError, ValueError, KeyError, TypeError):
            return False  # nobody can say
        return alive is False or (alive is None and now - self.seen() > SILENCE)

    def seen(self) -> float:
        """When its driver last gave a sign of life, by the clock of the file system."""
        return (self.folder / DRIVER).stat().st_mtime

    def fence(self, jobs: set[str]) -> None:
        """Fence the attempts of these jobs."""
        notes = self.folder / ATTEMPTS
        for line in notes.read_text().splitlines() if notes.exists() else ():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # its driver was killed while it wrote the line
                found = json.loads(line)
                if found["job"] in jobs:
                    fence(Path(found["out"]), str(found["attempt"]))


def reap(own: Ledger) -> None:
    """Cancel jobs of runs on the store of this one, which begins now, whose drivers are dead; fence their attempts."""
    logs, now = own.folder.parent.parent, own.seen()
    ledgers: dict[str, Ledger] = {}
    orphans: set[str] = set()
    for job, name in _alive().items():
        if match := _NAME.fullmatch(name):
            ledger = ledgers.setdefault(match["run"], Ledger(logs / match["run"] / FOLDER))
            orphans |= {job} if ledger.abandoned(now) else set()
    if not orphans:
        return
    log.warning("cancelling %d SLURM jobs that a killed driver left behind", len(orphans))
    slurm_queue.cancel(orphans)
    deadline = time.monotonic() + LIMIT
    while orphans & _alive().keys():
        if time.monotonic() > deadline:
            log.warning("some cancelled SLURM jobs have not left the queue; they can publish nothing")
            break
        time.sleep(0.5)
    for ledger in ledgers.values():
        ledger.fence(orphans)


def _alive() -> dict[str, str]:
    """The names of this user's jobs, by their ids."""
    return {one: state.name for one, state in slurm_queue.queue(user=getpass.getuser()).items() if state.alive}
