"""`ocvtp latency`, kept in MLflow: milliseconds of each phase, and how many times the least there is that they take.

Takes the arguments of `ocvtp latency`; `--limits` is always on. Each case is a run, found again by what was measured,
on which machine and with which versions: measured anew on another day, it has the new numbers. Times are no results of
the pipeline, on which anything depended.
"""

import argparse
import hashlib
import logging
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from cluster.task import canonical
from ocvtp.commands import latency
from ocvtp.errors import OcvtpError
from pipelines.spool import Record
from pipelines.stage import command
from pipelines.stage.context import open_stage
from pipelines.tracking import track

KIND = "latency"


def records(found: Mapping[str, Any]) -> Iterator[Record]:
    """A run of each case that was measured, from the JSON of `ocvtp latency`; of one that could not be it says why."""
    told = {
        name: value for name, value in found.items() if name not in ("cases", "ceilings", "versions", "date", "pruner")
    }
    about = {"host": platform.node(), **told, **found["versions"]}
    for name, case in found["cases"].items():
        params = {**about, "method": case["method"], "keep": case["keep"], **case["options"]}
        if case["method"] == "oc-vtp":  # no other case changes with it
            params["pruner"] = found["pruner"]
        yield Record(
            fingerprint=hashlib.sha256(canonical([KIND, params]).encode()).hexdigest()[:24],
            kind=KIND,
            name=f"{found['vlm']}/{name}",
            params=params,
            metrics={} if "failed" in case else _metrics(case),
            tags={"failed": case.get("failed", ""), "measured": found["date"]},
        )


def _metrics(case: Mapping[str, Any]) -> dict[str, float]:
    """Medians in milliseconds, distances and ratios; what does not apply is left out."""
    spreads = {**case["phases"], **{name: case[name] for name in ("first_token", "next_token", "total", "processing")}}
    found = {f"ms/{name}": spread["median"] for name, spread in spreads.items() if spread is not None}
    found |= {f"distance/{name}": value for name, value in case["distance"].items()}
    found |= {name: case[name] for name in ("of_vanilla", "of_random", "accounted", "peak_memory_bytes")}
    return {name: float(value) for name, value in found.items() if value is not None}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, tell and track; returns the exit code of `ocvtp latency`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    latency.add_arguments(parser)
    options = parser.parse_args(arguments)
    options.limits = True
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        stage = open_stage("report")
        found = latency.measured(options)
        code = latency.tell(options, found)
        track(stage, list(records(found.as_dict())))
        latency.draw(options, found)
    except (OcvtpError, OSError) as error:
        return command.explain(KIND, error)
    return code


if __name__ == "__main__":
    command.script("pipelines.latency")
