"""`python -m cluster status | results | verify | clean | push | pull`: runs and published results of a store."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from cluster.config import ClusterConfig
from cluster.driver.journal import STATES, read_status
from cluster.driver.lock import sweep_locks
from cluster.driver.view import clock
from cluster.errors import BadConfig, ClusterError, CorruptResult, Locked
from cluster.results import Store
from cluster.store.layout import put_aside, temporaries
from cluster.store.lease import UNOWNED_PATIENCE, Watch
from cluster.store.leftovers import files_in, remove_tree, sweep
from cluster.store.publish import MANIFEST, Manifest, drop, is_published, set_aside, verify
from cluster.store.remote import Remote, transfer
from cluster.store.verdicts import forget_absent
from cluster.task import canonical, display

Said = tuple[int, dict[str, Any] | list[Any], list[str]]
"""Exit code, what --json prints, and the lines for people."""
DAY = 86400.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 all well, 1 something was found, 2 wrong use, 130 Ctrl-C."""
    options = _parser().parse_args(arguments)
    try:
        store = Store(options.store or ClusterConfig.from_params().store)
        if not store.root.is_dir() and options.command is not _pull:
            raise BadConfig(f"there is no store at {store.root}: name it with --store or CLUSTER_STORE")
        code, data, lines = options.command(store, options)
    except ClusterError as error:
        Console(stderr=True, markup=False, soft_wrap=True).print(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        return 130
    if options.json:
        sys.stdout.write(json.dumps(data, indent=1) + "\n")
    else:
        Console(markup=False, highlight=False, soft_wrap=True).print("\n".join(lines))
    return int(code)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cluster", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Callable[[Store, argparse.Namespace], Said], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command)
        where = "folder of the results (default: CLUSTER_STORE, or .cluster/store)"
        sub.add_argument("--store", type=Path, help=where)
        sub.add_argument("--json", action="store_true", help="print JSON")
        return sub

    status = add("status", _status, "show the runs of this store, newest first")
    status.add_argument("--all", action="store_true", help="also those that have ended, not only the last one")
    add("results", _results, "list published results")
    check = add("verify", _verify, "compare published results with their manifests, byte by byte")
    check.add_argument("folders", nargs="*", type=Path, help="published folders (default: all of the store)")
    check.add_argument("--quarantine", action="store_true", help="move corrupt ones aside, so that they are made again")
    clean = add("clean", _clean, "list what is of no use any more: what dead attempts left, and results set aside")
    clean.add_argument("--yes", action="store_true", help="drop it; without it it is only listed")
    text = "also results that this file does not name: a line KIND/KEY for each one in use"
    clean.add_argument("--in-use", type=Path, metavar="FILE", help=text)
    text = "spare results that were set aside more recently (default: %(default)g)"
    clean.add_argument("--age", type=float, default=7.0, metavar="DAYS", help=text)
    clean.add_argument("--resume", action="store_true", help="also what a next attempt could resume from")
    text = "watch owners on other machines for a sign of life, up to their lease (default: %(default)s)"
    clean.add_argument("--wait", type=float, default=UNOWNED_PATIENCE + 0.1, metavar="SECONDS", help=text)
    for name, command, text in (
        ("push", _push, "upload published results to a second place"),
        ("pull", _pull, "publish here what a second place has"),
    ):
        sub = add(name, command, text)
        sub.add_argument("names", nargs="*", metavar="KIND[/KEY]", help="results (default: all)")
        sub.add_argument("--remote", required=True, metavar="URL", help="such as s3://bucket/results (fsspec)")
    return parser


def _name(store: Store, folder: Path) -> str:
    return folder.relative_to(store.root).as_posix() if folder.is_relative_to(store.root) else str(folder)


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in files_in(folder))


def _age(path: Path) -> str:
    return clock(max(time.time() - path.lstat().st_ctime, 0.0))


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
    data: list[dict[str, Any]] = []
    for folder in store.published():
        try:
            manifest = Manifest.read(folder)
        except CorruptResult:
            continue  # `verify` names it
        about, size = manifest.about, sum(file.bytes for file in manifest.files)
        seconds = round(max(time.time() - (folder / MANIFEST).stat().st_mtime, 0.0), 1)
        data.append({"kind": about.kind, "key": about.key, "call": about.call, "part": about.part,
                     "spec": about.spec, "bytes": size, "age_seconds": seconds})  # fmt: skip
    lines = [
        f"{one['kind']}/{one['key']} {one['bytes'] / 1e6:,.1f} MB {clock(one['age_seconds'])} {one['call']}"
        f" {_short(one['spec'])}"
        for one in data
    ]
    return 0, data, [*lines, f"{len(data)} results, {sum(one['bytes'] for one in data) / 1e6:,.1f} MB, in {store.root}"]


