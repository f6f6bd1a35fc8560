"""`ocvtp verify` and `ocvtp clean`: where these commands are now."""

import argparse
from typing import Any

from ocvtp.errors import BadInput


def add(subparsers: Any) -> None:
    """Declare both subcommands."""
    for name in ("verify", "clean"):
        # No argument begins with a NUL: whatever was given once is taken, options too.
        parser = subparsers.add_parser(
            name, help=f"is now `python -m pipelines {name}`", prefix_chars="\0", add_help=False
        )
        parser.add_argument("given", nargs="*")
        parser.set_defaults(run=run, name=name)


def run(args: argparse.Namespace) -> int:
    """Say where the command is: always raises."""
    raise BadInput(
        f"the store of results is checked and cleaned in a clone of the repository: `python -m pipelines {args.name}`,"
        f" or `python -m cluster {args.name} --store FOLDER`"
    )
