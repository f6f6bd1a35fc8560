"""Jobs that a driver left behind when it was killed: the next run on the same store cancels them, and fences them.

Jobs are named after their run. In its folder of logs a run says who drives it, again and again, and what its arrays of
jobs are to do. Whether a driver on another login node is dead, the time of its file tells.
"""

import contextlib
import getpass
import json
import logging
import re
from pathlib import Path

from cluster.host import Process
from cluster.slurm import queue as slurm_queue
from cluster.store.faults import appears
from cluster.store.layout import STATUS
from cluster.store.lease import fence

log = logging.getLogger(__name__)

FOLDER = "slurm"  # in the folder of logs of a run
SILENCE = 300.0  # seconds without a sign of life of a driver on another host after which it counts as dead
LIMIT = 30.0  # seconds that cancelled jobs have to leave the queue
_NAME = re.compile(r".+-(?P<run>\d{8}-\d{6}-[0-9a-f]{8})")  # as the executor names the jobs of a run


def reap(logs: Path, now: float) -> None:
    """Cancel jobs of runs with logs in this folder that are abandoned now, and fence their attempts."""
    user = getpass.getuser()
    jobs: dict[Path, set[str]] = {}
    for job, name in slurm_queue.alive(user=user).items():
        if match := _NAME.fullmatch(name):
            jobs.setdefault(logs / match["run"], set()).add(job)
    dead = [run for run in jobs if abandoned(run, now)]
    orphans = {job for run in dead for job in jobs[run]}
    if not orphans:
        return
    log.warning("cancelling %d SLURM jobs that a killed driver left behind", len(orphans))
    slurm_queue.cancel(orphans)
    if not appears(lambda: not orphans & slurm_queue.alive(user=user).keys(), LIMIT):
        log.warning("some cancelled SLURM jobs have not left the queue; they can publish nothing")
    for array in (array for run in dead for array in (run / FOLDER).glob("*.array")):
        with contextlib.suppress(ValueError):  # its driver was killed while it wrote the file: nothing of it runs
            for pack in map(json.loads, array.read_text().splitlines()):
                for job in pack["jobs"]:
                    fence(Path(job["out"]), job["id"])


def abandoned(run: Path, now: float) -> bool:
    """Whether the driver of the run with these logs is dead, at a time by the clock of the file system.

    Should it live all the same, its cancelled jobs come again, and nothing is lost.
    """
    try:
        alive = Process.from_json(json.loads((run / STATUS).read_bytes())["process"]).alive()
        silent = now - (run / STATUS).stat().st_mtime > SILENCE
    except (OSError, ValueError, KeyError, TypeError):
        return False  # nobody can say
    return alive is False or (alive is None and silent)
