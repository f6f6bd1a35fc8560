"""`ocvtp prefetch`: fetch models and benchmarks for machines that cannot reach the internet."""

import argparse
from typing import Any

from ocvtp.commands import catalog, common
from ocvtp.errors import BadInput


def add(subparsers: Any) -> None:
    """Declare the subcommand."""
    parser = common.add(
        subparsers, "prefetch", run, "download models and benchmarks into the cache of Hugging Face",
        "Run it where there is a network, with HF_HOME on a file system that the compute nodes see; there, set "
        "HF_HUB_OFFLINE=1.",
    )  # fmt: skip
    parser.add_argument("names", nargs="*", metavar="NAME", help="VLMs and benchmarks of the catalogues")
    parser.add_argument("--list", action="store_true", help="say what there is and what is here, fetch nothing")
    common.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Fetch, or list."""
    if args.list:
        rows = [_row(item, item.place()) for item in (*catalog.vlms(), *catalog.datasets())]
    elif args.names:
        rows = [_row(item, item.fetch()) for item in catalog.find(args.names)]
    else:
        raise BadInput("nothing to fetch: name VLMs or benchmarks (`ocvtp prefetch --list` says which there are)")
    if args.json:
        common.print_json(rows)
        return 0
    table = common.table("", "name", "kind", "hub", "revision", "where")
    for row in rows:
        table.add_row(row["name"], row["kind"], row["hub"], (row["revision"] or "")[:12], row["path"] or "not here")
    common.console().print(table)
    return 0


def _row(item: catalog.Item, place: Any) -> dict[str, Any]:
    path = None if place is None else str(place)
    return {"name": item.name, "kind": item.kind, "hub": item.repo, "revision": item.revision, "path": path}
