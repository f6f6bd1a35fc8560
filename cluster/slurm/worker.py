"""One attempt inside a SLURM job. What it says goes to a file of its own, named by the attempt and never by a job id.

SLURM tells a job to stop with SIGUSR2 before its time is over and with SIGTERM when it is preempted or cancelled: the
task then stops where it next says how far it is. A thread ends an attempt that outgrows its memory or its time, should
SLURM not; SIGKILL is left to SLURM.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from cluster import wire
from cluster.host.machine import group_members, memory_of
from cluster.local.worker import output_to
from cluster.protocol import Cause, Event, Job
from cluster.worker.attempt import perform, stop, stopped_by
from cluster.worker.guard import Guardian

TICK = 0.5  # seconds between two looks at memory and time
PERIOD = 2.0  # seconds between two lines of progress: many jobs write to one file system
VISIBLE_TRIES = 60  # seconds a shared file system may take to show the file of an array


def events_file(folder: Path, attempt: str) -> Path:
    """Where an attempt says how it goes."""
    return folder / f"{attempt}.events"


class _Teller:
    """Writes events, each a line in one write."""

    def __init__(self, path: Path) -> None:
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        self._lock, self._ended, self._last = threading.Lock(), False, 0.0

    def __call__(self, event: Event) -> None:
        with self._lock:
            now = time.monotonic()
            if self._ended or (event.kind == "progress" and now - self._last < PERIOD):
                return
            self._ended = event.kind == "ended"
            self._last = now if event.kind == "progress" else self._last
            os.write(self._handle, wire.encode({"event": wire.event_to_json(event)}))
            if self._ended:
                os.fsync(self._handle)


def write_array(folder: Path, jobs: Sequence[Job], grace: float) -> Path:
    """What an array of jobs is to do, in a file of its own.

    Args:
        folder: for it and for event files.
        jobs: by index in the array.
        grace: seconds that a task has to stop after it was told to because its time is over.
    """
    path = folder / f"{jobs[0].id}.array"
    path.write_text(json.dumps({"jobs": [job.to_json() for job in jobs], "grace": grace}))
    return path


def main(array: str) -> None:
    """Do what the array's file says of this job of it."""
    path = Path(array)
    for _ in range(VISIBLE_TRIES):
        if path.exists():
            break
        time.sleep(1)
    found = json.loads(path.read_text())
    run(Job.from_json(found["jobs"][int(os.environ["SLURM_ARRAY_TASK_ID"])]), path.parent, found["grace"])


def run(job: Job, folder: Path, grace: float) -> None:
    """Run one attempt, and say how it goes in `folder`."""
    if os.getpgrp() != os.getpid():
        os.setpgrp()
    stopped_by(
        {
            signal.SIGUSR2: (Cause.TIMEOUT, "SLURM says that its time is nearly over"),
            signal.SIGTERM: (Cause.PREEMPTED, "SLURM takes its node away"),
        }
    )
    signal.signal(signal.SIGCONT, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    tell = _Teller(events_file(folder, job.id))
    tell(Event(job.id, "started", node=os.environ.get("SLURMD_NODENAME", "")))
    threading.Thread(target=_watch, args=(job, tell, grace), name="limits", daemon=True).start()
    guardian = Guardian()  # should this process be killed: not every SLURM finds the children of a dead one
    guardian.tell("+", os.getpgrp())
    try:
        with output_to(job.log):
            ended = perform(job, tell)
        tell(ended)
    finally:
        guardian.tell("-", os.getpgrp())
        guardian.close()


def _watch(job: Job, tell: _Teller, grace: float) -> None:
    """End what outgrows its memory or its time."""
    started = time.monotonic()
    asked, group = job.resources, os.getpgrp()
    while True:
        time.sleep(TICK)
        used = memory_of(group_members([group])[group])
        if used > asked.memory_gb:
            _die(job, tell, Cause.OOM, f"used {used:.2f} GB of memory, {asked.memory_gb:g} were asked for")
        over = time.monotonic() - started - asked.minutes * 60
        if over > 0:
            detail = f"took longer than {asked.minutes:g} minutes"
            stop(Cause.TIMEOUT, detail)
            if over > grace:
                _die(job, tell, Cause.TIMEOUT, detail)


def _die(job: Job, tell: _Teller, cause: Cause, detail: str) -> None:
    tell(Event(job.id, "ended", cause, detail))
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1])
