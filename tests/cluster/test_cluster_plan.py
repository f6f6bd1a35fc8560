"""`python -m cluster plan`: what would run, and why; nothing is changed."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cluster_jobs as jobs
import pytest
from cluster_helpers import tree

from cluster import BadTask, ClusterConfig, Store, Task, drop, run, set_aside
from cluster import fingerprint as code
from cluster.__main__ import main
from cluster.driver.plan import DAMAGED, NOTHING_LIKE_IT, UNKNOWN_CODE, Kind, explain


def square(store: Store, x: int, **more: Any) -> Task:
    return store.task("square", f"square {x}", jobs.square, {"x": x, **more})


def why(store: Store, *tasks: Task) -> dict[str, list[str]]:
    """Reasons by the names of tasks."""
    groups = [group for kind in explain(tasks, store) for group in kind.run.items()]
    return {", ".join(names): reason.split("; ") for reason, names in groups}


def state(root: Path) -> dict[str, tuple[int, int, int]]:
    """Everything below, with what changes whenever it does."""
    found = {path: path.lstat() for path in [root, *root.rglob("*")]}
    return {str(path): (one.st_mtime_ns, one.st_ctime_ns, one.st_ino) for path, one in found.items()}


@pytest.fixture
def acme(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Callable[[int], Task]]:
    """Writes a package whose task depends on a module and on a file of data; gives what makes tasks of it."""
    package = tmp_path / "code" / "acme_plan"
    package.mkdir(parents=True)
    monkeypatch.syspath_prepend(str(package.parent))

    def write(**files: str) -> Callable[[int], Task]:
        sources = {
            "__init__.py": "",
            "jobs.py": "from acme_plan import helper\n\ndef call(spec, folder):\n"
            "    (folder / 'y').write_text(str(helper.factor() * spec['x']))\n",
            "helper.py": "from pathlib import Path\n\ndef factor():\n"
            "    return int(Path(__file__).with_name('factor.txt').read_text())\n",
            "factor.txt": "3",
        }
        for name, text in {**sources, **files}.items():
            (package / name).write_text(text)
        for name in [name for name in sys.modules if name.partition(".")[0] == "acme_plan"]:
            del sys.modules[name]
        importlib.invalidate_caches()
        code.forget()
        call = importlib.import_module("acme_plan.jobs").call
        return lambda x: store.task("acme", f"acme {x}", call, {"x": x})

    return write


def test_entries_that_differ_from_the_nearest_result(store: Store, config: ClusterConfig) -> None:
    nested = {"train": {"loss": "aw_mse", "steps": 4}, "images": [{"id": "a"}, {"id": "b"}]}
    assert run([square(store, x, **nested) for x in range(3)], config=config).ok
    assert why(store, *(square(store, x, **nested) for x in range(3))) == {}
    assert why(store, square(store, 1, **nested), square(store, 7, **nested), square(store, 8, **nested)) == {
        "square 7, square 8": ["x: 0 -> 7, 0 -> 8"]
    }
    other = {"train": {"loss": "mse", "steps": 4}, "images": [{"id": "a"}, {"id": "c" * 64}]}
    assert why(store, square(store, 2, **other)) == {
        "square 2": [f"images[].id: b -> {'c' * 12}...", "train.loss: aw_mse -> mse"]
    }
    assert why(store, square(store, 2, train={"loss": "aw_mse"}, images=nested["images"], new=None)) == {
        "square 2": ["new: nothing -> None", "train.steps: 4 -> nothing"]
    }
    assert why(store, square(store, True, **nested)) == {"square True": ["x: 0 -> True"]}


def test_of_as_near_results_the_one_of_the_same_spec_counts(
    store: Store, config: ClusterConfig, acme: Callable[..., Callable[[int], Task]]
) -> None:
    make = acme()
    assert run([make(x) for x in (1, 2)], config=config).ok
    changed = acme(**{"factor.txt": "4"})
    assert run([changed(0)], config=config).ok
    assert why(store, changed(2)) == {"acme 2": ["code: acme_plan.helper:factor.txt"]}
    assert why(store, changed(9)) == {"acme 9": ["x: 0 -> 9"]}


def test_modules_and_files_of_data_that_changed(
    store: Store, config: ClusterConfig, acme: Callable[..., Callable[[int], Task]]
) -> None:
    assert run([acme()(1)], config=config).ok
    (record,) = (store.root / "code").iterdir()
    assert sorted(json.loads(record.read_text())) == [
        "acme_plan.helper",
        "acme_plan.helper:factor.txt",
        "acme_plan.jobs",
    ]
    assert why(store, acme(**{"factor.txt": "4"})(1)) == {"acme 1": ["code: acme_plan.helper:factor.txt"]}
    helper = "def factor():\n    from acme_plan import other\n    return other.FACTOR\n"
    task = acme(**{"helper.py": helper, "other.py": "FACTOR = 5\n"})(2)
    assert why(store, task) == {
        "acme 2": [
            "code: acme_plan.helper, new acme_plan.other, gone acme_plan.helper:factor.txt",
            "x: 1 -> 2",
        ]
    }
    for spoil in (lambda: record.write_text("{"), record.unlink):
        spoil()
        assert why(store, task) == {"acme 2": [UNKNOWN_CODE, "x: 1 -> 2"]}


def test_clean_drops_old_records_of_code_that_no_result_refers_to(
    store: Store, config: ClusterConfig, acme: Callable[..., Callable[[int], Task]]
) -> None:
    old = acme()(1)
    assert run([old], config=config).ok
    new = acme(**{"factor.txt": "4"})(1)
    assert run([new], config=config).ok

    def records() -> set[str]:
        return {path.stem for path in (store.root / "code").iterdir()}

    clean = ["clean", "--store", str(store.root), "--wait", "0", "--yes"]
    assert main([*clean, "--age", "0"]) == 0
    assert records() == {old.code, new.code}
    drop(old.out)
    assert main(clean) == 0
    assert records() == {old.code, new.code}  # not old enough
    assert main([*clean, "--age", "0"]) == 0
    assert records() == {new.code}


def test_nothing_like_it(store: Store, config: ClusterConfig) -> None:
    assert run([square(store, 1)], config=config).ok
    other_kind = store.task("other", "other kind", jobs.square, {"x": 1})
    other_call = store.task("square", "other call", jobs.count_calls, {"x": 1})
    assert why(store, other_kind, other_call) == {"other kind": [NOTHING_LIKE_IT], "other call": [NOTHING_LIKE_IT]}


def test_damaged_results_would_be_made_again(store: Store, config: ClusterConfig) -> None:
    tasks = [square(store, x) for x in range(5)]
    assert run(tasks, config=config).ok
    assert all(set_aside(task.out, remembered=True) is None for task in tasks)  # reads and remembers
    (tasks[0].out / "result.json").unlink()
    (tasks[1].out / "result.json").write_text("?")
    (tasks[2].out / "manifest.json").write_text("{}")
    (tasks[3].out / "result.json").touch()
    (kind,) = explain(tasks, store)
    assert (kind.published, kind.run) == (2, {DAMAGED: ["square 0", "square 1", "square 2"]})
    assert kind.faults == [
        f"{tasks[0].out}/result.json is missing",
        f"{tasks[1].out}/result.json has 1 bytes, its manifest says 21",
        f"{tasks[2].out}/manifest.json is not a manifest: KeyError('format')",
        f"{tasks[3].out} was touched since it was found whole: it is read first",
    ]
    assert list(kind.lines())[1:] == [
        "  3 of them: damaged",
        "    square 0, square 1, square 2",
        f"  {', '.join(kind.faults[:3])} and 1 more",
    ]


def test_no_file_of_a_result_is_read(store: Store, config: ClusterConfig) -> None:
    tasks = [square(store, x) for x in range(2)]
    assert run(tasks, config=config).ok
    opened, watching = list[str](), True

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event == "open":
            opened.append(str(arguments[0]))

    sys.addaudithook(watch)  # there is no way to take it off
    assert [kind.published for kind in explain([*tasks, square(store, 3)], store)] == [2]
    watching = False
    assert {Path(path).name for path in opened if path.startswith(str(store.root / "square"))} == {"manifest.json"}


def test_the_command_says_it_and_changes_nothing(
    store: Store,
    config: ClusterConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run([square(store, x) for x in range(2)], config=config).ok
    (square(store, 1).out / "result.json").unlink()
    text = (
        "import cluster_jobs as jobs\nfrom cluster import Store\n\n"
        f"def tasks():\n    store = Store({str(store.root)!r})\n"
        "    return [store.task('square', f'square {x}', jobs.square, {'x': x}) for x in range(6)]\n"
        "def far():\n    return [Store('/nowhere').task('square', 'far', jobs.square, {'x': 1})]\n"
        "def none():\n    return []\n"
        "def wrong():\n    return 3\n"
        "def asks(x):\n    return []\n"
    )
    (tmp_path / "experiment_plan.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    before, content = state(store.root), tree(store.root)
    assert main(["plan", "experiment_plan:tasks", "--store", str(store.root)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "square: 1 published, 5 would run"
    assert lines[1:3] == ["  1 of them: damaged", "    square 1"]
    assert lines[3:] == [
        "  4 of them: x: 0 -> 2, 0 -> 3, 0 -> 4 and 1 more",
        "    square 2, square 3, square 4 and 1 more",
        f"  {square(store, 1).out}/result.json is missing",
    ]
    assert main(["plan", "experiment_plan:tasks", "--store", str(store.root), "--json"]) == 0
    (kind,) = json.loads(capsys.readouterr().out)
    assert (kind["kind"], kind["published"], kind["run"]["damaged"]) == ("square", 1, ["square 1"])
    assert main(["plan", "experiment_plan:none", "--store", str(store.root)]) == 0
    assert capsys.readouterr().out == "no tasks\n"
    assert main(["plan", "experiment_plan:far", "--store", str(tmp_path / "absent")]) == 0
    assert NOTHING_LIKE_IT in capsys.readouterr().out
    assert (state(store.root), tree(store.root)) == (before, content)
    assert not (tmp_path / "absent").exists()
    assert not os.path.lexists("/nowhere")
    for name, words in {
        "experiment_plan": "'experiment_plan' is not MODULE:FUNCTION, such as experiment:tasks",
        "experiment_plan:": "is not MODULE:FUNCTION",
        "no_such_module:tasks": "cannot import no_such_module:tasks: No module named 'no_such_module'",
        "experiment_plan:task": "cannot import experiment_plan:task: module 'experiment_plan' has no attribute 'task'",
        "experiment_plan:__doc__": "not a function",
        "experiment_plan:asks": "experiment_plan:asks cannot be called without arguments: missing",
        "experiment_plan:wrong": "experiment_plan:wrong returned 3, not a list of tasks",
    }.items():
        assert main(["plan", name, "--store", str(store.root)]) == 2
        assert words in capsys.readouterr().err.replace("\n", " ")


def test_tasks_that_cannot_be_run_are_refused(store: Store) -> None:
    twins = [square(store, 1), square(store, 1)]
    with pytest.raises(BadTask, match="both publish"):
        explain(twins, store)


def test_a_task_that_another_code_version_made(store: Store, config: ClusterConfig) -> None:
    def task(version: str) -> Task:
        return store.task("versioned", "one", jobs.square, {"x": 1}, code=version)

    assert run([task("1")], config=config).ok
    assert not (store.root / "code").exists()  # a declared version says all that there is to say
    assert why(store, task("2")) == {"one": ["code: version 1 -> 2"]}
    assert isinstance(explain([task("1")], store)[0], Kind)
