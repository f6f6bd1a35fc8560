"""A real SLURM of three nodes with fake GPUs on this machine, listening on loopback only.

`running` starts its daemons in a folder of their own, with a munge key of their own, and stops them by pid.
As a pytest plugin it has the fixture `slurm_server`, one cluster for all tests.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cluster_helpers import alive, descendants, is_worker, kill, wait_for

NODES = 3
DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel")
_UP = 30.0


@dataclass
class ServerInfo:
    """How to reach the cluster, and how to hurt it."""

    folder: Path
    environment: dict[str, str]
    profile: Path

    def command(self, *command: str, check: bool = True) -> str:
        """Run one of SLURM's commands."""
        environment = {**os.environ, **self.environment}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
        assert not check or done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def jobs(self) -> list[str]:
        """Ids of jobs that are not over."""
        return self.command("squeue", "-h", "-r", "-o", "%i").split()

    def pid(self, daemon: str) -> int:
        """Of `slurmctld` or `slurmd.n1`."""
        return int((self.folder / "run" / f"{daemon}.pid").read_text())

    def kill_node(self, node: str) -> None:
        """End a node at once, with all that runs on it, and let the controller know."""
        daemon = self.pid(f"slurmd.{node}")
        for pid in (daemon, *self._steps(node)):
            for one in (*descendants(pid), pid):
                kill(one)
        self.command("scontrol", "update", f"nodename={node}", "state=down", "reason=test")

    def freeze(self) -> None:
        """Stop the workers of all jobs where they are, so that no job ends by itself."""
        for step in (step for number in range(1, NODES + 1) for step in self._steps(f"n{number}")):
            for pid in filter(is_worker, descendants(step)):
                os.kill(pid, signal.SIGSTOP)

    def _steps(self, node: str) -> list[int]:
        """Processes that run jobs on a node: they are nobody's children."""
        spool = str(self.folder / "spool" / node)
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                command = (entry / "cmdline").read_bytes()
                if command.startswith(b"slurmstepd") and spool.encode() in _open_files(entry):
                    found.append(int(entry.name))
        return found

    def start_node(self, node: str) -> None:
        """Have a node back that was killed."""
        self.command("slurmd", "-c", "-N", node, "-f", str(self.folder / "etc" / "slurm.conf"))
        self.command("scontrol", "update", f"nodename={node}", "state=resume", check=False)
        wait_for(lambda: "idle" in self.command("sinfo", "-h", "-n", node, "-o", "%T"))

    def wipe(self) -> None:
        """Stop it, forget every job, and start it again: ids begin anew."""
        _stop(self)
        shutil.rmtree(self.folder / "state")
        _start(self)


def _open_files(entry: Path) -> bytes:
    return "\n".join(str(link.readlink()) for link in (entry / "fd").iterdir()).encode()


def available() -> str | None:
    """Why there can be no cluster here; None if there can."""
    if sys.platform != "linux":
        return "SLURM runs on Linux"
    missing = [name for name in DAEMONS if shutil.which(name, path=_path()) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (apt-get install slurm-wlm munge; `make test` does it as root)"
    if os.geteuid() != 0:
        return "only root can start SLURM's daemons, and this is not root"
    return None


def _path() -> str:
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


@contextlib.contextmanager
def running(folder: Path, *, max_array: int = 20) -> Iterator[ServerInfo]:
    """A cluster, as long as the context lasts, whose arrays have fewer than `max_array` jobs."""
    short = Path(tempfile.mkdtemp(prefix="s"))  # names of sockets are limited
    environment = {"SLURM_CONF": str(short / "etc" / "slurm.conf"), "PATH": _path()}
    profile = folder / "profile.yaml"
    profile.write_text("poll_seconds: 0.5\nspare_memory_gb: 0.3\nlost_seconds: 8\nsignal_seconds: 15\n")
    server = ServerInfo(short, environment, profile)
    _configure(short, max_array)
    try:
        _start(server)
        yield server
    finally:
        with contextlib.suppress(AssertionError, subprocess.SubprocessError):
            server.command("scancel", "--user=root", check=False)
            wait_for(lambda: not server.jobs(), 10)
        _stop(server)
        shutil.rmtree(short, ignore_errors=True)


@pytest.fixture(scope="session")
def slurm_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerInfo]:
    reason = available()
    if reason:
        if os.environ.get("CI"):
            pytest.fail(f"SLURM cannot be tested, and must be in CI: {reason}")
        pytest.skip(f"NOT TESTED: {reason}")
    with running(tmp_path_factory.mktemp("slurm")) as server:
        yield server


