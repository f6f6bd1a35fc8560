"""The command line: `ocvtp SUBCOMMAND`.

Exit codes: 0 done, 1 something is corrupt or not available, 2 bad input, 130 interrupted. Errors that ocvtp
knows come as one message without a traceback; `OCVTP_TRACEBACK=1` shows it.
"""

import argparse
import importlib
import importlib.metadata
import os
import sys
from collections.abc import Sequence

from ocvtp.errors import BadInput, OcvtpError

COMMANDS = (
    "doctor",
    "prefetch",
    "train",
    "show",
    "inspect",
    "evaluations.benchmarking",
    "evaluations.table_of_results",
    "explain",
    "methods",
    "catalog",
    "flops",
    "latency",
    "export_vllm",
    "store",
)
"""Modules of `ocvtp.commands`, in the order of the help."""


def parser() -> argparse.ArgumentParser:
    """The parser with all subcommands."""
    top = argparse.ArgumentParser(
        prog="ocvtp", description="Object-Centric Vision Token Pruning: fewer vision tokens for vision language models."
    )
    top.add_argument("--version", action="version", version=f"ocvtp {importlib.metadata.version('ocvtp')}")
    subparsers = top.add_subparsers(title="subcommands", metavar="SUBCOMMAND", required=True)
    for name in COMMANDS:
        importlib.import_module(f"ocvtp.commands.{name}").add(subparsers)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand and return its exit code."""
    args = parser().parse_args(arguments)
    try:
        code: int = args.run(args)
        sys.stdout.flush()
    except OcvtpError as error:
        if os.environ.get("OCVTP_TRACEBACK"):
            raise
        sys.stderr.write(f"ocvtp: {error}\n")
        return 2 if isinstance(error, BadInput) else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


if __name__ == "__main__":
    sys.exit(main())
