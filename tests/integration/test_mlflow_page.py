"""MLflow's pages in a real browser, over the store of a finished pipeline: nested runs, pruners ranked, parallel axes.

`OCVTP_PICTURES=docs pytest tests/integration/test_mlflow_page.py` draws the pictures of docs/mlflow.md anew, of this
repository's own mlflow.db (after `make repro`).
"""

import json
import os
import signal
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
from browser import Page, drive
from PIL import Image
from pipeline_workspace import ROOT, Workspace

from pipelines import tracking
from pipelines.spool import FOLDER, SENT, Dataset, Record, Series, Spool

pytestmark = [pytest.mark.browser, pytest.mark.pipeline]

PICTURES = os.environ.get("OCVTP_PICTURES")
SIZE = (1500, 900)
ASSISTANT = "document.querySelector('[aria-label=Close]')"
"""Closes the panel that MLflow opens beside every page."""
RANKED = "keep_16/average_relative-pope-textvqa"


@pytest.fixture(scope="module")
def home(request: pytest.FixtureRequest) -> Path:
    """The folder whose store is looked at."""
    if PICTURES:
        return ROOT
    folder: Path = request.getfixturevalue("finished").folder
    return folder


@pytest.fixture(scope="module")
def server(home: Path) -> Iterator[str]:
    """The UI over the store, as `make ui` starts it, on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", "sqlite:///mlflow.db",
         "--host", "127.0.0.1", "--port", str(port), "--workers", "1"],
        cwd=home,
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
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:  # it waits half a minute for connections of browsers that are gone
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)


def rows(home: Path, query: str) -> list[tuple[str, ...]]:
    """From the store, with nothing of mlflow."""
    with sqlite3.connect(home / "mlflow.db") as store:
        return store.execute(query).fetchall()


def experiment(home: Path) -> str:
    ((found,),) = rows(home, "SELECT experiment_id FROM experiments WHERE name = 'ocvtp'")
    return str(found)


def keep(picture: Path) -> None:
    """As a picture of the documentation, where they are asked for."""
    assert picture.read_bytes().startswith(b"\x89PNG")
    if PICTURES:
        Image.open(picture).convert("RGB").quantize(128).save(ROOT / PICTURES / picture.name, optimize=True)


NAMES = """[...document.querySelectorAll('[row-index] [col-id*="Run Name"] a')].sort((a, b) =>
    a.closest('[row-index]').getAttribute('row-index') - b.closest('[row-index]').getAttribute('row-index'))"""
"""The links of the runs that are shown, from top to bottom."""


def test_settings_are_nested_and_pruners_ranked_by_one_click(home: Path, server: str, tmp_path: Path) -> None:
    scores = {name: float(value) for name, value in rows(
        home, f"SELECT name, value FROM runs JOIN latest_metrics USING (run_uuid) WHERE key = '{RANKED}'")}  # fmt: skip
    assert len(scores) >= 2
    some = max(scores)
    nested = {name for (name,) in rows(
        home, "SELECT c.name FROM runs c JOIN tags t ON t.run_uuid = c.run_uuid AND t.key = 'mlflow.parentRunId' "
        f"JOIN runs p ON p.run_uuid = t.value WHERE p.name = '{some}'")}  # fmt: skip
    assert len(nested) >= 2

    async def act(page: Page) -> None:
        async def shown() -> list[str]:
            return list(await page.run(f"{NAMES}.map(link => link.innerText)"))

        await page.text("Run Name", some)
        await page.click(ASSISTANT)
        assert nested.isdisjoint(await shown()), "settings are folded"
        link = f"{NAMES}.find(link => link.innerText === {json.dumps(some)})"
        await page.click(f"({link}).closest('[role=gridcell]').querySelector('button')")
        await page.text(*nested)
        await page.picture(tmp_path / "mlflow-nested.png")
        await page.click("[...document.querySelectorAll('button')].find(one => one.innerText === 'Columns')")
        await page.click(f"document.querySelector('[title=\"{RANKED}\"]')")
        await page.press("Escape")
        # The one click: on the head of the column.
        head = f"[...document.querySelectorAll('[role=columnheader]')].find(one => one.innerText.includes('{RANKED}'))"
        await page.click(head)
        await page.until(f"({NAMES}[0] || {{}}).innerText === {json.dumps(max(scores, key=scores.__getitem__))}")
        first = (await shown())[: len(scores)]
        assert set(first) == set(scores)
        assert [scores[name] for name in first] == sorted(scores.values(), reverse=True)
        await page.picture(tmp_path / "mlflow-ranked.png")

    address = f"{server}/#/experiments/{experiment(home)}/runs?workflowType=machine_learning"
    drive(address, tmp_path / "profile", act, SIZE)
    keep(tmp_path / "mlflow-nested.png")
    keep(tmp_path / "mlflow-ranked.png")


def test_models_have_their_metrics_by_data_set(home: Path, server: str, tmp_path: Path) -> None:
    models = [name for (name,) in rows(home, "SELECT name FROM logged_models")]

    async def act(page: Page) -> None:
        await page.text("Models", *models)
        await page.click(ASSISTANT)
        await page.click("[...document.querySelectorAll('input[value=CHART]')].map(one => one.closest('label'))[0]")
        await page.text("keep_16/pope", "keep_48/pope")
        await page.until("document.querySelectorAll('.js-plotly-plot .bars path').length > 2")
        await page.picture(tmp_path / "mlflow-models.png")

    address = f"{server}/#/experiments/{experiment(home)}/models?workflowType=machine_learning"
    drive(address, tmp_path / "profile", act, SIZE)
    keep(tmp_path / "mlflow-models.png")


def test_the_compare_page_has_axes_beside_scores(home: Path, server: str, tmp_path: Path) -> None:
    found = rows(home, "SELECT run_uuid, name FROM runs JOIN tags USING (run_uuid) WHERE tags.key = 'kind' "
                 "AND tags.value = 'setting' AND lifecycle_stage = 'active'")  # fmt: skip
    chosen = [run for run, name in found if name.startswith(("tiny-llava/oc-vtp", "tiny-llava/random"))]
    assert len(chosen) >= 4, found

    async def act(page: Page) -> None:
        words = ("method", "keep", "loss", "layer", "slots", "oc-vtp", "random", "aw_mse", "pope", "textvqa")
        await page.text(f"Comparing {len(chosen)} Runs", "Parallel Coordinates Plot", *words)
        await page.click(ASSISTANT)
        # A line for each run, drawn across at least one param and the score.
        await page.until("document.querySelectorAll('.parcoords .axis-heading, .parcoords .y-axis').length > 1")
        await page.picture(tmp_path / "mlflow-compare.png")

    runs, experiments = quote(json.dumps(chosen)), quote(json.dumps([experiment(home)]))
    drive(f"{server}/#/compare-runs?runs={runs}&experiments={experiments}", tmp_path / "profile", act, SIZE)
    keep(tmp_path / "mlflow-compare.png")


def test_the_report_is_an_artifact(home: Path) -> None:
    places = rows(
        home, "SELECT artifact_uri FROM runs JOIN tags USING (run_uuid) WHERE key = 'kind' AND value = 'report'"
    )
    (newest,) = places[-1]
    folder = Path(newest.removeprefix("file://"))
    assert (folder / "index.html").read_bytes() == (home / "reports" / "index.html").read_bytes()
    assert list((folder / "figures").glob("*.png"))


def test_a_server_takes_models_data_sets_and_artifacts(server: str, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    page = tmp_path / "index.html"
    page.write_text("a report")
    data = Dataset.of("pope", "questions", "evaluation", {})
    series = Series("5e21e5", "method", "css", {"layer": -2})
    setting = Record("5e77", "setting", "css-16", {"keep": 16}, {"pope": 0.5}, datasets=[data], series=series,
                     measured_on={"keep_16/pope": "pope"}, series_metrics={"keep_16/pope": 0.5})  # fmt: skip
    pruner = Record("f00d", "pruner", "trained", {}, {"loss": 0.1}, curves=[{"step": 0, "loss": 0.2}])
    report = Record("4e904", "report", "report", {}, {}, artifacts={"figures/page.html": page})
    client = MlflowClient(server)
    for _ in range(2):  # the second time as if nobody remembered the first
        spool = Spool(tmp_path)
        spool.add([setting, pruner, report], server, "elsewhere", tmp_path)
        assert tracking.sync(spool) == 3
        where = client.get_experiment_by_name("elsewhere")
        assert where is not None
        runs = {run.data.tags["fingerprint"]: run for run in client.search_runs([where.experiment_id])}
        assert set(runs) == {"5e77", "5e21e5", "f00d", "4e904"}
        models = client.search_logged_models([where.experiment_id])
        assert {model.name for model in models} == {"css", "trained"}
        ((of_css,),) = [model.metrics for model in models if model.name == "css"]
        assert (of_css.key, of_css.value, of_css.dataset_digest) == ("keep_16/pope", 0.5, data.digest)
        (tmp_path / "got").mkdir(exist_ok=True)
        got = client.download_artifacts(runs["4e904"].info.run_id, "figures/page.html", str(tmp_path / "got"))
        assert Path(got).read_text() == "a report"
        (tmp_path / FOLDER / SENT).unlink()


def test_running_again_makes_no_second_run(finished: Workspace) -> None:
    def count() -> list[tuple[str, ...]]:
        return rows(finished.folder, "SELECT (SELECT count(*) FROM runs), (SELECT count(*) FROM logged_models)")

    before = count()
    for stage in ("train", "eval", "report"):
        finished.run("python", f"pipelines/{stage}.py")
    assert count() == before
    assert all(int(number) > 0 for number in before[0])
