"""`ocvtp results`: every result of a store as one table."""

import argparse
from pathlib import Path
from typing import Any

from ocvtp.commands import common
from ocvtp.errors import BadInput

AXES = ["vlm", "method", "keep", "seed", "benchmark"]
NUMBERS = ["score", "relative", "n"]
TELLING = ("fingerprint", "revision", "dtype", "protocol", "limit", "max_new_tokens", "data")
"""Columns that are shown, beside options of the method, where rows of the same axes differ in them."""
DIGESTS = ("fingerprint", "revision", "data")
"""Of which the first digits are enough to tell rows apart."""


def add(subparsers: Any) -> None:
    """Declare the subcommand."""
    parser = common.add(subparsers, "results", run, "show all results of a store as one table",
                        "As a data frame: `ocvtp.results()`.")  # fmt: skip
    parser.add_argument("place", nargs="?", type=Path, default=None,
                        help="a folder with results (default: the store, OCVTP_STORE or .ocvtp/store)")  # fmt: skip
    parser.add_argument("--where", nargs="+", action="extend", default=[], metavar="COLUMN=VALUE",
                        help="rows with this value only, or one of several: method=oc-vtp,css keep=16")  # fmt: skip
    parser.add_argument("--intervals", action="store_true", help="also 95%% intervals; reads all answers")
    parser.add_argument("--csv", action="store_true", help="print CSV with all columns instead of a table")
    common.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Read and print."""
    from ocvtp.evaluation.results import results

    frame = results(args.place, where(args.where), intervals=args.intervals)
    if args.csv:
        common.console().file.write(frame.to_csv(index=False))
        return 0
    if args.json:
        common.print_json(frame.astype(object).where(frame.notna(), None).to_dict("records"))
        return 0
    numbers = [*NUMBERS, *(("ci_low", "ci_high") if args.intervals else ())]
    columns = [*AXES, *telling(frame), *numbers]
    table = common.table(f"{len(frame)} results", *columns, right=("keep", "seed", *numbers))
    for row in frame[columns].astype(object).where(frame[columns].notna(), None).to_dict("records"):
        table.add_row(*(cell(row[name])[:8] if name in DIGESTS else cell(row[name]) for name in columns))
    common.console().print(table)
    return 0


def telling(frame: Any) -> list[str]:
    """Columns by which rows are told apart that look alike otherwise, such as two pruners of one method."""
    groups = frame.astype(str).groupby(AXES)
    columns = [name for name in frame.columns if name in TELLING or name.startswith("option.")]
    return [name for name in columns if (groups[name].nunique() > 1).any()]


def where(words: list[str]) -> dict[str, list[str]]:
    """`method=oc-vtp,css` as {"method": ["oc-vtp", "css"]}."""
    found: dict[str, list[str]] = {}
    for word in words:
        column, sign, values = word.partition("=")
        if not sign or not column or not values:
            raise BadInput(f"--where {word!r}: COLUMN=VALUE, such as method=oc-vtp or keep=16,32, is needed")
        if column in found:
            both = ",".join([*found[column], values])
            raise BadInput(f"--where {word!r}: {column} is given twice; {column}={both} takes rows with any of these")
        found[column] = values.split(",")
    return found


def cell(value: Any) -> str:
    """A value for people; a dash where there is none."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
