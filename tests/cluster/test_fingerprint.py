"""Fingerprints: what must change a key does, what must not does not."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from cluster import BadTask
from cluster import fingerprint as code

FILES = {
    "__init__.py": "from acme.registry import everything\n",
    "registry.py": "everything = 1\n",
    "task.py": '"""Doc."""\nfrom acme import deep\nfrom acme.parts import one\n\n\ndef call(spec, folder):\n'
    '    """Doc."""\n    from .parts.two import two\n    return one.one + two + deep.x  # comment\n',
    "deep.py": "import json\nimport acme.deeper as d\nx = d.y\n",
    "deeper.py": "y = 1\n",
    "parts/__init__.py": "from acme.parts import side\n",
    "parts/one.py": "one = 1\n",
    "parts/two.py": "two = 2\n",
    "parts/side.py": "effect = 1\n",
    "parts/unused.py": "unused = 1\n",
    "lazy.py": 'TABLE = {"a": "acme.deeper", "b": "not.a.module", "c": "model.safetensors"}\n',
    "typed.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from acme import deeper\n",
    "whole.py": "from acme import everything\n",
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in FILES.items():
        path = tmp_path / "acme" / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    code.forget()
    return tmp_path / "acme"


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    code.forget()


def test_covers_imports_of_imports_also_in_functions(package: Path) -> None:
    assert code.modules("acme.task") == [
        "acme.deep", "acme.deeper", "acme.parts", "acme.parts.one", "acme.parts.side", "acme.parts.two", "acme.task",
    ]  # fmt: skip
    assert "acme" not in sys.modules, "nothing is imported to find it out"


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("task.py", "one.one + two", "one.one - two"),
        ("deeper.py", "y = 1", "y = 2"),
        ("parts/two.py", "2", "3"),
        ("parts/side.py", "1", "2"),
    ],
)
def test_a_change_of_code_changes_it(package: Path, file: str, old: str, new: str) -> None:
    before = code.fingerprint("acme.task")
    edit(package / file, old, new)
    assert code.fingerprint("acme.task") != before


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("task.py", '    """Doc."""\n', '    """Another\n\n    text."""\n'),
        ("task.py", '"""Doc."""\nfrom', "from"),
        ("task.py", "# comment", "# other words"),
        ("task.py", "one.one + two", "(one.one   +   two)"),
        ("parts/unused.py", "1", "2"),
        ("registry.py", "1", "2"),
    ],
)
def test_a_change_of_words_or_of_other_modules_does_not(package: Path, file: str, old: str, new: str) -> None:
    before = code.fingerprint("acme.task")
    edit(package / file, old, new)
    assert code.fingerprint("acme.task") == before


def test_a_declared_version_stands_for_the_module_and_what_it_imports(package: Path) -> None:
    edit(package / "deep.py", "import json", 'CODE_VERSION: str = "1"\nimport json')
    before = code.fingerprint("acme.task")
    edit(package / "deep.py", "x = d.y", "x = d.y + 1")
    edit(package / "deeper.py", "y = 1", "y = 2")
    assert code.fingerprint("acme.task") == before
    edit(package / "deep.py", '"1"', '"2"')
    assert code.fingerprint("acme.task") != before


def test_a_computed_version_is_refused(package: Path) -> None:
    edit(package / "deep.py", "import json", "CODE_VERSION = str(1)")
    with pytest.raises(BadTask, match=r"deep.py.*literal string"):
        code.fingerprint("acme.task")


def test_the_public_names_count_only_for_those_who_ask_for_them(package: Path) -> None:
    assert code.modules("acme.whole") == ["acme", "acme.registry", "acme.whole"]


def test_a_lazy_table_counts_as_imports(package: Path) -> None:
    assert code.modules("acme.lazy") == ["acme.deeper", "acme.lazy"]


def test_imports_for_type_checkers_do_not_count(package: Path) -> None:
    assert code.modules("acme.typed") == ["acme.typed"]


def test_a_function_has_the_fingerprint_of_its_module(package: Path) -> None:
    module = importlib.import_module("acme.task")
    try:
        assert code.fingerprint(module.call) == code.fingerprint(module) == code.fingerprint("acme.task")
        assert code.call_name(module.call) == "acme.task:call"
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "acme"]:
            del sys.modules[name]


def test_a_script_has_the_name_it_would_be_imported_by(package: Path) -> None:
    assert code.dotted_name(package / "parts" / "two.py") == "acme.parts.two"
    assert code.dotted_name(package / "parts" / "__init__.py").startswith("acme.parts")
    assert code.dotted_name(package.parent / "script.py") == "script"


@pytest.mark.parametrize("call", [lambda spec, folder: None, Path("x").exists, print.__call__])
def test_what_workers_cannot_import_is_refused(call: object) -> None:
    with pytest.raises(BadTask, match=r"module-level|module level|no name"):
        code.call_name(call)  # type: ignore[arg-type]


def test_a_module_without_source_is_refused() -> None:
    with pytest.raises(BadTask, match="no Python source"):
        code.fingerprint("itertools")
