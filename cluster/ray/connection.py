"""Connecting to a Ray cluster: a given one, the one of this machine, or a private one."""

import contextlib
import logging
import os
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cluster.errors import CannotRun
from cluster.host import GIB, Machine
from cluster.protocol import Context
from cluster.ray.profile import RayProfile

log = logging.getLogger(__name__)

PACKAGE = re.compile(r"(?P<root>.*/_ray_pkg_[0-9a-f]+)(/.*)?", re.DOTALL)  # Ray's copy of a working dir


def connect(context: Context, profile: RayProfile) -> tuple[Any, bool, str | None]:
    """(ray, whether the connection is ours, the folder that Ray copies to the nodes).

    As with `ray.init`: the address of the profile, else RAY_ADDRESS (a job that was submitted to a cluster has
    it), else the cluster that was started on this machine, else a private one that ends with this executor.
    """
    address = profile.address or os.environ.get("RAY_ADDRESS") or "auto"
    if address.startswith("ray://"):
        raise CannotRun(f"{address} is the address of a Ray client server, from where the store cannot be shared: "
                        "run the driver in the cluster, with `ray job submit`")  # fmt: skip
    if "://" in address:
        raise CannotRun(f"{address} is the address of Ray's dashboard, for `ray job submit`: drivers connect to "
                        "HOST:6379 or `auto`")  # fmt: skip
    if address in ("auto", "local"):  # of this machine: what is started here listens on loopback only
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # read by Ray when it is imported
    import ray

    found = PACKAGE.fullmatch(str(Path.cwd()))  # as in a job that was submitted with a working dir
    root = found["root"] if found else None
    if ray.is_initialized():
        return ray, False, root
    runtime_env: dict[str, Any] | None = None
    if profile.working_dir is not None:
        if not Path(profile.working_dir).is_dir():
            raise CannotRun(f"the working dir {profile.working_dir} is not a folder")
        root, runtime_env = str(Path(profile.working_dir).absolute()), {"working_dir": profile.working_dir}
    with _own_signal_handlers():
        _init(ray, context, address, runtime_env)
    return ray, True, root


def _init(ray: Any, context: Context, address: str, runtime_env: dict[str, Any] | None) -> None:
    options = {"log_to_driver": False, "logging_level": logging.WARNING, "runtime_env": runtime_env}
    if address != "local":
        try:
            ray.init(address=address, **options)
            return
        except (ConnectionError, ValueError, RuntimeError) as error:
            if address != "auto":
                raise CannotRun(f"cannot use the Ray cluster at {address}: {error}") from error
            log.info("there is no Ray cluster on this machine: starting a private one")
    machine = Machine.here(cpus=context.config.workers, memory_gb=context.config.memory_gb)
    ray.init(
        address="local",
        num_cpus=machine.cpus,
        num_gpus=len(machine.gpus),
        _memory=int(machine.memory_gb * GIB),
        object_store_memory=100 * 2**20,
        include_dashboard=False,
        **options,
    )


@contextlib.contextmanager
def _own_signal_handlers() -> Iterator[None]:
    """Restore the handlers that `ray.init` replaces: how signals end a run is decided by `run`."""
    main = threading.current_thread() is threading.main_thread()  # no other may set handlers
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            if main and handler is not None:
                signal.signal(number, handler)
