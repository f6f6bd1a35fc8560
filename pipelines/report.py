"""Stage `report`: the tables, pictures and sentences of the experiment in `reports/`.

Reads what the other stages left (`results/`, `models/`, `data/sample/`) and depends on no parameter, so that it shows
exactly what is there. Runs here, without the cluster: it takes seconds.
"""

import argparse
import logging
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from ocvtp.errors import BadInput, OcvtpError
from pipelines.report_html.data import load
from pipelines.report_html.page import render
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
    return 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="say what would be shown, and change nothing")
    sys.exit(main(dry=parser.parse_args().dry_run))