def _start(server: ServerInfo) -> None:
    folder = server.folder
    (folder / "state").mkdir(exist_ok=True)
    munge = folder / "munge"
    server.command(
        "munged", f"--key-file={munge}/key", f"--socket={munge}/sock", f"--pid-file={folder}/run/munged.pid",
        f"--log-file={munge}/log", f"--seed-file={munge}/seed", "--num-threads=2",
    )  # fmt: skip
    conf = str(folder / "etc" / "slurm.conf")
    server.command("slurmctld", "-c", "-f", conf)
    for number in range(1, NODES + 1):
        server.command("slurmd", "-c", "-N", f"n{number}", "-f", conf)
    deadline = time.monotonic() + _UP
    while server.command("sinfo", "-h", "-N", "-p", "ci", "-t", "idle", "-o", "%N", check=False).count("n") < NODES:
        if time.monotonic() > deadline:
            logs = "\n".join(path.read_text()[-2000:] for path in (folder / "log").iterdir())
            raise AssertionError(f"SLURM did not come up in {_UP:.0f} s:\n{logs}")
        time.sleep(0.1)


def _stop(server: ServerInfo) -> None:
    """All daemons, slurmctld before munged, on which it rests."""
    run = server.folder / "run"
    files = sorted(run.glob("*.pid"), key=lambda path: path.name.startswith("munged"))
    for file in files:
        with contextlib.suppress(OSError, ValueError):
            pid = int(file.read_text())
            if not alive(pid):
                continue
            os.kill(pid, signal.SIGTERM)
            try:
                wait_for(lambda pid=pid: not alive(pid), 6)
            except AssertionError:
                kill(pid)
            file.unlink(missing_ok=True)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _configure(folder: Path, max_array: int) -> None:
    names = [f"n{number}" for number in range(1, NODES + 1)]
    for name in ("etc", "state", "log", "run", "munge", "dev", *(f"spool/{node}" for node in names)):
        (folder / name).mkdir(parents=True)
    folder.chmod(0o755)
    key = folder / "munge" / "key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    # Devices, not files: for those SLURM sets CUDA_VISIBLE_DEVICES. They are clones of /dev/null.
    os.mknod(folder / "dev" / "gpu0", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    host = socket.gethostname().partition(".")[0]
    control, *ports = _free_ports(NODES + 1)
    first_job = int(time.time()) % 60_000_000 + 1000
    nodes = "\n".join(
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 Boards=1 SocketsPerBoard=1 "
        "CoresPerSocket=2 ThreadsPerCore=1 RealMemory=16000 Gres=gpu:fake:1 State=UNKNOWN"
        for name, port in zip(names, ports, strict=True)
    )
    everything = ",".join(names)
    (folder / "etc" / "slurm.conf").write_text(f"""ClusterName=ci
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/sock,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
FirstJobId={first_job}
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=200
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=CANCEL
ReturnToService=2
JobRequeue=1
KillWait=5
OverTimeLimit=0
SlurmdTimeout=10
BatchStartTimeout=120
SlurmctldTimeout=10
InactiveLimit=0
MinJobAge=300
MaxArraySize={max_array}
GresTypes=gpu
{nodes}
PartitionName=ci Nodes={everything} Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO PriorityTier=1
PartitionName=urgent Nodes={everything} MaxTime=INFINITE State=UP OverSubscribe=NO PriorityTier=10
""")
    (folder / "etc" / "gres.conf").write_text(
        f"AutoDetect=off\nNodeName={everything} Name=gpu Type=fake File={folder}/dev/gpu0\n"
    )
