"""The SLURM executor on a real SLURM of three nodes: what dies, who notices, and what is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cluster_jobs as jobs
import pytest
import slurm_jobs
from cluster_helpers import alive, job_of, kill, results, strays, wait_for
from slurm_cluster import ServerInfo

from cluster import ClusterConfig, Report, Resources, Store, run
from cluster.errors import BadConfig, CannotRun
from cluster.host import Process
from cluster.protocol import Cause, Context, Event, Job, encode
from cluster.slurm import executor as slurm_executor
from cluster.slurm import queue as slurm_queue
from cluster.slurm.executor import SlurmExecutor, _SlurmJob
from cluster.slurm.profile import SlurmProfile
from cluster.slurm.queue import SILENCE, State, abandoned, takes_later
from cluster.slurm.worker import events_file

pytest_plugins = ["slurm_cluster"]
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def server(slurm_server: ServerInfo) -> ServerInfo:
    return slurm_server


@pytest.fixture
def config(server: ServerInfo, store: Store, monkeypatch: pytest.MonkeyPatch) -> ClusterConfig:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return ClusterConfig(executor="slurm", store=store.root, profile=str(server.profile))


@pytest.fixture
def start(config: ClusterConfig, tmp_path: Path) -> Start:
    """Starts a driver of its own."""

    def begin(seconds: float, count: int) -> subprocess.Popen[str]:
        arguments = [str(config.store), str(config.profile), str(tmp_path / "calls"), str(seconds), str(count)]
        return subprocess.Popen(
            [sys.executable, slurm_jobs.__file__, *arguments], stdout=-1, stderr=-1, text=True,
            env={name: value for name, value in os.environ.items() if not name.startswith("CLUSTER_")},
        )  # fmt: skip

    return begin


def ran(tmp_path: Path) -> list[str]:
    path = tmp_path / "calls"
    return path.read_text().split() if path.exists() else []


def steps(store: Store, tmp_path: Path, count: int = 40, **resources: float) -> Any:
    spec = {"calls": str(tmp_path / "calls"), "steps": count}
    asked = Resources(**{"memory_gb": 0.3, "minutes": 5, **resources})  # type: ignore[arg-type]
    return store.task("steps", "steps", slurm_jobs.steps, spec, resources=asked)


def during(condition: Callable[[], object], then: Callable[[], object], work: Callable[[], Report]) -> Report:
    """Do something to a run once it is under way."""
    failures: list[BaseException] = []

    def hurt() -> None:
        try:
            wait_for(condition)
            then()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=hurt)
    thread.start()
    report = work()
    thread.join()
    assert failures == []
    return report


def history(report: Report) -> list[str]:
    (outcome,) = report.done
    return list(map(str, outcome.history))


def went_on(store: Store, tmp_path: Path) -> None:
    """The second attempt began where the first had stopped, and all steps were made once."""
    starts = [int(line) for line in ran(tmp_path)]
    assert starts[0] == 0
    assert 0 < starts[1] < 40
    (out,) = store.published()
    made = json.loads((out / "steps.json").read_text())
    assert made == [1] * starts[1] + [2] * (40 - starts[1])
    assert strays(store.root) == []


def test_waves_keep_within_the_limits_of_arrays_and_of_the_queue(
    server: ServerInfo, config: ClusterConfig, store: Store, tmp_path: Path
) -> None:
    own = tmp_path / "profile.yaml"
    own.write_text(server.profile.read_text() + "max_jobs: 24\narray_parallelism: 10\ntasks_per_job: 1\n")
    most, ended = [0], threading.Event()

    def count() -> None:
        while not ended.wait(0.3):
            most.append(len(server.jobs()))

    thread = threading.Thread(target=count)
    thread.start()
    report = run(
        slurm_jobs.squares(store, tmp_path / "calls", 0.0, 45),
        config=ClusterConfig(executor="slurm", store=store.root, profile=str(own)),
    )
    ended.set()
    thread.join()
    assert len(report.done) == 45  # with arrays of at most 20 jobs
    assert len(ran(tmp_path)) == 45
    assert 6 < max(most) <= 24 + 6  # six fit on the nodes, and may be about to leave after their last word
    assert strays(store.root) == []


def test_a_preempted_task_goes_on_where_it_stopped(
    server: ServerInfo, config: ClusterConfig, store: Store, tmp_path: Path
) -> None:
    urgent = ["sbatch", "-p", "urgent", "-N3", "--exclusive", "--wrap", "sleep 1", "-o", "/dev/null"]
    report = during(
        lambda: ran(tmp_path), lambda: (time.sleep(1), server.command(*urgent)),
        lambda: run([steps(store, tmp_path)], config=config),
    )  # fmt: skip
    assert history(report) == ["preempted", "done"]
    went_on(store, tmp_path)


def test_the_signal_before_the_time_limit_reaches_the_task(
    server: ServerInfo, config: ClusterConfig, store: Store, tmp_path: Path
) -> None:
    def tell() -> None:
        time.sleep(1)
        (job,) = server.jobs()
        server.command("scancel", "--signal=USR2", job)

    report = during(lambda: ran(tmp_path), tell, lambda: run([steps(store, tmp_path)], config=config))
    assert history(report) == ["timeout", "done"]
    went_on(store, tmp_path)


def test_a_task_that_takes_too_long_goes_on_if_it_had_made_progress(
    config: ClusterConfig, store: Store, tmp_path: Path
) -> None:
    (outcome,) = run([steps(store, tmp_path, minutes=0.04)], config=config).done
    assert set(outcome.history) == {"timeout", "done"}
    assert outcome.history[-1] == "done"
    starts = [int(line) for line in ran(tmp_path)]
    assert starts == sorted(set(starts))
    hangs = store.task("hangs", "hangs", jobs.hangs, {"calls": str(tmp_path / "c"), "pids": str(tmp_path / "p")},
                       resources=Resources(memory_gb=0.3, minutes=0.03))  # fmt: skip
    own = tmp_path / "profile.yaml"
    own.write_text(Path(str(config.profile)).read_text().replace("signal_seconds: 15", "signal_seconds: 1"))
    (failed,) = run([hangs], config=ClusterConfig(executor="slurm", store=store.root, profile=str(own))).failed
    assert (failed.cause, failed.attempts) == ("timeout", 1)
    wait_for(lambda: not any(alive(int(pid)) for pid in (tmp_path / "p").read_text().split()), 5)


def test_a_job_cancelled_by_somebody_else_is_made_again(
    server: ServerInfo, config: ClusterConfig, store: Store, tmp_path: Path
) -> None:
    report = during(
        lambda: ran(tmp_path), lambda: (time.sleep(1), server.command("scancel", *server.jobs())),
        lambda: run([steps(store, tmp_path)], config=config),
    )  # fmt: skip
    assert history(report) == ["preempted", "done"]
    went_on(store, tmp_path)


def test_the_task_of_a_lost_node_is_made_again_elsewhere(
    server: ServerInfo, config: ClusterConfig, store: Store, tmp_path: Path
) -> None:
    lost: list[str] = []

    def lose() -> None:
        lost.append(server.command("squeue", "-h", "-t", "running", "-o", "%N").split()[0])
        server.kill_node(lost[0])

    report = during(lambda: ran(tmp_path), lose, lambda: run([steps(store, tmp_path)], config=config))
    assert history(report)[0] in ("node", "crashed", "lost")
    assert history(report)[1:] == ["done"]
    assert len(ran(tmp_path)) == 2
    assert strays(store.root) == []
    server.start_node(lost[0])


def nodes(store: Store) -> list[str]:
    """Where the attempts of a run were."""
    (path,) = store.logs.glob("*/attempts.jsonl")
    return [json.loads(line)["node"] for line in path.read_text().splitlines()]


def crashes(store: Store, tmp_path: Path) -> Any:
    return store.task("killed", "killed", jobs.killed, {"calls": str(tmp_path / "calls"), "times": 1},
                      resources=slurm_jobs.SMALL)  # fmt: skip


def test_the_task_of_a_crashed_worker_is_made_again_on_another_node(
    config: ClusterConfig, store: Store, tmp_path: Path
) -> None:
    assert history(run([crashes(store, tmp_path)], config=config)) == ["crashed", "done"]
    first, second = nodes(store)
    assert first
    assert second not in ("", first)


def test_the_node_of_a_crash_serves_again_if_no_other_can(
    server: ServerInfo, config: ClusterConfig, store: Store, tmp_path: Path
) -> None:
    names = sorted(set(server.command("sinfo", "-N", "-h", "-o", "%N").split()))
    own = tmp_path / "profile.yaml"
    own.write_text(f"{server.profile.read_text()}exclude: {names[0]}\n")
    config = ClusterConfig(executor="slurm", store=store.root, profile=str(own))
    server.command("scontrol", "update", f"nodename={names[1]}", "state=drain", "reason=test")
    try:
        assert history(run([crashes(store, tmp_path)], config=config)) == ["crashed", "done"]
    finally:
        server.command("scontrol", "update", f"nodename={names[1]}", "state=resume")
    assert nodes(store) == [names[2]] * 2


def test_people_hear_of_jobs_that_wait_for_them(
    server: ServerInfo, store: Store, tmp_path: Path, config: ClusterConfig, caplog: pytest.LogCaptureFixture
) -> None:
    own = tmp_path / "profile.yaml"
    own.write_text(f"{server.profile.read_text()}sbatch: {{hold: true}}\n")
    report = during(
        lambda: "will not start by itself: JobHeldUser" in caplog.text,
        lambda: server.command("scontrol", "release", *server.jobs()),
        lambda: run(
            slurm_jobs.squares(store, tmp_path / "calls", 0.0, 1),
            config=ClusterConfig(executor="slurm", store=store.root, profile=str(own)),
        ),
    )
    assert history(report) == ["done"]


def test_while_the_controller_is_away_jobs_go_on(
    server: ServerInfo, config: ClusterConfig, store: Store, tmp_path: Path
) -> None:
    def away() -> None:
        pid = server.pid("slurmctld")
        os.kill(pid, signal.SIGTERM)
        wait_for(lambda: not alive(pid))
        time.sleep(2)
        server.command("slurmctld", "-f", str(server.folder / "etc" / "slurm.conf"))

    report = during(lambda: ran(tmp_path), away, lambda: run([steps(store, tmp_path)], config=config))
    assert history(report) == ["done"]
    assert ran(tmp_path) == ["0"]


def test_ctrl_c_leaves_no_job_and_no_process(
    server: ServerInfo, start: Start, config: ClusterConfig, store: Store, tmp_path: Path
) -> None:
    driver = start(0.5, 40)
    wait_for(lambda: len(ran(tmp_path)) > 3)
    driver.send_signal(signal.SIGINT)
    _, err = driver.communicate(timeout=40)
    assert driver.returncode == 130, err
    assert server.jobs() == []
    assert strays(store.root) == []
    assert not any(b"submitit" in command for command in _commands(str(store.root)))
    assert 0 < len(list((store.root / "square").iterdir())) < 40


def _commands(about: str) -> list[bytes]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if about.encode() in command:
            found.append(command)
    return found


def test_orphans_of_a_killed_driver_end_and_only_what_is_missing_runs(
    server: ServerInfo, start: Start, store: Store, tmp_path: Path
) -> None:
    driver = start(0.7, 30)
    wait_for(lambda: len(ran(tmp_path)) > 7, seconds=90)
    kill(driver.pid)
    server.freeze()  # however long the next driver takes to start
    driver.communicate()
    orphans = set(server.jobs())
    assert orphans, "they go on: their driver had no time to end them"
    again = start(0.7, 30)
    out, err = again.communicate(timeout=90)
    done, skipped = map(int, out.split())
    assert done + skipped == 30, err
    assert skipped > 0
    assert "that a killed driver left behind" in err
    assert not orphans & set(server.jobs())
    # At most those that were under way ran twice: six fit on the nodes.
    assert len(ran(tmp_path)) <= 30 + 6
    assert strays(store.root) == []


def test_a_driver_on_another_host_is_dead_once_it_is_silent(store: Store) -> None:
    run = store.logs / "run"
    status = run / "status.json"
    run.mkdir(parents=True)
    status.write_text(json.dumps({"process": vars(Process.me())}))
    now = status.stat().st_mtime
    assert not abandoned(run, now + 10 * SILENCE)  # it is us
    status.write_text(json.dumps({"process": vars(Process.me()) | {"started": "1"}}))
    assert abandoned(run, now)
    status.write_text(json.dumps({"process": vars(Process.me()) | {"domain": "another host"}}))
    assert not abandoned(run, now + SILENCE / 2)
    assert abandoned(run, now + 2 * SILENCE)
    os.utime(status, (now - 2 * SILENCE,) * 2)
    assert abandoned(run, now)
    status.unlink()
    assert not abandoned(run, now), "nobody can say"


def test_two_drivers_share_the_work_and_leave_each_others_jobs_alone(
    start: Start, store: Store, tmp_path: Path
) -> None:
    drivers = [start(0.2, 16) for _ in range(2)]
    outs = [driver.communicate(timeout=120) for driver in drivers]
    counts = [tuple(map(int, out.split())) for out, _ in outs]
    assert all(done + skipped == 16 for done, skipped in counts), outs
    assert not any("left behind" in err for _, err in outs)
    assert len(list((store.root / "square").iterdir())) == 16
    assert strays(store.root) == []


def test_a_wiped_cluster_that_counts_from_the_start_again_hands_over_no_old_result(
    server: ServerInfo, config: ClusterConfig, store: Store, tmp_path: Path
) -> None:
    server.wipe()

    def ids(tasks: Any) -> set[str]:
        assert run(tasks, config=config).ok
        folders = sorted(store.logs.glob("*/slurm"), key=lambda path: path.stat().st_mtime_ns)
        return submitted(folders[-1])

    first = ids(slurm_jobs.squares(store, tmp_path / "calls", 0.0, 3))
    server.wipe()
    others = [
        store.task("square", f"other {x}", jobs.square, {"x": x}, resources=slurm_jobs.SMALL) for x in range(100, 103)
    ]
    assert ids(others) == first
    found = {json.loads((out / "result.json").read_text())["x"] for out in store.published()}
    assert found == {0, 1, 2, 100, 101, 102}


def test_what_could_never_run_is_refused_at_once(config: ClusterConfig, store: Store) -> None:
    for resources in (Resources(memory_gb=100), Resources(gpus=2), Resources(cpus=3)):
        task = store.task("square", "large", jobs.square, {"x": 1}, resources=resources)
        with pytest.raises(CannotRun, match=r"task 'large' asks for .* SLURM refuses that: "):
            run([task], config=config)
    assert results(store.root) == {}


def test_without_slurm_it_says_so(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    config = ClusterConfig(executor="slurm", store=store.root)
    with pytest.raises(CannotRun, match="there is no scontrol on this machine"):
        run([store.task("square", "one", jobs.square, {"x": 1})], config=config)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("partitoin: gpu", r"partitoin: unknown key; did you mean partition\?"),
        ("setup: module load", r"setup: 'module load' is not a list"),
        ("max_jobs: 0", "max_jobs: 0 should be greater than or equal to 1"),
        ("max_jobs: true", "max_jobs: True should be a valid integer"),
        ("tasks_per_job: 0", "tasks_per_job: 0 should be greater than or equal to 1, or 'auto'"),
        ("poll_seconds: soon", "poll_seconds: 'soon' should be a valid number"),
        ("poll_seconds: .inf", "poll_seconds: inf should be a finite number"),
        ("account: 7", "account: 7 should be a valid string"),
        ("sbatch: {mem: 4G}", "sbatch: mem is set for each task"),
        ("- partition", "is not a mapping"),
        ("a: [", "cannot be read as YAML"),
    ],
)
def test_a_mistake_in_a_profile_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "profile.yaml"
    path.write_text(text)
    with pytest.raises(BadConfig, match=f"(?s)profile.yaml.*{message}"):
        SlurmProfile.load(str(path))


def test_profiles_are_found_by_name() -> None:
    with pytest.raises(BadConfig, match=r"there is no slurm profile 'gpuu'; did you mean gpu\?"):
        SlurmProfile.load("gpuu")
    with pytest.raises(BadConfig, match=r"there is no file mine\.yaml"):
        SlurmProfile.load("mine.yaml")
    profile = SlurmProfile.load("gpu")
    parameters = profile.parameters(Resources(cpus=4, gpus=2, memory_gb=10, minutes=60))
    assert (parameters["partition"], parameters["gres"], parameters["time"]) == ("gpu", "gpu:2", 63)
    assert parameters["mem"] == f"{int(10.5 * 1024)}MB"
    assert parameters["additional_parameters"] == {"nice": 100, "no-requeue": True}


def test_a_wave_that_a_limit_refuses_comes_again_smaller(
    config: ClusterConfig, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = "sbatch: error: QOSMaxSubmitJobPerUserLimit\nsbatch: error: Batch job submission failed: Job violates " \
        "accounting/QOS policy (job submit limit, user's size and/or time limits)"  # fmt: skip
    sizes = refusing(monkeypatch, lambda size, parameters: limit if size > 3 else None)
    report = run(slurm_jobs.squares(store, tmp_path / "calls", 0.05, 10), config=one_each(config, tmp_path))
    assert len(report.done) == len(ran(tmp_path)) == 10
    assert sizes[0] == 10
    assert max(sizes[2:]) <= 6  # tries twice as many after a success
    assert strays(store.root) == []


def test_a_job_that_is_refused_fails_alone(
    config: ClusterConfig, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    never = "sbatch: error: Memory specification can not be satisfied"
    refusing(monkeypatch, lambda size, parameters: never if int(parameters["mem"][:-2]) > 1500 else None)
    large = store.task("square", "large", jobs.square, {"x": 99}, resources=Resources(memory_gb=2, minutes=5))
    report = run([large, *slurm_jobs.squares(store, tmp_path / "calls", 0.05, 3)], config=config)
    assert len(report.done) == 3
    (failed,) = report.failed
    assert (failed.task.name, failed.cause, failed.attempts) == ("large", "exception", 1)
    assert "SLURM does not take the job" in failed.detail
    assert "Memory specification" in failed.detail


def one_each(config: ClusterConfig, tmp_path: Path, tasks_per_job: int | str = 1) -> ClusterConfig:
    """With a number of tasks in each job."""
    own = tmp_path / "profile.yaml"
    own.write_text(f"{Path(str(config.profile)).read_text()}tasks_per_job: {tasks_per_job}\n")
    return ClusterConfig(executor="slurm", store=config.store, profile=str(own))


def refusing(monkeypatch: pytest.MonkeyPatch, objection: Callable[[int, dict[str, Any]], str | None]) -> list[int]:
    """Have sbatch refuse arrays with what `objection` says of size and parameters: sizes of all that were asked for."""
    import submitit

    sizes: list[int] = []
    really = submitit.SlurmExecutor.map_array

    def map_array(self: Any, call: Any, *arguments: Any) -> Any:
        sizes.append(len(arguments[1]))
        said = objection(sizes[-1], self.parameters)
        if said:
            raise submitit.core.utils.FailedJobError(said)
        return really(self, call, *arguments)

    monkeypatch.setattr(submitit.SlurmExecutor, "map_array", map_array)
    return sizes


def test_what_sbatch_refuses_for_now_and_what_for_ever() -> None:
    policy = (
        "Batch job submission failed: Job violates accounting/QOS policy (job submit limit, user's size and/or time"
    )
    assert takes_later(f"sbatch: error: AssocMaxSubmitJobLimit sbatch: error: {policy} limits)")
    assert takes_later(policy)
    assert takes_later("Unable to contact slurm controller (connect failure)")
    assert not takes_later(f"sbatch: error: QOSMaxWallDurationPerJobLimit sbatch: error: {policy} limits)")
    assert not takes_later("sbatch: error: Memory specification can not be satisfied")
    assert not takes_later("Requested time limit is invalid (missing or exceeds some limit)")


def test_the_ctrl_c_of_a_terminal_spares_commands() -> None:
    assert slurm_queue._run(["sh", "-c", "kill -INT $$; echo alive"]) == "alive\n"


def test_what_the_accounting_says(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "7_1|COMPLETED|n1\n7_2|CANCELLED by 0|n2\n7_3|OUT_OF_MEMORY|n1\n7_[4-9]|PENDING|None assigned\n"
    monkeypatch.setattr(slurm_queue, "_run", lambda command: said)
    found = slurm_queue.accounted(["7_1", "7_2", "7_3"])
    assert found == {"7_1": State("COMPLETED", "n1"), "7_2": State("CANCELLED", "n2"),
                     "7_3": State("OUT_OF_MEMORY", "n1")}  # fmt: skip


def test_states_as_slurm_writes_them() -> None:
    assert State("COMPLETING").alive
    assert not State("NODE_FAIL").alive


@pytest.mark.nightly
def test_a_ray_cluster_inside_an_allocation(
    server: ServerInfo, config: ClusterConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`ray-on-slurm.sbatch` on a node of this cluster: another executor in the same allocation."""
    script = Path(__file__).parents[2] / "cluster" / "slurm" / "ray-on-slurm.sbatch"
    driver = Path(__file__).with_name("cluster_driver.py")
    monkeypatch.setenv("CLUSTER_EXECUTOR", "ray")
    monkeypatch.setenv("RAY_HEAD_ADDRESS", "127.0.0.1")
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # or Ray moves from 127.0.0.1 to the outer interface
    monkeypatch.setenv("RAY_TMPDIR", str(server.folder / "ray"))
    monkeypatch.setenv("PYTHONPATH", str(script.parents[2]))
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    server.command(
        "sbatch", "--wait", "--nodes=1", "--cpus-per-task=2", "--mem=6G", "--time=5", f"--chdir={tmp_path}",
        f"--output={tmp_path}/out", str(script),
        sys.executable, str(driver), str(config.store), str(tmp_path / "calls"), "0.1", "12", "inside", check=False,
    )  # fmt: skip
    assert "12 0" in (tmp_path / "out").read_text()
    assert len(ran(tmp_path)) == 12
    wait_for(lambda: server.jobs() == [])
    assert not any(b"gcs_server" in command for command in _commands(str(server.folder)))


