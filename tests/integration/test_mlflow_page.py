"""MLflow's compare page, in a real browser, shows the runs of a finished pipeline side by side."""

import json
import os
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote
from urllib.request import urlopen

import pytest
from browser import browse
from pipeline_workspace import Workspace

pytestmark = [pytest.mark.browser, pytest.mark.pipeline]


@pytest.fixture
def server(finished: Workspace) -> Iterator[str]:
    """The UI over the workspace's store, as `make ui` starts it, on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", "sqlite:///mlflow.db",
         "--host", "127.0.0.1", "--port", str(port), "--workers", "1"],
        cwd=finished.folder,
        env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"},
        start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                with urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                    break
            except OSError:
                assert time.monotonic() < deadline, "the MLflow server did not come up in two minutes"
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, 15)
        process.wait(30)


def test_the_compare_page_has_axes_beside_scores(finished: Workspace, server: str, tmp_path: Path) -> None:
    with sqlite3.connect(finished.folder / "mlflow.db") as store:
        rows = store.execute(
            "SELECT run_uuid, experiment_id, name FROM runs WHERE lifecycle_stage = 'active'"
        ).fetchall()
    chosen = [row for row in rows if row[2].startswith(("tiny-llava/oc-vtp", "tiny-llava/random"))]
    assert len(chosen) >= 4, [row[2] for row in rows]
    runs = quote(json.dumps([row[0] for row in chosen]))
    experiments = quote(json.dumps(sorted({str(row[1]) for row in chosen})))
    page = browse(
        f"{server}/#/compare-runs?runs={runs}&experiments={experiments}",
        tmp_path / "profile",
        "--virtual-time-budget=30000",
        "--dump-dom",
    )
    for word in ("method", "keep", "loss", "layer", "slots", "oc-vtp", "random", "aw_mse", "pope", "textvqa"):
        assert word in page, f"{word} is not on the compare page"
    assert f"Comparing {len(chosen)} Runs" in page


def test_running_again_makes_no_second_run(finished: Workspace) -> None:
    def count() -> int:
        with sqlite3.connect(finished.folder / "mlflow.db") as store:
            return int(store.execute("SELECT count(*) FROM runs").fetchone()[0])

    before = count()
    finished.run("python", "pipelines/train.py")
    finished.run("python", "pipelines/eval.py")
    assert count() == before > 0
