"""Stage `report`: the tables, pictures and sentences of the experiment in `reports/`.

Reads what the other stages left (`results/`, `models/`, `data/sample/`) and depends on no parameter, so that
it shows exactly what is there. Runs here, without the cluster: it takes seconds.
"""

import logging
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from ocvtp.errors import OcvtpError
from pipelines.report_html.data import load
from pipelines.report_html.page import render

log = logging.getLogger(__name__)


def write(files: Mapping[str, bytes], folder: Path) -> None:
    """Make `folder` hold exactly these files: all appear at once, and what was there before goes."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for name, content in files.items():
            path = fresh / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        fresh.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        fresh.rename(folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def main(root: Path | None = None) -> int:
    """Write the report of the results below `root`, the current folder unless given."""
    root = root or Path.cwd()
    try:
        results = load(root)
        write(render(results), root / "reports")
    except OcvtpError as error:
        log.error("report: %s", error)
        return 1
    log.info("report: reports/index.html and reports/report.md")
    return 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sys.exit(main())
