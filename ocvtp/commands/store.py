"""`ocvtp verify` and `ocvtp clean`: the store of published results, checked and swept.

The store is the business of the package `cluster`, which a repository has and the wheel does not. `ocvtp` may
not depend on it, so it is looked for at run time only; where it is not there, these two commands say so.
"""

import argparse
import hashlib
import importlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ocvtp.commands import common
from ocvtp.errors import BadInput, NotAvailable

_OUTPUTS = ("data", "models", "results")
"""Folders of the stages' outputs: what they hold or name is in use."""


def add(subparsers: Any) -> None:
    """Declare both subcommands."""
    verify = common.add(subparsers, "verify", run_verify, "check every published result against its checksums",
                        "Reads every byte of the store. Exit code 1 if anything is corrupt.")  # fmt: skip
    clean = common.add(subparsers, "clean", run_clean, "drop published results that no present output refers to",
                       "In use is what the outputs in data/, models/ and results/ hold or name.")  # fmt: skip
    for parser in (verify, clean):
        parser.add_argument("--store", type=Path, default=None,
                            help="default: OCVTP_STORE, or cluster.store of params.yaml")  # fmt: skip
        common.add_json(parser)
    verify.add_argument("--quarantine", action="store_true",
                        help="move corrupt results aside, so that the next run makes them again")  # fmt: skip
    clean.add_argument("--yes", action="store_true", help="drop them; without it they are only listed")


def run_verify(args: argparse.Namespace) -> int:
    """Check and print."""
    cluster = _cluster()
    store = _store(cluster, args.store)
    checked, size, corrupt = 0, 0, []
    for folder in store.published():
        checked += 1
        try:
            size += sum(file.bytes for file in cluster.verify(folder).files)
        except cluster.Corrupt as error:
            aside = str(cluster.quarantine(folder)) if args.quarantine else None
            corrupt.append({"result": _name(store, folder), "cause": str(error), "moved_to": aside})
    if args.json:
        common.print_json({"store": str(store.root), "checked": checked, "bytes": size, "corrupt": corrupt})
        return 1 if corrupt else 0
    out = common.console()
    for found in corrupt:
        out.print(f"[red]corrupt[/red] {found['result']}: {found['cause']}", soft_wrap=True)
        if found["moved_to"]:
            out.print(f"        moved to {found['moved_to']}", soft_wrap=True)
    sound = checked - len(corrupt)
    out.print(
        f"{sound} of {checked} published results are sound ({size / 1e6:,.1f} MB) in {store.root}", soft_wrap=True
    )
    if corrupt and not args.quarantine:
        out.print("mend: ocvtp verify --quarantine, then dvc repro --force", soft_wrap=True)
    return 1 if corrupt else 0


def run_clean(args: argparse.Namespace) -> int:
    """List what is not in use; drop it with --yes."""
    cluster = _cluster()
    store = _store(cluster, args.store)
    if args.yes:
        _refuse_while_at_work(store)
    unused = [(folder, _size(folder)) for folder in _unused(cluster, store, Path.cwd())]
    for folder, _ in unused if args.yes else []:
        doomed = folder.with_name(f".{folder.name}.dropped")  # gone for readers at once, however long removing takes
        folder.rename(doomed)
        shutil.rmtree(doomed)
    names = [_name(store, folder) for folder, _ in unused]
    total = sum(size for _, size in unused)
    if args.json:
        common.print_json({"store": str(store.root), "unused": names, "bytes": total, "dropped": args.yes})
        return 0
    out = common.console()
    for name in names:
        out.print(name, soft_wrap=True)
    did = "dropped" if args.yes else "not in use"
    out.print(f"{len(names)} results {did}, {total / 1e6:,.1f} MB, in {store.root}", soft_wrap=True)
    if names and not args.yes:
        out.print("drop them: ocvtp clean --yes", soft_wrap=True)
    return 0


def _cluster() -> Any:
    """The package `cluster`, from the environment or from the repository around the current folder."""
    try:
        return importlib.import_module("cluster")  # at run time: see the head of this module
    except ModuleNotFoundError as error:
        if error.name != "cluster":
            raise
    for folder in (Path.cwd(), *Path.cwd().parents):
        if (folder / "cluster" / "store.py").is_file():
            sys.path.insert(0, str(folder))
            return importlib.import_module("cluster")
    raise NotAvailable(
        "the package `cluster`, which keeps the store, is not installed: run this in a clone of the repository of "
        "ocvtp, in its environment (`make env`)"
    )


def _store(cluster: Any, given: Path | None) -> Any:
    try:
        root = given or cluster.default_root()
    except cluster.ClusterError as error:
        raise BadInput(str(error)) from error
    if not root.is_dir():
        raise BadInput(f"there is no store at {root}: run `dvc repro` first, or name it with --store")
    return cluster.Store(root)


def _unused(cluster: Any, store: Any, root: Path) -> list[Path]:
    """Published folders that no output names and of which no output holds a file."""
    sums, text = _outputs(root)
    unused = []
    for folder in store.published():
        named = f"{folder.parent.name}/{folder.name}" in text or folder.name in text
        try:
            held = any(file.sha256 in sums for file in cluster.Manifest.read(folder).files)
        except cluster.Corrupt:
            held = True  # not ours to judge: `ocvtp verify` names it
        if not (named or held):
            unused.append(folder)
    return unused


def _outputs(root: Path) -> tuple[set[str], str]:
    """SHA-256 of every file of the stages' outputs, and the text of the small JSON files among them."""
    sums: set[str] = set()
    texts: list[str] = []
    for path in _files(root):
        with path.open("rb") as file:
            sums.add(hashlib.file_digest(file, "sha256").hexdigest())
        if path.suffix == ".json":
            texts.append(path.read_text(encoding="utf-8", errors="replace"))
    if not sums:
        raise BadInput(f"{root} holds no outputs of stages ({', '.join(_OUTPUTS)}): run this where dvc.yaml is")
    return sums, "\n".join(texts)


def _files(root: Path) -> Iterator[Path]:
    for name in _OUTPUTS:
        for folder, _, files in os.walk(root / name):
            for file in files:
                yield Path(folder) / file


def _refuse_while_at_work(store: Any) -> None:
    """Refuse beside a living run, whose results nothing refers to yet; what a killed run left of a lock goes."""
    lock = importlib.import_module("cluster.driver.lock")
    lock.sweep_locks(store.locks)
    for path in sorted(store.locks.glob("*.json")):
        raise BadInput(f"{lock.read_holder(path) or 'a run'} is at work in this store ({path.name}): wait for its end")


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _name(store: Any, folder: Path) -> str:
    return folder.relative_to(store.root).as_posix()
