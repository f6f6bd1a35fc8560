"""`python -m cluster`, and what people see while tasks run."""

from __future__ import annotations

import io
import json
import os
import re
import time
from pathlib import Path
from typing import Any

import cluster_jobs as jobs
import pytest
from rich.console import Console

from cluster import Cause, ClusterConfig, Outcome, Report, Store, Task, run, set_aside
from cluster.__main__ import main
from cluster.driver import board as board_module
from cluster.driver.board import Board, Running, View, clock, summary
from cluster.driver.lock import run_lock
from cluster.host import Process
from cluster.store.layout import aside, new_attempt
from cluster.store.workspace import Workspace


@pytest.fixture
def full(store: Store, config: ClusterConfig) -> Store:
    tasks = [store.task("square", f"square {x}", jobs.square, {"x": x}) for x in range(3)]
    assert run(tasks, config=config, label="squares").ok
    return store


def test_verify_names_what_is_corrupt_and_can_move_it_aside(full: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--store", str(full.root)]) == 0
    assert "3 results checked (0.0 MB), 0 corrupt" in capsys.readouterr().out
    broken = next(full.published())
    (broken / "result.json").write_text("?")
    assert main(["verify", "--store", str(full.root), "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert said["checked"] == 3
    assert list(said["corrupt"]) == [f"square/{broken.name}"]
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
        data["process"] = vars(Process.me()) | {"started": started}
        data["now"] = [{"name": "abc", "seconds": 61, "done": 1, "total": 2, "note": "step 7"}]
        (full.logs / number).mkdir()
        (full.logs / number / "status.json").write_text(json.dumps(data))
    assert main(["status", "--store", str(full.root), "--all"]) == 0
    text = capsys.readouterr().out
    me = f"on {Process.me()}: 3 done (0:"
    for words in (f"8 squares running {me}", f"9 squares killed {me}", "squares done on", "abc 0:01:01, 1 of 2 step 7"):
        assert words in text


def test_status_says_how_long_a_driver_elsewhere_is_silent(full: Store, capsys: pytest.CaptureFixture[str]) -> None:
    path = next(full.logs.glob("*/status.json"))
    elsewhere = vars(Process.me()) | {"domain": "another host", "host": "login7"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"state": "running", "process": elsewhere}))
    assert main(["status", "--store", str(full.root)]) == 0
    assert "squares running on login7" in capsys.readouterr().out
    os.utime(path, (time.time() - 600,) * 2)
    assert main(["status", "--store", str(full.root)]) == 0
    text = capsys.readouterr().out
    assert "squares silent on login7" in text
    assert "no sign of life for 0:10:0" in text


def test_the_store_is_the_one_of_the_environment_or_of_this_folder(
    full: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text("nothing: that cluster reads\n")
    assert main(["status"]) == 2
    assert f"there is no store at {tmp_path}/.cluster/store" in capsys.readouterr().err
    monkeypatch.setenv("CLUSTER_STORE", str(full.root))
    assert main(["status"]) == 0
    assert "squares done" in capsys.readouterr().out


def test_clean_says_what_it_did(full: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def clean(*arguments: str) -> dict[str, Any]:
        assert main(["clean", "--store", str(full.root), "--wait", "0", "--json", *arguments]) == 0
        said: dict[str, Any] = json.loads(capsys.readouterr().out)
        return said

    living = Workspace.claim(full.path("square", "living"), new_attempt())
    ended = Workspace.claim(full.path("square", "ended"), new_attempt())
    (ended.folder / "resume").mkdir()
    (ended.folder / "resume" / "state").write_text("state")
    ended.discard()
    assert len(clean()["left"]) == 2
    said = clean("--yes", "--resume")
    assert (said["removed"], said["left"]) == ([f"square/{ended.root.name}"], [f"square/{living.root.name}"])
    living.discard()


def test_clean_drops_what_was_set_aside_by_its_age(full: Store, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, third = full.published()
    (first / "result.json").write_text("?")
    assert set_aside(first) is not None
    second.rename(
        second.with_name(f".{second.name}.dropped")
    )  # as killed between two steps, by an earlier version, too
    third.rename(aside(third, "dropped"))
    kind = first.parent
    for arguments, left, words in (
        (["--yes"], 3, "0 results not in use and 0 set aside dropped"),
        (["--age", "0"], 3, "0 results not in use and 3 set aside to drop with --yes"),
        (["--age", "0", "--yes"], 0, "0 results not in use and 3 set aside dropped"),
    ):
        assert main(["clean", "--store", str(full.root), "--wait", "0", *arguments]) == 0
        text = capsys.readouterr().out
        assert words in text
        assert len(list(kind.iterdir())) == left
        assert text.count("set aside 0:00:0") == 3


def test_clean_drops_results_only_if_told_which_are_in_use(
    full: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept, *others = full.published()
    assert main(["clean", "--store", str(full.root), "--yes", "--wait", "0"]) == 0
    assert len(list(full.published())) == 3
    names = tmp_path / "names"
    names.write_text(f"square/{kept.name}\n")
    told = ["clean", "--store", str(full.root), "--in-use", str(names), "--wait", "0"]
    assert main(told) == 0
    assert len(list(full.published())) == 3
    with run_lock(full.root / "locks", "train", "r1", "refuse"):
        assert main([*told, "--yes"]) == 2
        assert "run r1 on" in capsys.readouterr().err
    assert main([*told, "--yes", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["unused"] == [f"square/{folder.name}" for folder in others]
    assert list(full.published()) == [kept]
    names.unlink()
    assert main(told) == 2


def test_results_are_listed_with_what_made_them(full: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["results", "--store", str(full.root), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert sorted(one["spec"]["x"] for one in data) == [0, 1, 2]
    one = data[0]
    assert (one["kind"], one["call"], one["bytes"]) == ("square", "cluster_jobs:square", 1000 + 21)
    assert (full.root / one["kind"] / one["key"]).is_dir()
    assert 0 <= one["age_seconds"] < 600
    assert main(["results", "--store", str(full.root)]) == 0
    text = capsys.readouterr().out
    assert f"square/{one['key']} 0.0 MB 0:00:0" in text
    assert f"cluster_jobs:square x={one['spec']['x']}" in text
    assert f"3 results, 0.0 MB, in {full.root}" in text


def test_a_task_is_looked_up(store: Store, config: ClusterConfig) -> None:
    good = store.task("square", "good one", jobs.square, {"x": 1})
    bad = store.task("raises", "bad one", jobs.raises, {"calls": str(store.root.parent / "calls")})
    assert [task.lookup().status for task in (good, bad)] == ["missing", "missing"]
    run([good, bad], config=config)
    found = good.lookup()
    assert (found.status, found.folder, [one["cause"] for one in found.attempts]) == ("published", good.out, ["done"])
    for times in (1, 2):
        found = bad.lookup()
        assert found.status == "failed"
        assert [(one["cause"], one["task"]) for one in found.attempts] == [("exception", "bad one")] * times
        assert found.log is not None
        assert "about to fail" in found.log.read_text()
        run([bad], config=config)
    attempt = Workspace.claim(bad.out, new_attempt())
    assert bad.lookup().status == "running"
    attempt.discard()
    assert bad.lookup().status == "failed"


def test_wrong_use_ends_with_2(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLUSTER_EXECUTOR", "nowhere")
    assert main(["verify"]) == 2
    assert "'nowhere' (CLUSTER_EXECUTOR) is no executor" in capsys.readouterr().err


def test_a_run_leaves_a_line_for_each_attempt(full: Store) -> None:
    (path,) = full.logs.glob("*/attempts.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert {(line["task"], line["attempt"], line["cause"]) for line in lines} == {
        (f"square {x}", 1, "done") for x in range(3)
    }


def test_rates_and_time_left_add_up(tmp_path: Path) -> None:
    one = Outcome(Task("name", jobs.square, {"x": 1}, tmp_path / "out"), Cause.DONE, 1, None)
    board = Board("label", "run", 10, Report(skipped=[one] * 2, done=[one] * 2, failed=[one]), retried=1)
    now = time.monotonic()
    board.started = now - 60
    board.running["a"] = Running("a", 2, gpus=2, started=now - 1800, done=1, total=2)
    assert board.counts()["waiting"] == 4
    assert board.gpu_hours == pytest.approx(1.0, rel=1e-3)
    # 3.5 tasks in 60 s, 4.5 to go
    assert board.seconds_left == pytest.approx(60 / 3.5 * 4.5, rel=1e-3)
    for part in (
        "4 waiting",
        "1 running",
        "2 done",
        "1 failed",
        "3 a minute",
        "1 GPU hours",
        "(0:01:00, 0:01:17 left)",
    ):
        assert part in summary(board)
    board.end("a")
    assert board.gpu_hours == pytest.approx(1.0, rel=1e-3)
    assert [clock(s) for s in (None, 0, 59.6, 90000)] == ["-", "0:00:00", "0:01:00", "1 day, 1:00:00"]


def test_the_live_view_shows_each_running_task(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    board = Board("label", "run", 20, Report())
    for number in range(14):
        board.running[str(number)] = Running(f"task {number}\n[red]", 1 + number, 0, time.monotonic(), 1, 4, "loss 3")
    out = io.StringIO()
    monkeypatch.setattr(board_module, "Console", lambda **options: Console(file=out, width=200, force_terminal=True))
    live = View(board)
    with live.shown():
        live.refresh()
        del board.running["3"]
        board.report.done.append(Outcome(store.task("square", "1", jobs.square, {"x": 1}), Cause.DONE, 1, None))
        live.refresh()
        text = out.getvalue()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    for part in ("0/20", "task 2\\n[red] (attempt 3)", "loss 3", "2 not shown", "1/20"):
        assert part in shown, shown
