"""The remote function of Ray: it finds our code on a node, and hands over to `cluster.ray.worker`."""

from __future__ import annotations

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


def remote_function() -> Callable[..., Iterator[dict[str, Any]]]:
    """The function that Ray runs.

    A nested one, so that it travels as code: to import anything of this package a worker must know where it
    is, which this function tells it. The call of the task is imported by name.
    """

    def attempt(
        job: dict[str, Any], setup: dict[str, Any], code: list[str], root: str | None
    ) -> Iterator[dict[str, Any]]:
        import os
        import sys
        from pathlib import Path

        import ray

        if "cluster.ray.worker" not in sys.modules:  # the first attempt of this process
            if root is not None:
                # Not by the current folder: where nodes share a disk, another one may have made the copy anew.
                found = next((path for path in sys.path if "/_ray_pkg_" in path), None)
                if found is None:
                    raise RuntimeError(f"no copy of the working dir here: this worker imports from {sys.path}")
                copy, mark, name = found.partition("/_ray_pkg_")
                copy += mark + name.partition("/")[0]
                moved = [os.path.relpath(path, root) for path in (setup["folder"], *code)]
                # What does not lie in the working dir keeps its path.
                here = [os.path.normpath(f"{copy}/{path}") for path in moved]
                inside = [not path.startswith("..") for path in moved]
                setup["folder"], *code = [
                    new if is_inside else old
                    for new, old, is_inside in zip(here, (setup["folder"], *code), inside, strict=True)
                ]
            of_ray = str(Path(ray.__file__).parent) + os.sep
            others = [path for path in sys.path if path not in code]
            # Ray's own copies of common packages come last: tasks do not import those.
            sys.path[:] = [*code, *sorted(others, key=lambda path: path.startswith(of_ray))]
            setup["environment"]["PYTHONPATH"] = os.pathsep.join(code)
            vars(sys)["_cluster_setup"] = setup
        from cluster.ray.worker import attempt as run_attempt

        yield from run_attempt(job, vars(sys)["_cluster_setup"], ray.get_runtime_context().get_node_id())

    return attempt
