"""A local worker: a process that serves one attempt after another, so that heavy imports happen once.

It speaks with its driver through a socket, and leads a process group of its own, so that Ctrl-C in a terminal reaches
the driver alone. SIGTERM, which a machine about to be taken away sends to all, and SIGUSR2, which says that time is up,
stop the task where it next says how far it is. It dies with its driver, and takes its children along: the driver's
guardian kills the group. (Not `PR_SET_PDEATHSIG`: that comes when the *thread* ends that started the worker.)
"""

import faulthandler
import logging
import signal
import socket
import sys
import threading

from cluster.protocol import Event, Job, Lines, encode
from cluster.worker.attempt import obey_signals, perform
from cluster.worker.environment import output_to


def main(handle: int) -> None:
    """Serve the attempts that come as lines on a socket, until its other end is shut; tell news on it."""
    channel = socket.socket(fileno=handle)
    channel.set_inheritable(False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    obey_signals()
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
            report(Event(job.id, "started"))
            with output_to(job.log):
                ended = perform(job, report)
            report(ended)
