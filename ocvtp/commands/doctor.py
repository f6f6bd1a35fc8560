"""`ocvtp doctor`: what this machine can run, and how to mend what it cannot."""

import argparse
import importlib.metadata
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ocvtp.commands import common, executors
from ocvtp.errors import OcvtpError

State = Literal["ok", "missing", "warning"]
_MARKS = {"ok": "[green]ok[/green]", "missing": "[yellow]missing[/yellow]", "warning": "[yellow]warning[/yellow]"}
_LOW_DISK_GB = 5


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `mend` says what to do where it is not ok."""

    part: str
    name: str
    state: State
    detail: str
    mend: str = ""
    needed: bool = False


def add(subparsers: Any) -> None:
    """Declare the subcommand."""
    parser = common.add(subparsers, "doctor", run, "say what this machine can run, with a mend for what it cannot",
                        "Exit code 1 only if something is missing that ocvtp itself needs.")  # fmt: skip
    common.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Look and print."""
    findings = examine()
    broken = any(finding.needed and finding.state == "missing" for finding in findings)
    if args.json:
        common.print_json({"ok": not broken, "findings": [asdict(finding) for finding in findings]})
        return int(broken)
    out = common.console()
    for part in dict.fromkeys(finding.part for finding in findings):
        table = common.table(part, "", " ", "  ")
        table.show_header = False
        for finding in (f for f in findings if f.part == part):
            mend = f"\n[dim]mend: {finding.mend}[/dim]" if finding.mend and finding.state != "ok" else ""
            table.add_row(_MARKS[finding.state], finding.name, finding.detail + mend)
        out.print(table)
        out.print()
    return int(broken)


def examine() -> list[Finding]:
    """Everything that was found, part by part."""
    parts: tuple[Callable[[], Iterator[Finding]], ...] = (_machine, _packages, _vlms, _datasets, _executors, _disk)
    return [finding for part in parts for finding in part()]


def _machine() -> Iterator[Finding]:
    yield Finding("Machine", "python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("Machine", "cpu", "ok", f"{cores} cores{_memory()}")
    try:
        import torch
    except ImportError:
        return
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        yield Finding("Machine", f"cuda:{index}", "ok", f"{about.name}, {about.total_memory / 1e9:.0f} GB")
    if torch.backends.mps.is_available():
        yield Finding("Machine", "mps", "ok", "Apple GPU")
    if not torch.cuda.is_available() and not torch.backends.mps.is_available():
        yield Finding("Machine", "gpu", "missing", "none: tiny-llava runs on a CPU, 7B models hardly",
                      "run on a machine with a GPU, or set cluster.executor to ray or slurm")  # fmt: skip


def _memory() -> str:
    try:
        return f", {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.0f} GB of memory"
    except (ValueError, OSError, AttributeError):
        return ""


def _packages() -> Iterator[Finding]:
    from packaging.requirements import Requirement

    seen: set[str] = set()
    for line in importlib.metadata.requires("ocvtp") or []:
        wanted = Requirement(line)
        extra = next((e for e in ("", "figures", "eval", "pipeline") if _applies(wanted, e)), None)
        if extra is None or wanted.name in seen or wanted.name == "ocvtp":
            continue
        seen.add(wanted.name)
        yield _package(wanted, extra)


def _applies(wanted: Any, extra: str) -> bool:
    return wanted.marker is None or bool(wanted.marker.evaluate({"extra": extra}))


def _package(wanted: Any, extra: str) -> Finding:
    target = f"'ocvtp[{extra}]'" if extra else "ocvtp"
    mend = f"pip install {target}"
    use = f" (for {extra})" if extra else ""
    try:
        version = importlib.metadata.version(wanted.name)
    except importlib.metadata.PackageNotFoundError:
        return Finding("Packages", wanted.name, "missing", f"not installed{use}", mend, needed=not extra)
    if not wanted.specifier.contains(version, prereleases=True):
        detail = f"{version}, but {wanted.specifier} is needed{use}"
        return Finding("Packages", wanted.name, "warning", detail, mend, needed=not extra)
    return Finding("Packages", wanted.name, "ok", f"{version}{use}")


def _vlms() -> Iterator[Finding]:
    from ocvtp.commands import catalog
    from ocvtp.vlms.catalogue import catalog as entries

    for name, entry in entries().items():
        if "folder" not in entry:
            continue
        shipped = Path(__file__).parent.parent / "vlms" / entry["folder"]
        if (shipped / "model.safetensors").is_file():
            yield Finding("VLMs", name, "ok", str(shipped))
        else:
            mend = f"python -m pipelines.tiny train --model {name}"
            yield Finding("VLMs", name, "missing", f"no weights in {shipped}", mend)
    yield from _catalogue("VLMs", catalog.vlms)


def _datasets() -> Iterator[Finding]:
    from ocvtp.commands import catalog

    yield from _catalogue("Benchmarks", catalog.datasets)


def _catalogue(part: str, read: Callable[[], list[Any]]) -> Iterator[Finding]:
    try:
        items = read()
    except OcvtpError as error:
        yield Finding(part, "catalogue", "missing", str(error), "install ocvtp anew", needed=True)
        return
    yield from (_cached(part, item) for item in items)


def _cached(part: str, item: Any) -> Finding:
    place = item.place()
    if place is not None:
        return Finding(part, item.name, "ok", str(place))
    return Finding(part, item.name, "missing", f"{item.repo} is not on this machine", item.mend)


def _executors() -> Iterator[Finding]:
    yield Finding("Executors", "local", "ok", "processes on this machine")
    for name, (state, detail, mend) in (("ray", executors.ray()), ("slurm", executors.slurm())):
        yield Finding("Executors", name, state, detail, mend)


def _disk() -> Iterator[Finding]:
    from huggingface_hub.constants import HF_HOME

    for name, path in (("store", Path(os.environ.get("OCVTP_STORE") or ".")), ("model cache", Path(HF_HOME))):
        there = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
        free = shutil.disk_usage(there).free / 1e9
        state: State = "ok" if free >= _LOW_DISK_GB else "warning"
        yield Finding("Disk", name, state, f"{free:,.0f} GB free at {there}", f"free some: less than {_LOW_DISK_GB} GB")
