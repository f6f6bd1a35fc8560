"""Stage `report`: the tables, pictures and sentences of the experiment in `reports/`.

Reads what the other stages left (`results/`, `models/`, `data/sample/`) and depends on no parameter, so that it shows
exactly what is there. Runs here, without the cluster: it takes seconds. A repository with a params.yaml tracks each
report as a run of its own, with all its files as artifacts.
"""

import argparse
import hashlib
import logging
import sys
from collections.abc import Mapping
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from cluster.task import canonical
from ocvtp.errors import BadInput, OcvtpError
from pipelines import tracking
from pipelines.report_html.data import Results, load
from pipelines.report_html.page import render
from pipelines.spool import Record
from pipelines.stage import command, outputs
from pipelines.stage.dry_run import behind

log = logging.getLogger(__name__)
FOLDER = "reports"


def main(root: Path | None = None, *, dry: bool = False) -> int:
    """Write the report of the results below `root`, the current folder unless given; returns the exit code.

    A dry one says what it would show, and which results are not what the params ask for.
    """
    root = root or Path.cwd()
    try:
        found = load(root)
        if dry:
            command.show(behind("report", None, root))
            command.show([f"no tasks: {len(found.summary)} rows of results are drawn here, whenever the stage runs"])
            return 0
        files = render(found)
        with outputs.folder(root / FOLDER) as folder:
            for name, content in files.items():
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
    except OcvtpError as error:
        log.error("report: %s", error)
        return 2 if isinstance(error, BadInput) else 1
    log.info("report: %s/index.html and %s/report.md", FOLDER, FOLDER)
    tracking.track_at(root, "report", [_record(root, found, files)])
    return 0


def _record(root: Path, found: Results, files: Mapping[str, bytes]) -> Record:
    """Of one report, for MLflow: another one where anything in it is another."""
    whole = canonical({name: hashlib.sha256(content).hexdigest() for name, content in files.items()})
    numbers = {"settings": len(found.summary), "scores": len(found.scores), "pruners": len(found.pruners)}
    return Record(
        fingerprint=hashlib.sha256(whole.encode()).hexdigest()[:24],
        kind="report",
        name=f"report of {', '.join(found.vlms)}",
        params={"vlm": list(found.vlms), "benchmark": list(found.benchmarks)},
        metrics={name: float(number) for name, number in numbers.items()},
        artifacts={name: root / FOLDER / name for name in files},
    )


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="say what would be shown, and change nothing")
    sys.exit(main(dry=parser.parse_args().dry_run))
