"""Jobs that a driver left behind when it was killed: the next run on the same store cancels them, and fences them.

Each run notes in its folder of logs who drives it, and what its arrays of jobs are to do. Jobs are named after the run.
Whether a driver on another login node is dead, the time of its file tells, which it renews.
"""

import contextlib
import getpass
import json
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path

from cluster.host import Process
from cluster.slurm import queue as slurm_queue
from cluster.store.faults import appears
from cluster.store.lease import fence

log = logging.getLogger(__name__)

FOLDER, DRIVER = "slurm", "driver.json"
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

    def fence(self) -> None:
        """Fence all its attempts; those that have ended do not mind."""
        for array in self.folder.glob("*.array"):
            with contextlib.suppress(ValueError):  # its driver was killed while it wrote the file: nothing runs
                for job in (job for line in array.read_text().splitlines() for job in json.loads(line)["jobs"]):
                    fence(Path(job["out"]), job["id"])


def reap(own: Ledger) -> None:
    """Cancel jobs of runs on the store of this one, which begins now, whose drivers are dead; fence their attempts."""
    logs, now, user = own.folder.parent.parent, own.seen(), getpass.getuser()
    jobs: dict[Ledger, set[str]] = {}
    for job, name in slurm_queue.alive(user=user).items():
        if match := _NAME.fullmatch(name):
            jobs.setdefault(Ledger(logs / match["run"] / FOLDER), set()).add(job)
    dead = [ledger for ledger in jobs if ledger.abandoned(now)]
    orphans = {job for ledger in dead for job in jobs[ledger]}
    if not orphans:
        return
    log.warning("cancelling %d SLURM jobs that a killed driver left behind", len(orphans))
    slurm_queue.cancel(orphans)
    if not appears(lambda: not orphans & slurm_queue.alive(user=user).keys(), LIMIT):
        log.warning("some cancelled SLURM jobs have not left the queue; they can publish nothing")
    for ledger in dead:
        ledger.fence()
