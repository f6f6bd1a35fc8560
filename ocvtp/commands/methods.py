"""`ocvtp methods`: the pruning methods that there are."""

import argparse
from typing import Any

from ocvtp.commands import common


def add(subparsers: Any) -> None:
    """Declare the subcommand."""
    parser = common.add(subparsers, "methods", run, "list the pruning methods",
                        "Where each acts, whether it reads the prompt, and where it comes from.")  # fmt: skip
    common.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print the registry."""
    from ocvtp.methods import describe

    rows = describe()
    if args.json:
        common.print_json(rows)
        return 0
    table = common.table("", "name", "acts", "reads the prompt", "source")
    for row in rows:
        source = row["source"] + (f"; without CLS: {row['without_cls']}" if row["without_cls"] else "")
        table.add_row(row["name"], row["acts"], "yes" if row["needs_text"] else "no", source)
    common.console().print(table)
    return 0
