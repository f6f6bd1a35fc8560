"""`python -m cluster COMMAND`: plans, runs and published results of a store.

Exit codes: 0 all well, 1 something was found or failed, 2 wrong use, 130 Ctrl-C.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

from rich.console import Console

from cluster.config import ClusterConfig
from cluster.driver.board import STATES, clock, read_status
from cluster.driver.lock import sweep_locks
from cluster.driver.plan import explain, forget_code, tasks_of
from cluster.errors import BadConfig, ClusterError, CorruptResult, Locked
from cluster.store.layout import LOCKS, MANIFEST, appears, files_in, put_aside, temporaries
from cluster.store.lease import UNOWNED_PATIENCE, Watch, sweep
from cluster.store.publish import Manifest, drop, set_aside, verify
from cluster.store.remote import Remote
from cluster.store.verdicts import forget_absent
from cluster.task import Store, canonical, display

Said = tuple[int, Any, list[str]]  # exit code, what --json prints, and the lines for people
DAY = 86400.0
AT_ONCE = 8  # transfers


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m cluster", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="name")
    for name, (_, text, own) in _COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        for option, about in {**_OF_ALL, **own}.items():
            command.add_argument(option, **about)
    options = parser.parse_args(arguments)
    try:
        store = Store(options.store or ClusterConfig.from_params().store)
        if not store.root.is_dir() and options.name not in ("plan", "pull"):
            raise BadConfig(f"there is no store at {store.root}: name it with --store or CLUSTER_STORE")
        code, data, lines = _COMMANDS[options.name][0](store, options)
    except ClusterError as error:
        Console(stderr=True, markup=False, soft_wrap=True).print(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        return 130
    if options.json:
        sys.stdout.write(json.dumps(data, indent=1) + "\n")
    else:
        Console(markup=False, highlight=False, soft_wrap=True).print("\n".join(lines))
    return code


def _name(store: Store, folder: Path) -> str:
    return folder.relative_to(store.root).as_posix() if folder.is_relative_to(store.root) else str(folder)


def _plan(store: Store, options: argparse.Namespace) -> Said:
    kinds = explain(tasks_of(options.tasks), store)
    return 0, [asdict(kind) for kind in kinds], [line for kind in kinds for line in kind.lines()] or ["no tasks"]


def _status(store: Store, options: argparse.Namespace) -> Said:
    folders = sorted(store.logs.iterdir(), reverse=True) if store.logs.is_dir() else []
    runs = [status for folder in folders if (status := read_status(folder)) is not None]
    if not options.all:
        runs = [run for number, run in enumerate(runs) if run["state"] in ("running", "silent") or number == 0]
    lines = [] if runs else [f"no run has left a trace in {store.logs}"]
    for run in runs:
        counts = ", ".join(f"{run[name]} {name}" for name in STATES if run[name])
        owner = f"{run['process']['host']}:{run['process']['pid']}"
        left = f", {clock(run['seconds_left'])} left" if run["state"] == "running" else ""
        left += f", no sign of life for {clock(run['silent'])}" if run["state"] == "silent" else ""
        lines.append(f"{run['run']} {run['label']} {run['state']} on {owner}: {counts} ({clock(run['seconds'])}{left})")
        for task in run["now"] if run["state"] == "running" else ():
            share = f", {task['done']:g} of {task['total']:g} {task['note']}" if task["total"] else ""
            lines.append(f"  {display(task['name'])} {clock(task['seconds'])}{share}")
    return 0, runs, lines


def _results(store: Store, options: argparse.Namespace) -> Said:
    data, lines = list[dict[str, Any]](), list[str]()
    for folder in store.published():
        try:
            manifest = Manifest.read(folder)
        except CorruptResult:
            continue  # `verify` names it
        about, size = manifest.about, sum(file.bytes for file in manifest.files)
        seconds = round(max(time.time() - (folder / MANIFEST).stat().st_mtime, 0.0), 1)
        data.append({**asdict(about), "bytes": size, "age_seconds": seconds})
        spec = ", ".join(f"{key}={display(canonical(value))}" for key, value in about.spec.items())
        short = spec if len(spec) <= 100 else f"{spec[:97]}..."
        lines.append(f"{about.kind}/{about.key} {size / 1e6:,.1f} MB {clock(seconds)} {about.call} {short}")
    total = sum(one["bytes"] for one in data)
    return 0, data, [*lines, f"{len(data)} results, {total / 1e6:,.1f} MB, in {store.root}"]


def _verify(store: Store, options: argparse.Namespace) -> Said:
    folders: list[Path] = options.folders or list(store.published())
    size, corrupt = 0, {}
    for folder in folders:
        try:
            size += sum(file.bytes for file in verify(folder).files)
        except CorruptResult as error:
            corrupt[_name(store, folder)] = str((set_aside(folder) if options.quarantine else None) or error)
    lines = [*corrupt.values(), f"{len(folders)} results checked ({size / 1e6:,.1f} MB), {len(corrupt)} corrupt"]
    if corrupt and not options.quarantine:
        lines.append("verify --quarantine moves them aside, so that the next run makes them again")
    data = {"store": str(store.root), "checked": len(folders), "bytes": size, "corrupt": corrupt}
    return int(bool(corrupt)), data, lines


def _clean(store: Store, options: argparse.Namespace) -> Said:
    if options.yes and (held := sweep_locks(store.root / LOCKS)) and options.in_use:
        raise Locked(f"{held[0]} is at work in this store, and nothing names its results yet: wait for it")
    try:
        named = options.in_use and set(options.in_use.read_text(encoding="utf-8").split())
    except (OSError, UnicodeDecodeError) as error:
        raise BadConfig(f"the names of results in use cannot be read: {error}") from error
    unused = [] if named is None else [folder for folder in store.published() if _name(store, folder) not in named]
    now = time.time()
    ages = {path: max(now - path.lstat().st_ctime, 0.0) for kind in store.kinds() for path in put_aside(kind)}
    old = [path for path, age in ages.items() if age >= options.age * DAY]
    sizes = {folder: sum(path.lstat().st_size for path in files_in(folder)) for folder in unused + old}
    lines = [f"{_name(store, folder)} {sizes[folder] / 1e6:,.1f} MB, not in use" for folder in unused]
    lines += [f"{_name(store, folder)} set aside {clock(age)} ago" for folder, age in ages.items()]
    size, swept = sum(sizes.values()), list[Path]()
    if options.yes:
        swept = _sweep(store, options)
        for folder in unused + old:
            drop(folder)
        forget_absent(store.root)
        forget_code(store, options.age * DAY)
    left = [root for kind in store.kinds() for root, _, _ in temporaries(kind)]
    lines += [f"{_name(store, root)} of an attempt at work, or to resume from" for root in left]
    did = "dropped" if options.yes else "to drop with --yes"
    lines += [
        f"{len(unused)} results not in use and {len(old)} set aside {did}, {size / 1e6:,.1f} MB",
        f"{len(swept)} leftovers of dead attempts removed, {len(left)} left; in {store.root}",
    ]
    found = {"unused": unused, "aside": ages, "old": old, "removed": swept, "left": left}
    data = {what: [_name(store, path) for path in paths] for what, paths in found.items()}
    return 0, {"store": str(store.root), "dropped": options.yes, "bytes": size, **data}, lines


def _sweep(store: Store, options: argparse.Namespace) -> list[Path]:
    """Remove what dead attempts left; those of other machines are watched for a while."""
    watch, removed = Watch(), list[Path]()

    def nothing_is_left() -> bool:
        removed.extend(path for kind in store.kinds() for path in sweep(kind, watch, resume_too=options.resume))
        return not any(temporaries(kind) for kind in store.kinds())

    appears(nothing_is_left, options.wait)
    return removed


def _transfer(store: Store, options: argparse.Namespace) -> Said:
    """Push or pull what was asked for and is not there yet."""
    remote, pushing = Remote(options.remote), options.name == "push"
    here, there = [_name(store, folder) for folder in store.published()], remote.names()
    source, target = (here, set(there)) if pushing else (there, set(here))
    for wanted in options.names:
        if not any(wanted in (name, name.partition("/")[0]) for name in source):
            raise BadConfig(f"there is no result {wanted}: give KIND or KIND/KEY")
    asked = [name for name in source if not options.names or {name, name.partition("/")[0]} & set(options.names)]
    todo, failed = [name for name in asked if name not in target], {}
    waiting, ended = iter(todo), SimpleQueue[None]()  # of a list: threads may share its iterator

    def work() -> None:
        for name in waiting:
            try:
                (remote.push if pushing else remote.pull)(store.path(*name.split("/")))
            except Exception as error:  # whatever a client raises: the others go on
                failed[name] = " ".join(f"{type(error).__name__}: {error}".split())
            ended.put(None)

    for _ in range(AT_ONCE):  # no pool: when we are interrupted nothing waits for a transfer that hangs
        Thread(target=work, daemon=True).start()
    for _ in todo:
        ended.get()
    did, done, before = f"{options.name}ed", sorted(set(todo) - set(failed)), len(asked) - len(todo)
    lines = [f"{name} was not {did}: {text}" for name, text in sorted(failed.items())]
    lines.append(f"{len(done)} results {did}, {before} there before, {len(failed)} failed")
    return int(bool(failed)), {did: done, "failed": failed, "before": before}, lines


_OF_ALL: dict[str, dict[str, Any]] = {
    "--store": {"type": Path, "help": "folder of the results (default: CLUSTER_STORE, or .cluster/store)"},
    "--json": {"action": "store_true", "help": "print JSON"},
}
_RESULTS = {"nargs": "*", "metavar": "KIND[/KEY]", "help": "results (default: all)"}
_REMOTE = {"required": True, "metavar": "URL", "help": "such as s3://bucket/results (fsspec)"}
_COMMANDS: dict[str, tuple[Callable[[Store, argparse.Namespace], Said], str, dict[str, dict[str, Any]]]] = {
    "plan": (_plan, "say what of some tasks would run, and why, without running it", {
        "tasks": {"metavar": "MODULE:FUNCTION", "help": "a function without arguments that returns the tasks"},
    }),
    "status": (_status, "show the runs of this store, newest first", {
        "--all": {"action": "store_true", "help": "also those that have ended, not only the last one"},
    }),
    "results": (_results, "list published results", {}),
    "verify": (_verify, "compare published results with their manifests, byte by byte", {
        "folders": {"nargs": "*", "type": Path, "help": "published folders (default: all of the store)"},
        "--quarantine": {"action": "store_true", "help": "move corrupt ones aside, so that they are made again"},
    }),
    "clean": (_clean, "list what is of no use any more: what dead attempts left, and results set aside", {
        "--yes": {"action": "store_true", "help": "drop it; without it it is only listed"},
        "--in-use": {"type": Path, "metavar": "FILE",
                     "help": "also results that this file does not name: a line KIND/KEY for each one in use"},
        "--age": {"type": float, "default": 7.0, "metavar": "DAYS",
                  "help": "spare results that were set aside more recently (default: %(default)g)"},
        "--resume": {"action": "store_true", "help": "also what a next attempt could resume from"},
        "--wait": {"type": float, "default": UNOWNED_PATIENCE + 0.1, "metavar": "SECONDS",
                   "help": "watch owners on other machines for a sign of life (default: %(default)s)"},
    }),
    "push": (_transfer, "upload published results to a second place", {"names": _RESULTS, "--remote": _REMOTE}),
    "pull": (_transfer, "publish here what a second place has", {"names": _RESULTS, "--remote": _REMOTE}),
}  # fmt: skip
"""Of each command the function, what it does, and its options."""


if __name__ == "__main__":
    sys.exit(main())
