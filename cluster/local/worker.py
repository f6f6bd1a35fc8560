"""A local worker: a process that serves one attempt after another, so that heavy imports happen once.

It speaks with its driver through two pipes, and leads a process group of its own, so that Ctrl-C in a
terminal reaches the driver alone. SIGTERM, which a machine about to be taken away sends to all, stops the task where it
next says how far it is. It dies with its driver, and takes its children along: the kernel kills it
(Linux), and a thread watches the pipe from the driver, which closes when the driver is gone.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import logging
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from cluster import wire
from cluster.host.process import LINUX
from cluster.protocol import Cause, Event, Job
from cluster.worker.attempt import perform, stopped_by

PR_SET_PDEATHSIG = 1
LINGER = 2.0  # seconds an idle worker may take for its exit handlers once the driver has closed the pipe


def main(commands: int, events: int, driver: int) -> None:
    """Serve the attempts that come as lines on the file handle `commands`; tell news on `events`."""
    busy = threading.Event()
    _die_with(driver, commands, busy)
    os.set_inheritable(commands, False)
    os.set_inheritable(events, False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    stopped_by({signal.SIGTERM: (Cause.PREEMPTED, "told to give way, by SIGTERM")}, idle=lambda: not busy.is_set())
    faulthandler.enable()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    lock = threading.Lock()  # a task may report progress from several threads

    def report(event: Event) -> None:
        with lock:
            _write(events, wire.encode({"event": wire.event_to_json(event)}))

    _write(events, wire.encode({"ready": os.getpid()}))
    for job in _jobs(commands):
        busy.set()
        report(Event(job.id, "started"))
        try:
            with output_to(job.log):
                ended = perform(job, report)
        finally:
            busy.clear()
        report(ended)


def _jobs(commands: int) -> Iterator[Job]:
    lines = wire.Lines()
    while data := os.read(commands, 1 << 16):
        for message in lines.feed(data):
            yield Job.from_json(message)


def _write(handle: int, data: bytes) -> None:
    while data:
        data = data[os.write(handle, data) :]


def _die_with(driver: int, commands: int, busy: threading.Event) -> None:
    if LINUX:
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != driver:  # it died before we asked the kernel
        os._exit(1)

    def watch() -> None:
        poll = select.poll()
        poll.register(commands, 0)  # nothing but the other end being closed
        while not poll.poll(1000) and os.getppid() == driver:
            pass
        if not busy.is_set():  # the main thread has seen the end too, and is on its way out
            time.sleep(LINGER)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, name="driver-watch", daemon=True).start()


@contextlib.contextmanager
def output_to(log: Path) -> Iterator[None]:
    """Send stdout and stderr, of C code and child processes too, to the log of the attempt."""
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    except OSError as error:  # the work goes on: its output stays in the log of the worker
        logging.getLogger(__name__).warning("cannot open %s: %s", log, error)
        yield
        return
    saved = [(number, os.dup(number)) for number in (1, 2)]
    for number, _ in saved:
        os.dup2(handle, number)
    os.close(handle)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        for number, copy in saved:
            os.dup2(copy, number)
            os.close(copy)
        with contextlib.suppress(OSError):
            if log.stat().st_size == 0:
                log.unlink()