@pytest.fixture
def unreal(store: Store, monkeypatch: pytest.MonkeyPatch) -> tuple[SlurmExecutor, dict[str, str]]:
    """An executor on a SLURM that only says what we have it say: states of jobs by their ids."""
    states: dict[str, str] = {}
    monkeypatch.setattr(slurm_queue, "settings", dict)
    monkeypatch.setattr(slurm_queue, "cancel", list)
    monkeypatch.setattr(slurm_queue, "queue", lambda **_: {one: State(state) for one, state in states.items()})
    config = ClusterConfig(executor="slurm", store=store.root)
    executor = SlurmExecutor(Context("run", store.logs / "run", config))
    executor._profile = executor._profile.model_copy(update={"poll_seconds": 0.0})
    return executor, states


def taken(executor: SlurmExecutor, store: Store, number: int, count: int = 1) -> list[Job]:
    """Attempts in one job of SLURM, as after a submission."""
    tasks = [store.task("square", f"{number} {x}", jobs.square, {"x": x, "n": number}) for x in range(count)]
    pack = [job_of(task) for task in tasks]
    shape, events = executor._shape(pack[0]), events_file(executor._folder, pack)
    attempts = {job.id: job for job in pack}
    executor._jobs[f"{number}"] = _SlurmJob(f"{number}", attempts, shape, events, events.with_suffix(".err"))
    return pack


