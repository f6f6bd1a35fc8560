"""The process that does the work: one attempt after another, each claimed, called and published. The same everywhere.

So heavy imports happen once. It speaks with its driver through a socket, and leads a process group of its own, so that
Ctrl-C in a terminal reaches the driver alone. SIGTERM, which a machine about to be taken away sends to all, and
SIGUSR2, which says that time is up, stop the task where it next says how far it is. It dies with its driver, and takes
its children along: the driver's guardian kills the group. (Not `PR_SET_PDEATHSIG`: that comes when the *thread* ends
that started the worker.)
"""

import contextlib
import faulthandler
import json
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from cluster.errors import BadTask, Fenced, Stopped, StoreUnavailable
from cluster.fingerprint import fingerprint
from cluster.protocol import Cause, Event, Job, encode
from cluster.store.layout import is_published
from cluster.store.publish import About, publish
from cluster.store.workspace import Busy, Workspace
from cluster.task import resolve_call

log = logging.getLogger(__name__)

PROGRESS_PERIOD = 0.2  # seconds between two reports of progress
STOPPED_BY = {
    signal.SIGTERM: (Cause.PREEMPTED, "told to give way, by SIGTERM"),
    signal.SIGUSR2: (Cause.TIMEOUT, "told that its time is up, by SIGUSR2"),
}
_CAUSES = {Fenced: Cause.LOST, StoreUnavailable: Cause.NODE, MemoryError: Cause.OOM}

Report = Callable[[Event], None]


class _Current:
    """The attempt this process is at, for `progress`."""

    attempt: tuple[Job, Workspace, Report] | None = None
    told = 0.0  # when progress was last reported
    stop: tuple[Cause, str] | None = None  # why it is to stop, since somebody said so
    busy = False  # whether it is at one, from before its claim until after its publication


def serve(handle: int) -> None:
    """Make the attempts that come as lines on a socket, until its other end is shut; tell news on it."""
    channel, owner = socket.socket(fileno=handle), os.getpid()
    channel.set_inheritable(False)
    lock = threading.Lock()  # a task may report progress from several threads

    def report(event: Event) -> None:
        with lock:
            channel.sendall(encode(event))

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner or not _Current.busy:  # a child, or at none: it ends as ever
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        else:
            _Current.stop = _Current.stop or STOPPED_BY[signal.Signals(number)]

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in STOPPED_BY:
        signal.signal(number, stop)
    faulthandler.enable()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    report(Event("", "ready"))
    for line in channel.makefile("rb"):
        job = Job.from_json(json.loads(line))
        report(Event(job.id, "started"))
        _output_to(job.log)
        ended = perform(job, report)
        remove_if_empty(job.log)
        report(ended)


def progress(done: float, total: float, note: str = "") -> None:
    """Say how far the running task is; does nothing outside of a worker.

    Args:
        done: how much is done, in any unit.
        total: how much there is in all, in the same unit.
        note: a few words, such as a loss.

    Raises:
        Fenced: another attempt took over this task: stop, the result would not be published.
        Stopped: the machine is needed, or time is nearly up: save what is worth it in `resume/`, and raise it again.
    """
    if _Current.attempt is None:
        return
    if _Current.stop is not None:
        raise Stopped(_Current.stop[1])
    job, workspace, report = _Current.attempt
    if workspace.lost:
        workspace.check()
    if time.monotonic() - _Current.told >= PROGRESS_PERIOD or done >= total:
        _Current.told = time.monotonic()
        report(Event(job.id, "progress", done=float(done), total=float(total), note=note))


def perform(job: Job, report: Report) -> Event:
    """Run one attempt to its end and say how it ended; never raises.

    No half result is published, and nothing is left beside the target but a `resume/` with content.
    """
    workspace, _Current.busy = None, True
    cause, detail = Cause.DONE, ""
    try:
        if is_published(job.out):
            raise Busy("published by another run")
        workspace = Workspace.claim(job.out, job.id, supersedes=job.supersedes, lease=job.lease)
        with workspace.heartbeat():
            _Current.attempt, _Current.told = (job, workspace, report), 0.0
            call, module = resolve_call(job.call), job.call.partition(":")[0]
            # A declared version is a promise of the task's author; only fingerprints can be compared.
            if re.fullmatch("[0-9a-f]{32}", job.code) and job.code != fingerprint(module):
                raise BadTask(f"the source of {module}, or of an import, changed since the task was planned: run again")
            call(job.spec, workspace.folder, *([job.inputs] if job.inputs else []))
            _Current.attempt = None  # what is done is published, stop or no stop
            publish(workspace, About(job.key, job.kind, job.call, job.spec, job.code))
    except Busy as busy:
        cause, detail = Cause.BUSY, str(busy)
    except Stopped as stopped:
        cause, detail = _Current.stop or (Cause.PREEMPTED, str(stopped))
        log.warning("stopped: %s", detail)
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        traceback.print_exception(error)
        cause = next((cause for kind, cause in _CAUSES.items() if isinstance(error, kind)), Cause.EXCEPTION)
        detail = " ".join(f"{type(error).__name__}: {error}".split())[:500]
    finally:
        _Current.attempt = _Current.stop = None
        if workspace is not None:
            with contextlib.suppress(OSError, StoreUnavailable):  # the driver, or the next attempt, cleans up
                workspace.discard()
        _Current.busy = False
    return Event(job.id, "ended", cause, detail)


def _output_to(path: Path) -> None:
    """Send stdout and stderr, of C code and child processes too, to the log of an attempt, until the next one."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    except OSError as error:  # the work goes on
        log.warning("cannot open %s: %s", path, error)
        return
    for number in (1, 2):
        os.dup2(handle, number)
    os.close(handle)


def remove_if_empty(log: Path) -> None:
    """Drop a log that says nothing."""
    with contextlib.suppress(OSError):
        if log.stat().st_size == 0:
            log.unlink()
