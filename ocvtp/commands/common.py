"""What the subcommands share: where they write, and how they read budgets."""

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ocvtp.errors import BadInput

Subparsers = "argparse._SubParsersAction[argparse.ArgumentParser]"
Run = Callable[[argparse.Namespace], int]


def console() -> Console:
    """Where people read."""
    return Console(highlight=False)


def add(subparsers: Any, name: str, run: Run, summary: str, detail: str = "") -> argparse.ArgumentParser:
    """A subcommand with its help and what it runs."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name, help=summary, description=f"{summary[0].upper()}{summary[1:]}. {detail}".strip()
    )
    parser.set_defaults(run=run)
    return parser


def add_vlm(parser: argparse.ArgumentParser, default: str) -> None:
    """The VLM, by its place before all options or as `--vlm`; `args.vlm` is the one named last."""
    what = f"a VLM of the catalogue, or a folder (default: {default})"
    parser.add_argument("vlm", nargs="?", default=argparse.SUPPRESS, metavar="VLM", help=what)
    parser.add_argument("--vlm", default=default, help=argparse.SUPPRESS)


def add_json(parser: argparse.ArgumentParser) -> None:
    """The switch that prints figures for programs."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def print_json(data: Any) -> None:
    """For programs: JSON on standard output, whatever the width of the terminal."""
    console().file.write(json.dumps(data, indent=2) + "\n")


def table(title: str, *columns: str, right: tuple[str, ...] = ()) -> Table:
    """An empty table; columns named in `right` are numbers."""
    made = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="dim")
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left")
    return made


def keep(text: str) -> int | float:
    """A budget as people write it: `48` tokens, `0.333` or `33.3%` of them."""
    try:
        value = float(text[:-1]) / 100 if text.endswith("%") else float(text) if "." in text else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a count such as 48 nor a share such as 33.3%") from None
    if value <= 0 or (isinstance(value, float) and not value <= 1):
        raise argparse.ArgumentTypeError(f"{text!r}: a count is at least 1, a share more than 0 and at most 1 (100%)")
    return value


def writable(option: str, path: Path) -> None:
    """`BadInput` unless a file can be written there: to be asked before the work whose result it takes."""
    folder = path.absolute().parent
    try:
        if path.exists():
            path.open("ab").close()
        else:
            tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise BadInput(f"{option} {path} cannot be written: {error.strerror} ({error.filename or folder})") from error


def write(option: str, path: Path, data: bytes) -> None:
    """Write a file that an option names; `BadInput` if that cannot be."""
    try:
        path.write_bytes(data)
    except OSError as error:
        raise BadInput(f"{option} {path} cannot be written: {error.strerror}") from error


def named_values(option: str, given: Sequence[str], example: str) -> dict[str, Any]:
    """`NAME=VALUE` of a command line, each value read as YAML.

    Args:
        option: that they were given to, such as `--set`.
        given: the words behind it.
        example: of such a word, for who gave another.

    Raises:
        BadInput: no name, no `=`, a value that is not YAML, or a name twice.
    """
    import yaml

    found: dict[str, Any] = {}
    for word in given:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise BadInput(f"{option} {word}: NAME=VALUE is needed, such as {example}")
        if name in found:
            raise BadInput(f"{option} {word}: {name} is given twice, before as {found[name]!r}")
        try:
            found[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise BadInput(f"{option} {word}: {error}") from error
    return found


def words(text: str) -> list[str]:
    """`a,b,c` as a list, without blanks and repeats."""
    found = list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    if not found:
        raise argparse.ArgumentTypeError("a list such as random,oc-vtp is needed")
    return found
