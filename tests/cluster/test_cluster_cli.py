"""`python -m cluster`, and what people see while tasks run."""

from __future__ import annotations

import io
import json
import os
import re
import time
from pathlib import Path

import cluster_jobs as jobs
import pytest
from rich.console import Console

from cluster import ClusterConfig, Store, run
from cluster.__main__ import main
from cluster.driver import view
from cluster.driver.journal import Board, Running
from cluster.driver.view import View, clock, summary
from cluster.host.process import Process
from cluster.store.layout import new_attempt
from cluster.store.workspace import Workspace


@pytest.fixture
def full(store: Store, config: ClusterConfig) -> Store:
    tasks = [store.task("square", f"square {x}", jobs.square, {"x": x}) for x in range(3)]
    assert run(tasks, config=config, label="squares").ok
    return store


def test_verify_names_what_is_corrupt_and_can_move_it_aside(full: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--store", str(full.root)]) == 0
    assert "3 results checked, 0 corrupt" in capsys.readouterr().out
    broken = next(full.published())
    (broken / "result.json").write_text("?")
    assert main(["verify", "--store", str(full.root), "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert said["checked"] == 3
    assert list(said["corrupt"]) == [str(broken)]
    assert main(["verify", "--store", str(full.root), "--quarantine", str(broken)]) == 1
    assert main(["verify", "--store", str(full.root)]) == 0
    assert len(list(full.published())) == 2


def test_status_tells_running_ended_and_killed_runs_apart(full: Store, capsys: pytest.CaptureFixture[str]) -> None:
    ended = next(full.logs.glob("*/status.json"))
    assert main(["status", "--store", str(full.root), "--json"]) == 0
    (run_,) = json.loads(capsys.readouterr().out)
    assert (run_["label"], run_["state"], run_["done"]) == ("squares", "done", 3)
    for number, started in (("8", Process.me().started), ("9", "1")):
        data = json.loads(ended.read_text()) | {"state": "running", "run": number}
        data["process"] = Process.me().to_json() | {"started": started}
        data["now"] = [{"name": "abc", "seconds": 61, "done": 1, "total": 2, "note": "step 7"}]
        (full.logs / number).mkdir()
        (full.logs / number / "status.json").write_text(json.dumps(data))
    assert main(["status", "--store", str(full.root), "--all"]) == 0
    text = capsys.readouterr().out
    me = f"on {Process.me()}: 3 done (0:00"
    for words in (f"8 squares running {me}", f"9 squares killed {me}", "squares done on", "abc 1:01, 1 of 2 step 7"):
        assert words in text


def test_status_says_how_long_a_driver_elsewhere_is_silent(full: Store, capsys: pytest.CaptureFixture[str]) -> None:
    path = next(full.logs.glob("*/status.json"))
    elsewhere = Process.me().to_json() | {"domain": "another host", "host": "login7"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"state": "running", "process": elsewhere}))
    assert main(["status", "--store", str(full.root)]) == 0
    assert "squares running on login7" in capsys.readouterr().out
    os.utime(path, (time.time() - 600,) * 2)
    assert main(["status", "--store", str(full.root)]) == 0
    text = capsys.readouterr().out
    assert "squares silent on login7" in text
    assert "no sign of life for 10:0" in text


def test_the_store_of_the_params_is_looked_at(
    full: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.delenv("OCVTP_STORE", raising=False)
    (work / "params.yaml").write_text(f"cluster: {{store: {os.path.relpath(full.root, full.root.parent)}}}\n")
    assert main(["status"]) == 0
    assert "no run has left a trace" in capsys.readouterr().out
    monkeypatch.setenv("OCVTP_ROOT", str(full.root.parent))
    assert main(["status"]) == 0
    assert "squares done" in capsys.readouterr().out
    (work / "params.yaml").write_text("cluster: [\n")
    assert main(["status"]) == 2
    assert "params.yaml cannot be read" in capsys.readouterr().err


def test_sweep_says_what_it_did(full: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    living = Workspace.claim(full.path("square", "living"), new_attempt())
    ended = Workspace.claim(full.path("square", "ended"), new_attempt())
    (ended.folder / "resume").mkdir()
    (ended.folder / "resume" / "state").write_text("state")
    ended.discard()
    assert main(["sweep", "--store", str(full.root), "--dry-run", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["left"]) == 2
    assert main(["sweep", "--store", str(full.root), "--wait", "0", "--resume", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == {"removed": [str(ended.root)], "left": [str(living.root)]}
    living.discard()


def test_wrong_use_ends_with_2(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCVTP_EXECUTOR", "nowhere")
    assert main(["verify"]) == 2
    assert "OCVTP_EXECUTOR is 'nowhere'" in capsys.readouterr().err


def test_a_run_leaves_a_line_for_each_attempt(full: Store) -> None:
    (path,) = full.logs.glob("*/attempts.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert {(line["task"], line["attempt"], line["cause"]) for line in lines} == {
        (f"square {x}", 1, "done") for x in range(3)
    }


def test_rates_and_time_left_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    board = Board("label", "run", total=10, skipped=2, done=2, failed=1, retried=1)
    now = time.monotonic()
    board.started = now - 60
    board.running["a"] = Running("a", 2, gpus=2, started=now - 1800, done=1, total=2)
    assert board.waiting == 4
    assert board.gpu_hours == pytest.approx(1.0, rel=1e-3)
    # 3.5 tasks in 60 s, 4.5 to go
    assert board.seconds_left == pytest.approx(60 / 3.5 * 4.5, rel=1e-3)
    for part in ("4 waiting", "1 running", "2 done", "1 failed", "3 a minute", "1 GPU hours", "(1:00, 1:17 left)"):
        assert part in summary(board)
    board.end("a")
    assert board.gpu_hours == pytest.approx(1.0, rel=1e-3)
    assert [clock(s) for s in (None, 0, 59.6, 3600)] == ["-", "0:00", "1:00", "1:00:00"]


def test_the_live_view_shows_each_running_task(monkeypatch: pytest.MonkeyPatch) -> None:
    board = Board("label", "run", total=20)
    for number in range(14):
        board.running[str(number)] = Running(f"task {number}\n[red]", 1 + number, 0, time.monotonic(), 1, 4, "loss 3")
    out = io.StringIO()
    monkeypatch.setattr(view, "Console", lambda **options: Console(file=out, width=200, force_terminal=True))
    with View(board) as live:
        live.refresh()
        del board.running["3"]
        board.done += 1
        live.refresh()
        text = out.getvalue()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    for part in ("0/20", "task 2\\n[red] (attempt 3)", "loss 3", "2 not shown", "1/20"):
        assert part in shown, shown
