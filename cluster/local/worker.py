"""A local worker: a process that serves one attempt after another, so that heavy imports happen once.

It speaks with its driver through a socket, and leads a process group of its own, so that Ctrl-C in a terminal reaches
the driver alone. SIGTERM, which a machine about to be taken away sends to all, and SIGUSR2, which says that time is up,
stop the task where it next says how far it is. It dies with its driver, and takes its children along: the driver's
guardian kills the group, and a thread watches for the driver's end of the socket to close. (Not `PR_SET_PDEATHSIG`:
that comes when the *thread* ends that started the worker.)
"""

import faulthandler
import logging
import os
import select
import signal
import socket
import sys
import threading
import time

from cluster.protocol import Cause, Event, Job, Lines, encode
from cluster.worker.attempt import perform, stopped_by
from cluster.worker.environment import output_to

LINGER = 2.0  # seconds an idle worker may take for its exit handlers once the driver is gone
STOPPED_BY = {
    signal.SIGTERM: (Cause.PREEMPTED, "told to give way, by SIGTERM"),
    signal.SIGUSR2: (Cause.TIMEOUT, "told that its time is up, by SIGUSR2"),
}


def main(handle: int, driver: int) -> None:
    """Serve the attempts that come as lines on a socket, until its other end is shut; tell news on it."""
    channel, busy = socket.socket(fileno=handle), threading.Event()
    channel.set_inheritable(False)
    threading.Thread(target=_die_with, args=(driver, channel, busy), name="driver-watch", daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    stopped_by(STOPPED_BY, idle=lambda: not busy.is_set())
    faulthandler.enable()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    lock = threading.Lock()  # a task may report progress from several threads

    def report(event: Event) -> None:
        with lock:
            channel.sendall(encode(event))

    report(Event("", "ready"))
    lines = Lines(Job.from_json)
    while data := channel.recv(1 << 16):
        for job in lines.feed(data):
            busy.set()
            report(Event(job.id, "started"))
            try:
                with output_to(job.log):
                    ended = perform(job, report)
            finally:
                busy.clear()
            report(ended)


def _die_with(driver: int, channel: socket.socket, busy: threading.Event) -> None:
    poll = select.poll()
    poll.register(channel, 0)  # nothing but the other end being closed
    while not poll.poll(1000) and os.getppid() == driver:
        pass
    if not busy.is_set():  # the main thread has seen the end too, and is on its way out
        time.sleep(LINGER)
    os.killpg(0, signal.SIGKILL)
