"""Attempts that follow each other: leases, fencing, and what is handed over."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import cluster_jobs as jobs
import pytest
from cluster_helpers import forked, job_of, results, strays

from cluster import Cause, Fenced, Store, verify
from cluster.host.process import Process
from cluster.protocol import Event
from cluster.store import lease as leases
from cluster.store.layout import new_attempt, temporaries, temporary
from cluster.store.lease import Owner, Watch, read_owner, replace_owner
from cluster.store.leftovers import fence, has_progressed, sweep
from cluster.store.publish import About, publish
from cluster.store.workspace import Busy, Workspace
from cluster.worker.attempt import perform

ABOUT = About("k", "kind", "m:f", {}, "c")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "kind" / "key"


def claim_and_die(out: Path, *files: str) -> None:
    """An attempt that is killed after having written these files."""

    def work() -> None:
        workspace = Workspace.claim(out, new_attempt())
        for file in files:
            path = workspace.folder / file
            path.parent.mkdir(exist_ok=True)
            path.write_text(file)
        os.kill(os.getpid(), signal.SIGKILL)

    assert forked(work) == -signal.SIGKILL


def elsewhere(root: Path, beat: int = 0, lease: float = 0.2) -> None:
    """Make an attempt look like one of another machine."""
    process = Process("other-host", 4242, "1", "another boot")
    replace_owner(root, Owner(process, lease, beat))


def test_one_at_work_keeps_others_out_until_it_ends(out: Path) -> None:
    first = Workspace.claim(out, new_attempt())
    with pytest.raises(Busy) as busy:
        Workspace.claim(out, new_attempt())
    assert [(other.attempt, other.patience) for other in busy.value.others] == [(first.attempt, 0.0)]
    first.discard()
    Workspace.claim(out, new_attempt()).discard()
    assert list(out.parent.iterdir()) == []


def test_one_that_is_swept_before_it_said_whose_it_is_begins_anew(out: Path) -> None:
    ended = threading.Event()

    def sweeps() -> None:
        while not ended.is_set():
            sweep(out.parent, Watch())

    out.parent.mkdir()
    thread = threading.Thread(target=sweeps)
    thread.start()
    try:
        for _ in range(300):
            workspace = Workspace.claim(out, new_attempt())
            workspace.check()
            workspace.discard()
    finally:
        ended.set()
        thread.join()


def test_one_that_is_fenced_before_it_has_begun_says_so(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt = new_attempt()
    monkeypatch.setattr("cluster.store.workspace._take_over", lambda *_: fence(out, attempt))
    with pytest.raises(Fenced):
        Workspace.claim(out, attempt)
    monkeypatch.undo()
    assert list(out.parent.iterdir()) == []
    Workspace.claim(out, new_attempt()).discard()


def test_resume_is_handed_over_and_nothing_else(out: Path) -> None:
    claim_and_die(out, "half", "resume/state")
    second = Workspace.claim(out, new_attempt())
    assert [path.name for path in second.folder.rglob("*")] == ["resume", "state"]
    assert [root for root, _, _ in temporaries(out.parent)] == [second.root]
    (second.folder / "result").write_text("done")
    publish(second, ABOUT)
    assert [file.path for file in verify(out).files] == ["result"]
    assert [path.name for path in out.parent.iterdir()] == ["key"]


def test_resume_survives_two_deaths_in_a_row_and_an_empty_one_is_dropped(out: Path) -> None:
    claim_and_die(out, "resume/state")
    claim_and_die(out, "half")
    claim_and_die(out)
    third = Workspace.claim(out, new_attempt())
    assert (third.folder / "resume" / "state").read_text() == "resume/state"


def test_killed_at_every_step_of_a_take_over_resume_is_not_lost(tmp_path: Path) -> None:
    import sys

    number, code = 0, -1
    while code != 0:
        number += 1
        out = tmp_path / str(number) / "key"
        claim_and_die(out, "half", "resume/state")

        def work(out: Path = out, stop: int = number) -> None:
            seen = 0

            def count(event: str, arguments: tuple[object, ...]) -> None:
                nonlocal seen
                if event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "open") and str(out.parent) in str(
                    arguments[0]
                ):
                    seen += 1
                    if seen == stop:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(count)
            Workspace.claim(out, new_attempt())
            os._exit(0)

        code = forked(work)
        third = Workspace.claim(out, new_attempt())
        assert (third.folder / "resume" / "state").read_text() == "resume/state"
        assert [root for root, _, _ in temporaries(out.parent)] == [third.root]
        third.discard()
    assert number > 8


def test_an_attempt_that_lost_its_lease_never_publishes(out: Path) -> None:
    first = Workspace.claim(out, new_attempt())
    (first.folder / "result").write_text("first")
    second = Workspace.claim(out, new_attempt(), supersedes=[first.attempt])
    with pytest.raises(Fenced):
        publish(first, ABOUT)
    # A call that makes folders as it needs them makes the fenced one again: it is still no result.
    first.folder.mkdir(parents=True)
    (first.folder / "result").write_text("first, the second half")
    with pytest.raises(Fenced):
        publish(first, ABOUT)
    assert first.beat() is False
    first.discard()
    (second.folder / "result").write_text("second")
    publish(second, ABOUT)
    assert (out / "result").read_text() == "second"
    assert list(out.parent.iterdir()) == [out]


def test_fenced_by_a_driver_it_never_publishes_either(out: Path) -> None:
    first = Workspace.claim(out, new_attempt())
    (first.folder / "resume").mkdir()
    (first.folder / "resume" / "state").write_text("state")
    fence(out, first.attempt)
    (first.folder / "resume").mkdir(parents=True)
    (first.folder / "result").write_text("first")
    with pytest.raises(Fenced):
        publish(first, ABOUT)
    first.discard()
    second = Workspace.claim(out, new_attempt())
    assert (second.folder / "resume" / "state").read_text() == "state"


def test_of_two_that_finish_the_first_publishes_and_the_second_drops_its_own(out: Path) -> None:
    attempts = []
    for text in ("first", "second"):
        workspace = Workspace.claim(out, new_attempt())
        (workspace.folder / "result").write_text(text)
        attempts.append((workspace, hidden := out.parent / f"hidden-{text}"))
        workspace.root.rename(hidden)  # as if both had looked before either began
    for workspace, hidden in attempts:
        hidden.rename(workspace.root)
    assert [publish(workspace, ABOUT) for workspace, _ in attempts] == [True, False]
    assert (out / "result").read_text() == "first"
    assert list(out.parent.iterdir()) == [out]


def test_owners_elsewhere_are_judged_by_their_beat_alone(out: Path) -> None:
    first = Workspace.claim(out, new_attempt())
    elsewhere(first.root, beat=1)
    os.utime(first.root / "owner.json", (0, 0))  # file times play no part
    watch = Watch()

    def expired() -> bool:
        with pytest.raises(Busy) as busy:
            Workspace.claim(out, new_attempt())
        return busy.value.others[0].expired(watch)

    assert not expired()
    time.sleep(0.25)
    elsewhere(first.root, beat=2)
    assert not expired(), "it has shown a sign of life"
    time.sleep(0.25)
    assert expired()
    Workspace.claim(out, new_attempt(), supersedes=[first.attempt])


def test_the_heartbeat_moves_the_beat(out: Path) -> None:
    workspace = Workspace.claim(out, new_attempt(), lease=0.1)
    with workspace.heartbeat():
        time.sleep(0.3)
    owner = read_owner(workspace.root)
    assert owner is not None
    assert owner.beat >= 3


def test_a_reused_pid_is_another_process() -> None:
    me = Process.me()
    assert me.alive() is True
    assert replace(me, started="1").alive() is False
    assert replace(me, domain="another boot").alive() is None


def test_sweeping_takes_the_dead_and_spares_the_living_and_what_can_be_resumed(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "UNOWNED_PATIENCE", 0.1)
    claim_and_die(out, "half")
    claim_and_die(out.with_name("other"), "half", "resume/state")
    living = Workspace.claim(out.with_name("living"), new_attempt())
    unowned = temporary(out, new_attempt())
    unowned.mkdir()
    (unowned / "file").write_text("?")
    temporary(out, new_attempt()).mkdir()
    watch = Watch()
    assert len(sweep(out.parent, watch)) == 2
    time.sleep(0.15)
    assert sweep(out.parent, watch) == [unowned]
    left = sorted(path for path in out.parent.iterdir() if path != living.root)
    assert len(left) == 1, "that of `other`, with its resume/"
    assert sweep(out.parent, watch, published={"other"}) == left
    assert list(out.parent.iterdir()) == [living.root]


def test_progress_is_a_change_in_resume(out: Path) -> None:
    def attempt(*files: str) -> bool:
        workspace = Workspace.claim(out, new_attempt())
        for file in files:
            (workspace.folder / "resume").mkdir(exist_ok=True)
            (workspace.folder / "resume" / file).write_text(str(time.time()))
        progressed = has_progressed(out, workspace.attempt)
        workspace.discard()
        return progressed

    assert not attempt()
    assert attempt("state")
    assert not attempt(), "the same as before"
    assert attempt("state"), "replaced by another of the same size"


def test_an_attempt_that_dies_hands_over_whatever_its_end(store: Store, tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    task = store.task("resumes", "resumes", jobs.resumes, {"calls": str(calls), "die_after": [2, 5], "how": "raise"})

    def silent(event: Event) -> None:
        """Nobody listens."""

    causes = [perform(job_of(task, number=number), silent).cause for number in (1, 2, 3)]
    assert causes == [Cause.EXCEPTION, Cause.EXCEPTION, Cause.DONE]
    steps = json.loads((task.out / "steps.json").read_text())
    assert steps == [[0, 1], [1, 1], [2, 1], [3, 2], [4, 2], [5, 2], [6, 3], [7, 3], [8, 3], [9, 3]]
    assert set(results(store.root)) == {f"resumes/{task.key}/{name}" for name in ("steps.json", "manifest.json")}
    assert strays(store.root) == []
