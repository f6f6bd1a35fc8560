"""The command line of a stage: options, messages, exit codes.

Exit codes: 0 all is there, 1 tasks failed or data is damaged, 2 bad input, 130 Ctrl-C. Of a dry run: 0 whether or not
anything would run, 2 bad input or an earlier stage that has put out nothing.
"""

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from rich.console import Console

from cluster import ClusterError, CorruptResult, Interrupted, TasksFailed
from ocvtp.errors import Corrupt, NotAvailable, OcvtpError
from pipelines.params.load import load
from pipelines.params.model import Params
from pipelines.stage.context import PARAMS, ROOT, Stage, open_stage
from pipelines.stage.dry_run import Plan, say

log = logging.getLogger("pipelines")


def script(module: str) -> None:
    """Run `main` of a stage's module and leave with its exit code.

    The module is imported by its name, although it already runs as the script: tasks name functions by it.
    """
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(ROOT) + (os.pathsep + path if path else "")  # for workers
    sys.exit(importlib.import_module(module).main())


def main(
    name: str,
    doc: str,
    work: Callable[[Stage], None],
    plan: Callable[[Stage], Plan],
    arguments: Sequence[str] | None = None,
    costs: Callable[[Params], Iterable[str]] | None = None,
) -> int:
    """The command line of a stage; returns the exit code. `costs` says what `--costs` prints, where there is such."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--params", type=Path, metavar="FILE", help="params to use instead of params.yaml")
    parser.add_argument("--fail-fast", action="store_true", help="stop at the first task that fails for good")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--dry-run", action="store_true", help="say what would run and why, and change nothing")
    if costs is not None:
        instead.add_argument(
            "--costs",
            action="store_true",
            help="say what disk space and time it takes at the size of the params: a few passes over random numbers of "
            "the same shapes on this device; needs no data, and changes nothing",
        )
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.DEBUG if options.debug else logging.INFO, format="%(message)s")
    for chatty in ("httpx", "urllib3", "alembic", "matplotlib", "PIL", "filelock", "git"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        if costs is not None and options.costs:
            show(costs(load(options.params or PARAMS)))
            return 0
        run = open_stage(name, options.params, fail_fast=options.fail_fast, dry=options.dry_run)
        if options.dry_run:
            show(say(run, plan, options.params))
        else:
            work(run)
    except (OcvtpError, ClusterError, KeyboardInterrupt, OSError) as error:
        if options.debug:
            log.debug("%s", name, exc_info=True)
        return explain(name, error)
    return 0


def show(lines: Iterable[str]) -> None:
    """Print what people asked for."""
    console = Console(soft_wrap=True, highlight=False, markup=False)
    for line in lines:
        console.print(line)


def explain(name: str, error: BaseException) -> int:
    """Say what went wrong; returns the exit code for it."""
    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    if isinstance(error, KeyboardInterrupt):
        console.print(f"{name}: stopped; what was finished is kept, the next run goes on from there")
        return error.exit_code if isinstance(error, Interrupted) else 130
    console.print(f"{name}: {error}", style="red")
    if isinstance(error, TasksFailed | CorruptResult | Corrupt | OSError) and not isinstance(error, NotAvailable):
        return 1
    return 2
