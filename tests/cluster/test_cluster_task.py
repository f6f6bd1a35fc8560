"""Tasks, keys, configuration, policy: what is refused before any work, and with which words."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import cluster_jobs as jobs
import pytest

from cluster import BadConfig, BadTask, CannotRun, Cause, ClusterConfig, Resources, Store, Task, run
from cluster import fingerprint as code
from cluster.driver.runner import next_resources, pause
from cluster.host import Machine, parse_gpus

MORE = Resources(memory_gb=4.0)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"a": [1, {"b": (1, 2)}]}, r"spec\.a\[1\]\.b is a tuple, not JSON: use a list"),
        ({"a": {1: 2}}, r"spec\.a has the key 1 of type int: use strings"),
        ({"a": float("nan")}, r"spec\.a is nan"),
        ({"a": Path("x")}, r"spec\.a is a PosixPath, not JSON: use a string"),
        ([1], r"spec is a list, not a dict"),
    ],
)
def test_a_spec_must_be_json(store: Store, spec: Any, words: str) -> None:
    with pytest.raises(BadTask, match=f"task 'mine': {words}"):
        Task("mine", jobs.square, spec, store.root / "x")


def test_a_key_is_a_function_of_call_spec_and_code(store: Store) -> None:
    def key(call: Any = jobs.square, spec: Any = None, version: str | None = None) -> str:
        return store.task("kind", "any name", call, spec or {"x": 1, "y": [2.0]}, code=version).key

    assert key() == key(spec={"y": [2.0], "x": 1})
    assert len({key(), key(call=jobs.raises), key(spec={"x": 2}), key(version="1"), key(version="2")}) == 5
    assert key() == key(version=code.fingerprint("cluster_jobs"))
    assert store.task("kind", "n", jobs.square, {"x": 1}).out == store.root / "kind" / (
        store.task("other", "n", jobs.square, {"x": 1}).key
    )


def test_where_inputs_lie_reaches_the_call_but_neither_key_nor_manifest(store: Store, config: ClusterConfig) -> None:
    out = store.root / "kind" / "moved"
    tasks = [Task("moved", jobs.moves, {"x": 1}, out, inputs={"place": place}) for place in ("/here", "/there")]
    assert tasks[0].key == tasks[1].key == Task("moved", jobs.moves, {"x": 1}, out).key
    assert run(tasks[:1], config=config).ok
    assert (out / "result.json").read_text() == '{"place": "/here"}'
    assert "/here" not in (out / "manifest.json").read_text()
    with pytest.raises(BadTask, match=r"inputs\.place is a PosixPath"):
        Task("moved", jobs.moves, {"x": 1}, out, inputs={"place": Path("/here")})


@pytest.mark.parametrize("kind", ["", "..", "a/b", ".hidden", "logs", "locks"])
def test_a_kind_is_a_plain_folder_name(store: Store, kind: str) -> None:
    with pytest.raises(BadTask, match="kind"):
        store.path(kind, "key")


@pytest.mark.parametrize(
    "asked", [{"cpus": 0}, {"cpus": 1.5}, {"gpus": -1}, {"memory_gb": 0}, {"minutes": float("inf")}, {"cpus": True}]
)
def test_resources_must_make_sense(asked: dict[str, Any]) -> None:
    with pytest.raises(BadTask, match=f"resources.{next(iter(asked))} is"):
        Resources(**asked)


def test_nothing_starts_if_one_task_is_wrong(store: Store, config: ClusterConfig, tmp_path: Path) -> None:
    good = store.task("kind", "good", jobs.square, {"x": 1})
    twin = store.task("kind", "twin", jobs.square, {"x": 1})
    inner = Task("inner", jobs.square, {"x": 2}, good.out / "inside")
    (tmp_path / "file").write_text("")
    nowhere = Task("nowhere", jobs.square, {"x": 3}, tmp_path / "file" / "kind" / "key")
    long = Task("long", jobs.square, {"x": 3}, tmp_path / ("x" * 200))
    greedy = store.task("kind", "greedy", jobs.square, {"x": 4}, resources=Resources(memory_gb=1e6))
    graphic = store.task("kind", "graphic", jobs.square, {"x": 5}, resources=Resources(gpus=99))
    for wrong, error, words in (
        (twin, BadTask, "tasks 'good' and 'twin' both publish"),
        (inner, BadTask, "inside which another one does"),
        (nowhere, BadTask, "cannot publish in the folder"),
        (long, BadTask, "longer than 180 bytes"),
        (greedy, CannotRun, "'greedy' asks for 1e[+]06 GB of memory"),
        (graphic, CannotRun, r"'graphic' asks for 99 GPU\(s\), this machine has"),
        ("no task", BadTask, "'no task' is not a Task"),
    ):
        with pytest.raises(error, match=words):
            run([good, wrong], config=config)  # type: ignore[list-item]
        assert not good.out.exists()


def test_an_out_that_holds_another_result_is_refused(config: ClusterConfig, tmp_path: Path) -> None:
    assert run([Task("one", jobs.square, {"x": 1}, tmp_path / "mine")], config=config).ok
    with pytest.raises(BadTask, match=r"holds the result [0-9a-f]{24} of another task"):
        run([Task("two", jobs.square, {"x": 2}, tmp_path / "mine")], config=config)


def test_an_unknown_executor_is_refused_with_those_there_are(store: Store, config: ClusterConfig) -> None:
    with pytest.raises(CannotRun, match=r"there is no executor 'slrum': this version has .*local"):
        run([store.task("kind", "good", jobs.square, {"x": 1})], "slrum", config=config)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"excutor": "local"}, r"cluster.excutor: unknown key; did you mean executor\?"),
        ({"zzz": 1}, r"cluster.zzz: unknown key \(legal: executor, store, profile, workers"),
        ({"executor": "loocal"}, r"cluster.executor: 'loocal' is no executor; did you mean local\? \(legal: .*slurm"),
        ({"workers": 0}, "cluster.workers: 0 should be greater than or equal to 1"),
        ({"workers": "2"}, "cluster.workers: '2' should be a valid integer"),
        ({"tries": True}, "cluster.tries: True should be a valid integer"),
        ({"on_locked": "ignore"}, "cluster.on_locked: 'ignore' should be 'wait' or 'refuse'"),
        ({"memory_gb": float("nan")}, "cluster.memory_gb: nan should be a finite number"),
        ({"lease_seconds": True}, "cluster.lease_seconds: True should be a valid number"),
        ({"store": None}, "cluster.store: None is not the path of a folder"),
        ({"store": ""}, "cluster.store: '' is not the path of a folder"),
        ({"workers": 0, "tries": 0}, r"2 entries are wrong\n  cluster.workers: .*\n  cluster.tries: "),
    ],
)
def test_a_wrong_configuration_is_refused(section: dict[str, Any], words: str) -> None:
    with pytest.raises(BadConfig, match=words):
        ClusterConfig.from_params(section)


def test_the_environment_overrides_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    section = {"executor": "local", "store": "here", "workers": None, "tries": 5}
    assert ClusterConfig.from_params(section) == ClusterConfig(store=Path("here"), tries=5)
    monkeypatch.setenv("CLUSTER_STORE", "/else where")
    assert ClusterConfig.from_params(section).store == Path("/else where")
    monkeypatch.setenv("CLUSTER_EXECUTOR", "nowhere")
    with pytest.raises(BadConfig, match=r"cluster.executor: 'nowhere' \(CLUSTER_EXECUTOR\) is no executor"):
        ClusterConfig.from_params(section)


C = Cause


@pytest.mark.parametrize(
    ("causes", "progressed", "again"),
    [
        ([C.CRASHED], False, True),
        ([C.CRASHED, C.CRASHED], False, True),
        ([C.CRASHED] * 3, False, False),
        ([C.CRASHED, C.LOST, C.NODE, C.CRASHED], False, True),
        ([C.EXCEPTION], True, False),
        ([C.CANCELLED], True, False),
        ([C.TIMEOUT], False, False),
        ([C.TIMEOUT], True, True),
        ([C.TIMEOUT] * 9, True, True),
        ([C.TIMEOUT] * 10, True, False),
        ([C.PREEMPTED] * 9, False, True),
        ([C.PREEMPTED] * 10, False, False),
    ],
)
def test_retries_by_cause(causes: list[Cause], progressed: bool, again: bool) -> None:
    found = next_resources(causes, MORE, ClusterConfig(), progressed, None)
    assert found == (MORE if again else None)


def test_out_of_memory_is_tried_once_more_with_more() -> None:
    after = partial(next_resources, last=MORE, config=ClusterConfig(), progressed=False)
    assert after([C.OOM], memory_limit_gb=None) == Resources(memory_gb=8.0)
    assert after([C.OOM], memory_limit_gb=6.0) == Resources(memory_gb=6.0)
    assert after([C.OOM], memory_limit_gb=4.0) is None
    assert after([C.OOM, C.OOM], memory_limit_gb=None) is None


def test_pauses_double_up_to_a_limit() -> None:
    assert [round(pause(n, "8000"), 2) for n in (1, 2, 3, 4)] == [0.1, 0.2, 0.4, 0.8]
    assert pause(100, "ffff") <= 37.5
    assert pause(3, "0000") < pause(3, "ffff")


def test_gpus_are_named_as_cuda_wants_them(monkeypatch: pytest.MonkeyPatch) -> None:
    listing = (
        "GPU 0: NVIDIA A100 (UUID: GPU-aaa)\n  MIG 1g.5gb Device 0: (UUID: MIG-1)\n"
        "  MIG 1g.5gb Device 1: (UUID: MIG-2)\nGPU 1: NVIDIA A100 (UUID: GPU-bbb)\n"
    )
    assert parse_gpus(listing) == ("MIG-1", "MIG-2", "GPU-bbb")
    for text, gpus in (("", ()), ("-1", ()), ("0,2", ("0", "2")), ("GPU-x", ("GPU-x",))):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", text)
        assert Machine.here().gpus == gpus


def test_this_machine_has_no_more_than_the_kernel_says() -> None:
    machine = Machine.here()
    total = int(Path("/proc/meminfo").read_text().split()[1]) / 2**20
    assert 1 <= machine.cpus <= len(os.sched_getaffinity(0))
    assert 0 < machine.memory_gb <= total * 1.001
