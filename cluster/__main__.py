"""`python -m cluster status|verify|sweep`: look at runs started elsewhere, check results, clean up."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from cluster.driver.journal import STATES, read_status
from cluster.driver.lock import sweep_locks
from cluster.driver.view import clock
from cluster.errors import ClusterError, Corrupt
from cluster.store.layout import temporaries
from cluster.store.lease import UNOWNED_PATIENCE, Watch
from cluster.store.leftovers import sweep
from cluster.store.publish import is_published, quarantine, verify
from cluster.store.store import Store, default_root
from cluster.task import display


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 all well, 1 something was found, 2 wrong use."""
    options = _parser().parse_args(arguments)
    try:
        store = Store(options.store or default_root())
        found: int = options.command(store, options, Console(markup=False, highlight=False, soft_wrap=True))
    except ClusterError as error:
        Console(stderr=True, markup=False).print(f"error: {error}")
        return 2
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cluster", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command)
        where = "folder of the results (default: OCVTP_STORE, or `cluster.store` of params.yaml)"
        sub.add_argument("--store", type=Path, help=where)
        sub.add_argument("--json", action="store_true", help="print JSON")
        return sub

    status = add("status", _status, "show the runs of this store, newest first")
    status.add_argument("--all", action="store_true", help="also those that have ended, not only the last one")
    check = add("verify", _verify, "compare published results with their manifests, byte by byte")
    check.add_argument("folders", nargs="*", type=Path, help="published folders (default: all of the store)")
    check.add_argument("--quarantine", action="store_true", help="move corrupt ones aside, so that they are made again")
    clean = add("sweep", _sweep, "remove what dead attempts left")
    clean.add_argument("--dry-run", action="store_true", help="only list the temporaries that there are")
    clean.add_argument("--resume", action="store_true", help="also remove what a next attempt could resume from")
    text = "watch owners on other machines for a sign of life, up to their lease (default: %(default)s)"
    clean.add_argument("--wait", type=float, default=UNOWNED_PATIENCE + 0.1, metavar="SECONDS", help=text)
    return parser


def _status(store: Store, options: argparse.Namespace, console: Console) -> int:
    folders = sorted(store.logs.iterdir(), reverse=True) if store.logs.is_dir() else []
    runs = [status for folder in folders if (status := read_status(folder)) is not None]
    if not options.all:
        runs = [run for number, run in enumerate(runs) if run["state"] in ("running", "silent") or number == 0]
    if options.json:
        sys.stdout.write(json.dumps(runs, indent=1) + "\n")
        return 0
    for run in runs:
        counts = ", ".join(f"{run[name]} {name}" for name in STATES if run[name])
        owner = f"{run['process']['host']}:{run['process']['pid']}"
        left = f", {clock(run['seconds_left'])} left" if run["state"] == "running" else ""
        left += f", no sign of life for {clock(run['silent'])}" if run["state"] == "silent" else ""
        console.print(
            f"{run['run']} {run['label']} {run['state']} on {owner}: {counts} ({clock(run['seconds'])}{left})"
        )
        for task in run["now"] if run["state"] == "running" else ():
            share = f", {task['done']:g} of {task['total']:g} {task['note']}" if task["total"] else ""
            console.print(f"  {display(task['name'])} {clock(task['seconds'])}{share}")
    if not runs:
        console.print(f"no run has left a trace in {store.logs}")
    return 0


def _verify(store: Store, options: argparse.Namespace, console: Console) -> int:
    folders = options.folders or list(store.published())
    corrupt: dict[str, str] = {}
    for folder in folders:
        try:
            verify(folder)
        except Corrupt as error:
            corrupt[str(folder)] = str(error)
            if options.quarantine and folder.is_dir():
                corrupt[str(folder)] += f"; moved to {quarantine(folder)}"
    if options.json:
        sys.stdout.write(json.dumps({"checked": len(folders), "corrupt": corrupt}, indent=1) + "\n")
    else:
        for text in corrupt.values():
            console.print(text)
        console.print(f"{len(folders)} results checked, {len(corrupt)} corrupt")
    return 1 if corrupt else 0


def _sweep(store: Store, options: argparse.Namespace, console: Console) -> int:
    kinds, removed, watch = store.kinds(), list[Path](), Watch()
    if not options.dry_run:
        removed = _sweep_once(kinds, watch, options.resume)
        deadline = time.monotonic() + options.wait
        while any(temporaries(kind) for kind in kinds) and time.monotonic() < deadline:
            time.sleep(min(0.5, options.wait))
            removed += _sweep_once(kinds, watch, options.resume)
        removed += sweep_locks(store.locks)
    left = [root for kind in kinds for root, _, _ in temporaries(kind)]
    if options.json:
        sys.stdout.write(
            json.dumps({"removed": list(map(str, removed)), "left": list(map(str, left))}, indent=1) + "\n"
        )
    else:
        for root in left:
            console.print(f"left: {root}")
        console.print(f"{len(removed)} leftovers removed, {len(left)} left (at work, or to resume from)")
    return 0


def _sweep_once(kinds: list[Path], watch: Watch, resume_too: bool) -> list[Path]:
    removed = []
    for kind in kinds:
        published = {name for _, name, _ in temporaries(kind) if is_published(kind / name)}
        removed += sweep(kind, watch, published=published, resume_too=resume_too)
    return removed


if __name__ == "__main__":
    sys.exit(main())
