"""What the benchmarks share: what numbers were taken on, and where they go."""

import argparse
import json
import platform
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


def machine(device: str = "cpu", **versions: str) -> dict[str, Any]:
    """Date, device, cores in use, and versions: of Python, torch where it is there, and those given."""
    found = {"date": datetime.now(UTC).date().isoformat(), "device": f"{platform.machine()} CPU"}
    try:
        import torch
    except ModuleNotFoundError:
        return {**found, "python": platform.python_version(), **versions}
    if torch.device(device).type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
    threads = str(torch.get_num_threads())
    return {**found, "threads": threads, "torch": torch.__version__, "python": platform.python_version(), **versions}


def heading(found: dict[str, Any]) -> str:
    """`machine` in a line."""
    rest = ", ".join(f"{name} {value}" for name, value in found.items() if name not in ("date", "device"))
    return f"{found['device']}, {rest}, {found['date']}"


def add_output(parser: argparse.ArgumentParser) -> None:
    """`--json` and `--out`."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--out", type=Path, default=None, help="write the JSON here, too")


def say(found: dict[str, Any], table: Callable[[dict[str, Any]], str], arguments: argparse.Namespace) -> None:
    """Print and write what was measured."""
    text = json.dumps(found, indent=1)
    if arguments.out is not None:
        arguments.out.write_text(text + "\n")
    print(text if arguments.json else table(found))