def _short(spec: dict[str, Any]) -> str:
    text = ", ".join(f"{key}={display(canonical(value))}" for key, value in spec.items())
    return text if len(text) <= 100 else f"{text[:97]}..."


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
    return bool(corrupt), data, lines


def _clean(store: Store, options: argparse.Namespace) -> Said:
    if options.yes and (held := sweep_locks(store.locks)) and options.in_use:
        raise Locked(f"{held[0] or 'a run'} is at work in this store, and nothing names its results yet: wait for it")
    unused = _unused(store, options.in_use) if options.in_use else []
    now = time.time()
    aside = [path for kind in store.kinds() for path in put_aside(kind)]
    old = [path for path in aside if now - path.lstat().st_ctime >= options.age * DAY]
    sizes = {_name(store, path): _size(path) for path in unused + old}
    lines = [f"{_name(store, path)} {sizes[_name(store, path)] / 1e6:,.1f} MB, not in use" for path in unused]
    lines += [f"{_name(store, path)} set aside {_age(path)} ago" for path in aside]
    swept = _sweep(store, options) if options.yes else []
    for folder in unused if options.yes else ():
        drop(folder)
    for folder in old if options.yes else ():
        remove_tree(folder)
    if options.yes:
        forget_absent(store.root)
    left = [root for kind in store.kinds() for root, _, _ in temporaries(kind)]
    lines += [f"{_name(store, root)} of an attempt at work, or to resume from" for root in left]
    did = "dropped" if options.yes else "to drop with --yes"
    lines += [
        f"{len(unused)} results not in use and {len(old)} set aside {did}, {sum(sizes.values()) / 1e6:,.1f} MB",
        f"{len(swept)} leftovers of dead attempts removed, {len(left)} left; in {store.root}",
    ]
    names = {"unused": unused, "aside": aside, "old": old, "removed": swept, "left": left}
    data = {key: [_name(store, path) for path in paths] for key, paths in names.items()}
    return 0, {"store": str(store.root), "dropped": options.yes, "bytes": sum(sizes.values()), **data}, lines


def _unused(store: Store, in_use: Path) -> list[Path]:
    try:
        named = set(in_use.read_text(encoding="utf-8").split())
    except (OSError, UnicodeDecodeError) as error:
        raise BadConfig(f"the names of results in use cannot be read: {error}") from error
    return [folder for folder in store.published() if _name(store, folder) not in named]


def _sweep(store: Store, options: argparse.Namespace) -> list[Path]:
    """Remove what dead attempts left; those of other machines are watched for a while."""
    watch, removed, deadline = Watch(), list[Path](), time.monotonic() + options.wait
    while True:
        for kind in store.kinds():
            published = {name for _, name, _ in temporaries(kind) if is_published(kind / name)}
            removed += sweep(kind, watch, published=published, resume_too=options.resume)
        if time.monotonic() >= deadline or not any(temporaries(kind) for kind in store.kinds()):
            return removed
        time.sleep(min(0.5, options.wait))


def _asked(names: Sequence[str], wanted: Sequence[str]) -> list[str]:
    for one in wanted:
        if not any(one in (name, name.partition("/")[0]) for name in names):
            raise BadConfig(f"there is no result {one}: give KIND or KIND/KEY")
    return [name for name in names if not wanted or {name, name.partition("/")[0]} & set(wanted)]


def _push(store: Store, options: argparse.Namespace) -> Said:
    remote = Remote(options.remote)
    names = _asked([_name(store, folder) for folder in store.published()], options.names)
    there = set(remote.names())
    return _transferred(store, "pushed", [name for name in names if name not in there], len(names), remote.push)


def _pull(store: Store, options: argparse.Namespace) -> Said:
    remote = Remote(options.remote)
    names = _asked(remote.names(), options.names)
    missing = [name for name in names if not is_published(store.path(*name.split("/")))]
    return _transferred(store, "pulled", missing, len(names), remote.pull)


def _transferred(store: Store, did: str, names: list[str], asked: int, one: Callable[[Path], None]) -> Said:
    failed = {}
    for out, error in transfer([store.path(*name.split("/")) for name in names], one):
        if error is not None:
            failed[_name(store, out)] = " ".join(f"{type(error).__name__}: {error}".split())
    lines = [f"{name} was not {did}: {text}" for name, text in sorted(failed.items())]
    lines.append(f"{len(names) - len(failed)} results {did}, {asked - len(names)} there before, {len(failed)} failed")
    data = {did: sorted(set(names) - set(failed)), "failed": failed, "before": asked - len(names)}
    return bool(failed), data, lines


if __name__ == "__main__":
    sys.exit(main())
