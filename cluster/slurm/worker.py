"""What a SLURM job does: one attempt after another, each in a local worker beside it.

News go to a file that is named by the first attempt and never by a job id: a wiped cluster gives those out again.
SLURM tells a job to stop with SIGUSR2 before its time is over and with SIGTERM when it is preempted: the task then
stops where it next says how far it is.
"""

import json
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType

from cluster.local.executor import Allotted
from cluster.protocol import Cause, Event, Job, encode
from cluster.store.layout import appears
from cluster.worker.attempt import STOPPED_BY

PERIOD = 2.0  # seconds between two lines of progress: many jobs write to one file system
VISIBLE_WITHIN = 60.0  # seconds a shared file system may take to show the file of an array


def events_file(folder: Path, jobs: Sequence[Job]) -> Path:
    """Where a SLURM job tells how its attempts go."""
    return folder / f"{jobs[0].id}.events"


def write_array(folder: Path, packs: Sequence[Sequence[Job]], grace: float, allowance: float) -> Path:
    """Write into a folder of the run's logs what the jobs of an array are to do: the attempts of each, in order.

    A task has `grace` seconds to stop once its time is over. A job begins no attempt later than `allowance` seconds.
    """
    path = folder / f"{packs[0][0].id}.array"
    common = {"grace": grace, "allowance": allowance}
    lines = [json.dumps({"jobs": [asdict(job) for job in pack], **common}, default=str) for pack in packs]
    path.write_text("\n".join(lines) + "\n")
    return path


def run_jobs(array: str, index: int) -> None:
    """Do what the array's file says of one job of it."""
    path = Path(array)
    appears(path.exists, VISIBLE_WITHIN)
    found = json.loads(path.read_text().split("\n")[index])
    jobs = [Job.from_json(job) for job in found["jobs"]]
    executor = Allotted(path.parent.parent, found["grace"])
    signals: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        executor.signal(number)

    for number in STOPPED_BY:
        signal.signal(number, pass_on)
    signal.signal(signal.SIGCONT, signal.SIG_IGN)
    handle = os.open(events_file(path.parent, jobs), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    node, told = os.environ.get("SLURMD_NODENAME", ""), 0.0

    def write(event: Event) -> None:
        nonlocal told
        if event.kind == "progress":
            if time.monotonic() - told < PERIOD:
                return
            told = time.monotonic()
        os.write(handle, encode(replace(event, node=node)))  # a line in one write
        if event.kind == "ended":
            os.fsync(handle)

    end = time.monotonic() + found["allowance"]
    try:
        for job in jobs:
            started = time.monotonic()
            if signals or (job is not jobs[0] and started > end):
                write(Event(job.id, "ended", Cause.BUSY, "its SLURM job had no time left for it"))
                continue
            for event in executor.attempt(job):
                write(replace(event, seconds=time.monotonic() - started if event.kind == "ended" else None))
    finally:
        executor.close()
