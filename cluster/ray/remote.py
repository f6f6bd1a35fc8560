"""The remote function of Ray: it finds our code on a node, and hands over to `cluster.ray.worker`."""

import site
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cluster.worker.environment import worker_path


def code_path() -> list[str]:
    """Folders we import from, but those of Python and of installed packages: nodes have their own."""
    paths = sysconfig.get_paths()
    installed = [paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")] + site.getsitepackages()
    folders = [Path(folder) for folder in worker_path() if Path(folder).is_dir()]
    return [str(folder) for folder in folders if not any(folder.is_relative_to(path) for path in installed)]


def remote_function() -> Callable[..., Iterator[Any]]:
    """The function that Ray runs.

    A nested one, so that it travels as code: to import anything of this package a worker must know where it
    is, which this function tells it. The call of the task is imported by name.
    """

    def attempt(job: dict[str, Any], setup: dict[str, Any], code: list[str], root: str | None) -> Iterator[Any]:
        import os
        import sys

        import ray

        if "cluster.ray.worker" not in sys.modules:  # the first attempt of this process
            if root is not None:
                # Not by the current folder: where nodes share a disk, another one may have made the copy anew.
                mark = "/_ray_pkg_"
                found = next((path for path in sys.path if mark in path), None)
                if found is None:
                    raise RuntimeError(f"no copy of the working dir here: this worker imports from {sys.path}")
                before, _, name = found.partition(mark)
                copy = before + mark + name.partition("/")[0]
                # What does not lie in the working dir keeps its path.
                paths = [(path, os.path.relpath(path, root)) for path in (setup["folder"], *code)]
                setup["folder"], *code = [
                    path if inside.startswith("..") else os.path.normpath(f"{copy}/{inside}") for path, inside in paths
                ]
            of_ray = ray.__path__[0] + os.sep
            others = [path for path in sys.path if path not in code]
            # Ray's own copies of common packages come last: tasks do not import those.
            sys.path[:] = [*code, *sorted(others, key=lambda path: path.startswith(of_ray))]
            setup["environment"]["PYTHONPATH"] = os.pathsep.join(code)
            vars(sys)["_cluster_setup"] = setup
        from cluster.ray.worker import attempt as run_attempt

        yield from run_attempt(job, vars(sys)["_cluster_setup"], ray.get_runtime_context().get_node_id())

    return attempt
