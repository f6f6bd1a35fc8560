"""One attempt inside a Ray worker: the function that Ray runs finds our code on the node, and runs the attempt.

The call never runs in Ray's own process but in a local worker beside it, which serves one attempt after another. If
Ray's process dies, the local worker and its children die with it.
"""

import os
import site
import socket
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.local.executor import Allotted
from cluster.local.process import worker_path
from cluster.protocol import Cause, Event, Job
from cluster.store.layout import appears

VISIBLE_WITHIN = 10.0  # seconds a shared file system may take to show the folder of logs
_executors: dict[Path, Allotted] = {}  # what runs attempts in this process: one, of the run with these logs


def code_path() -> list[str]:
    """Folders the driver imports from, but those of Python and of installed packages: nodes have their own."""
    paths = sysconfig.get_paths()
    installed = [paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")] + site.getsitepackages()
    folders = [Path(folder) for folder in worker_path() if Path(folder).is_dir()]
    return [str(folder) for folder in folders if not any(folder.is_relative_to(path) for path in installed)]


def remote_function() -> Callable[..., Iterator[Any]]:
    """The function that Ray runs.

    A nested one, so that it travels as code: to import anything of this package a worker must know where it
    is, which this function tells it: `paths` has the folder to work in, then those of our code, relative to the copy
    that Ray makes of a working dir if they lie in it. The call of the task is imported by name.
    """

    def start(job: dict[str, Any], environment: dict[str, str], paths: list[str], moved_by: str) -> Iterator[Any]:
        import re
        import sys

        import ray

        if "cluster.ray.worker" not in sys.modules:  # the first attempt of this process
            # Not by the current folder: where nodes share a disk, another one may have made the copy anew.
            copies = [found[0] for path in sys.path if (found := re.match(".*/_ray_pkg_[^/]*", path))]
            if not copies and not all(map(os.path.isabs, paths)):
                raise RuntimeError(f"no copy of the working dir here: this worker imports from {sys.path}")
            folder, *code = [os.path.normpath(Path(*copies[:1], path)) for path in paths]
            of_ray = ray.__path__[0] + os.sep
            others = [path for path in sys.path if path not in code]
            # Ray's own copies of common packages come last: tasks do not import those.
            sys.path[:] = [*code, *sorted(others, key=lambda path: path.startswith(of_ray))]
            os.environ.update(environment, PYTHONPATH=os.pathsep.join(code))
            if Path(folder).is_dir():
                os.chdir(folder)
        from cluster.ray.worker import attempt

        for event in attempt(job, moved_by):
            yield replace(event, node=ray.get_runtime_context().get_node_id())

    return start


def attempt(as_json: Mapping[str, Any], moved_by: str) -> Iterator[Event]:
    """Run one attempt, as `Job.from_json` reads it, to its end, yielding its news; the last is of kind "ended"."""
    job = Job.from_json(as_json)
    logs = job.log.parent
    if not appears(logs.is_dir, VISIBLE_WITHIN):
        problem = (
            f"node {socket.gethostname()} does not see {logs}: the store must lie on a file system that all nodes "
            f"share, under the same path ({moved_by} names it)"
        )
        yield Event(job.id, "ended", Cause.EXCEPTION, problem)
        return
    if logs not in _executors:
        for executor in _executors.values():
            executor.close()
        _executors.clear()
        _executors[logs] = Allotted(logs)
    executor = _executors[logs]
    yield from executor.attempt(job)
    if job.resources.gpus:  # CUDA keeps memory on a GPU as long as its process lives, and Ray gives the GPU away now
        executor.release()