def test_damaged_lines_of_events_are_skipped(
    unreal: tuple[SlurmExecutor, dict[str, str]], store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    executor, states = unreal
    (job,) = taken(executor, store, 1)
    states["1"] = "RUNNING"
    good = encode(Event(job.id, "started")), encode(Event(job.id, "ended", Cause.DONE))
    damaged = b'{"job": "' + b"\0" * 40 + b'\n[1]\n7\n{}\n{"job": "x", "kind": "ended", "cause": "magic"}\n\xff\n'
    events_file(executor._folder, [job]).write_bytes(good[0] + damaged + good[1])
    found = executor.poll(0.0)
    assert [(event.kind, event.cause) for event in found] == [("started", None), ("ended", "done")]
    assert caplog.text.count("skipped a damaged line") == 6


def test_one_job_may_end_while_another_is_judged(
    unreal: tuple[SlurmExecutor, dict[str, str]], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last word becomes visible between the look at all files and the look at those of a job that failed."""
    executor, states = unreal
    (first,), (second,) = taken(executor, store, 1), taken(executor, store, 2)
    said = slurm_queue.queue

    def queue(**options: Any) -> dict[str, State]:
        events_file(executor._folder, [second]).write_bytes(encode(Event(second.id, "ended", Cause.DONE)))
        return said(**options)

    monkeypatch.setattr(slurm_queue, "queue", queue)
    states.update({"1": "FAILED", "2": "FAILED"})
    assert {event.job: event.cause for event in executor.poll(0.0)} == {first.id: "crashed", second.id: "done"}


def test_of_a_pack_that_dies_only_the_attempt_at_work_is_to_blame(
    unreal: tuple[SlurmExecutor, dict[str, str]], store: Store
) -> None:
    executor, states = unreal
    pack = taken(executor, store, 1, 4)
    lines = [Event(pack[0].id, "started"), Event(pack[0].id, "ended", Cause.DONE), Event(pack[1].id, "started")]
    events_file(executor._folder, pack).write_bytes(b"".join(map(encode, lines)))
    states["1"] = "NODE_FAIL"
    ended = [event for event in executor.poll(0.0) if event.kind == "ended"]
    assert [(event.job, event.cause) for event in ended] == [
        (job.id, cause) for job, cause in zip(pack, ("done", "node", "busy", "busy"), strict=True)
    ]


@pytest.mark.parametrize("mute", ["settings", "queue"])
def test_a_controller_that_does_not_answer_at_the_start_is_named(
    mute: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(**_: Any) -> Any:
        raise slurm_queue.ControllerUnreachable("squeue: error: connect failure")

    monkeypatch.setattr(slurm_queue, "settings", dict)
    monkeypatch.setattr(slurm_queue, mute, unreachable)
    with pytest.raises(CannotRun, match="SLURM does not answer: squeue: error: connect failure"):
        run(
            [store.task("square", "one", jobs.square, {"x": 1})],
            config=ClusterConfig(executor="slurm", store=store.root),
        )


def test_short_tasks_share_jobs_and_a_crash_takes_no_other_along(
    config: ClusterConfig, store: Store, tmp_path: Path
) -> None:
    spec = {"calls": str(tmp_path / "crashes"), "times": 1}
    tasks = slurm_jobs.squares(store, tmp_path / "calls", 0.05, 24)
    crash = store.task("square", "killed", jobs.killed, spec, resources=slurm_jobs.SMALL)
    report = run([*tasks[:12], crash, *tasks[12:]], config=one_each(config, tmp_path, 8))
    histories = {outcome.task.name: list(map(str, outcome.history)) for outcome in report.done}
    assert histories.pop("killed") == ["crashed", "done"]
    assert list(histories.values()) == [["done"]] * 24
    assert len(ran(tmp_path)) == 24
    assert len(submitted(store.logs)) == 3 + 2, "three packs of eight; the other call has an array of its own, twice"
    assert strays(store.root) == []


def submitted(folder: Path) -> set[str]:
    """Ids of the SLURM jobs of the runs with logs below a folder: submitit's logs are named after them."""
    return {path.name.removesuffix("_0_log.err") for path in folder.glob("**/submitit/*_log.err")}


def test_how_many_tasks_a_job_makes_is_measured(config: ClusterConfig, store: Store, tmp_path: Path) -> None:
    assert len(run(slurm_jobs.squares(store, tmp_path / "calls", 0.05, 40), config=config).done) == 40
    assert len(submitted(store.logs)) <= 2 + 6, "two to measure, and one for each core"
    assert len(ran(tmp_path)) == 40


def test_the_rest_of_a_pack_that_ran_long_starts_elsewhere(
    config: ClusterConfig, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm_executor, "ALLOWANCE", 0.5)
    monkeypatch.setattr(SlurmExecutor, "_pack_size", lambda self, shape, waiting: min(waiting, 6))
    report = run(slurm_jobs.squares(store, tmp_path / "calls", 0.3, 6), config=config)
    assert {outcome.history for outcome in report.done} == {("done",)}
    assert len(ran(tmp_path)) == 6
    assert len(submitted(store.logs)) > 1
