"""Attempts that follow each other: leases, fencing, and what is handed over."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import cluster_jobs as jobs
import psutil
import pytest
from cluster_helpers import forked, job_of, results, strays, wait_for

from cluster import Cause, Fenced, Store, StoreUnavailable, verify
from cluster.host import Process
from cluster.protocol import Event
from cluster.store import layout
from cluster.store import lease as leases
from cluster.store.layout import new_attempt, temporaries, temporary
from cluster.store.lease import Owner, Watch, fence, read_owner, replace_owner, sweep
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
    with pytest.raises(Busy, match="1 other"):
        Workspace.claim(out, new_attempt())
    assert not Watch().abandoned(first.root)
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


def test_of_many_that_claim_at_once_one_gets_it(out: Path) -> None:
    for number in range(60):
        together = threading.Barrier(4)
        target = out.with_name(f"key{number}")

        def work(together: threading.Barrier = together, target: Path = target) -> Workspace | None:
            together.wait()
            with contextlib.suppress(Busy):
                return Workspace.claim(target, new_attempt())
            return None

        with ThreadPoolExecutor(4) as pool:
            claims = [claim.result() for claim in [pool.submit(work) for _ in range(4)]]
        (winner,) = [claim for claim in claims if claim is not None]
        assert [root for root, _, _ in temporaries(out.parent, target.name)] == [winner.root]
        winner.check()
        winner.discard()


@pytest.mark.parametrize("we", ["0" * 32, "f" * 32])
def test_a_claim_sees_one_that_began_after_it_looked_for_the_first_time(
    out: Path, monkeypatch: pytest.MonkeyPatch, we: str
) -> None:
    """The other one claims between our folder and our look: whichever name is the lower, one alone gets it."""
    really, claims = Workspace._begin, []

    def begin(self: Workspace) -> bool:
        begun = really(self)
        if self.attempt == we:
            with contextlib.suppress(Busy):
                claims.append(Workspace.claim(out, "7" * 32))
        return begun

    monkeypatch.setattr(Workspace, "_begin", begin)
    monkeypatch.setattr("cluster.store.workspace.DECISION", 0.1)
    with contextlib.suppress(Busy):
        claims.append(Workspace.claim(out, we))
    assert len(claims) == 1
    claims[0].check()


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EACCES, errno.ENOENT, errno.ENOTDIR])
def test_only_a_folder_that_is_gone_is_a_lost_lease(out: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.setattr(layout, "PAUSES", (0.0,) * 4)
    workspace, really, failures = Workspace.claim(out, new_attempt()), os.stat, [True] * 2

    def stat(path: Path, **named: bool) -> os.stat_result:
        if path == workspace.root and failures and failures.pop():
            raise OSError(code, os.strerror(code))
        return really(path, **named)

    gone = code in (errno.ENOENT, errno.ENOTDIR)
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", stat)
        assert workspace.beat() is not gone
        failures[:] = [True] * 1000  # for good
        assert workspace.beat() is not gone
        with pytest.raises(Fenced if gone else (StoreUnavailable, PermissionError)):
            workspace.check()
    assert workspace.lost is gone
    if not gone:
        assert workspace.beat()
        (workspace.folder / "result").write_text("done")
        assert publish(workspace, ABOUT)


def test_an_owner_file_that_cannot_be_read_makes_nobody_dead(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "PAUSES", (0.0,) * 4)
    monkeypatch.setattr(leases, "UNOWNED_PATIENCE", 0.0)
    workspace, really = Workspace.claim(out, new_attempt()), Path.read_bytes

    def read(path: Path) -> bytes:
        if path.name == "owner.json":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return really(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", read)
        for _ in range(2):
            with pytest.raises(StoreUnavailable):
                sweep(out.parent, watch := Watch())
            with pytest.raises(StoreUnavailable):
                watch.abandoned(workspace.root)
    workspace.check()


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
        with pytest.raises(Busy):
            Workspace.claim(out, new_attempt())
        return watch.abandoned(first.root)

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


def test_a_process_of_another_user_that_is_hidden_is_unknown_not_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where /proc is mounted with hidepid=2: it cannot be looked up, but a signal to it is refused."""
    gone = subprocess.Popen(["true"])
    zombie = replace(Process.me(), pid=gone.pid)
    wait_for(lambda: zombie.alive() is False)  # not reaped yet
    gone.wait()
    assert zombie.alive() is False
    me = Process.me()

    def hidden(pid: int) -> None:
        raise psutil.NoSuchProcess(pid)

    def refused(pid: int, number: int) -> None:
        assert number == 0
        raise PermissionError

    monkeypatch.setattr(psutil, "Process", hidden)
    monkeypatch.setattr(os, "kill", refused)
    assert me.alive() is None


@pytest.mark.skipif(os.getuid() != 0, reason="mounts /proc anew in a namespace of its own")
def test_where_proc_hides_processes_one_that_lives_is_not_called_dead(tmp_path: Path) -> None:
    script = tmp_path / "look.py"
    script.write_text(
        "import json, os, sys\n"
        "from cluster.host import Process\n"
        "os.setgroups([]), os.setgid(65534), os.setuid(65534)\n"
        "print(json.dumps([Process.from_json(json.loads(text)).alive() for text in sys.argv[1:]]))\n"
    )
    me = Process.me()
    ended = replace(me, pid=2**22 - 7)
    look = [sys.executable, str(script), *(json.dumps(vars(one)) for one in (me, ended))]
    mounted = "mount -t proc -o hidepid=2 proc /proc && exec " + shlex.join(look)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", mounted], capture_output=True, text=True, env=environment, check=False
    )
    if "mount:" in done.stderr or "unshare:" in done.stderr:
        if os.environ.get("CI"):
            pytest.fail(f"hidepid cannot be tested, and must be in CI: {done.stderr}")
        pytest.skip(f"NOT TESTED: {done.stderr}")
    assert json.loads(done.stdout) == [None, False], done.stderr


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
    (published := out.with_name("other")).mkdir()
    (published / "manifest.json").touch()
    assert sweep(out.parent, watch) == left, "it is published: nothing resumes"
    assert sorted(out.parent.iterdir()) == sorted([living.root, published])


def test_progress_is_a_change_in_resume(out: Path) -> None:
    def attempt(*files: str) -> bool:
        workspace = Workspace.claim(out, new_attempt())
        for file in files:
            (workspace.folder / "resume").mkdir(exist_ok=True)
            (workspace.folder / "resume" / file).write_text(str(time.time()))
        workspace.discard()
        return fence(out, workspace.attempt)

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
