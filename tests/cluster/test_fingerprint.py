"""Fingerprints: what must change a key does, what must not does not."""

from __future__ import annotations

import ast
import hashlib
import importlib
import json
import os
import shutil
import subprocess
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
    "reader.py": "DATA_IN_SPECS = ('parts/entries.yaml',)\n"
    'def read(path):\n    "parts/unread.json"\n    return path / "parts/table.json", path / "parts/entries.yaml"\n',
    "parts/table.json": "[1]",
    "parts/entries.yaml": "a: 1",
    "parts/unread.json": "[]",
    "beside.py": "import json\nimport other.inner\nimport stranger\n",
    "../other/__init__.py": "",
    "../other/inner.py": "x = 1\n",
    "../stranger.py": "x = 1\n",
}
ROOT = Path(__file__).resolve().parents[2]


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
    assert list(code.parts("acme.task")) == [
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
    assert list(code.parts("acme.whole")) == ["acme", "acme.registry", "acme.whole"]


def test_a_lazy_table_counts_as_imports(package: Path) -> None:
    assert list(code.parts("acme.lazy")) == ["acme.deeper", "acme.lazy"]


def test_a_package_whose_strings_are_dots_is_read_once(package: Path) -> None:
    (package / "parts/__init__.py").write_text("JOINT, REST = '.', '...'\n")
    code.forget()
    assert list(code.parts("acme.parts.one")) == ["acme.parts", "acme.parts.one"]


def test_imports_for_type_checkers_do_not_count(package: Path) -> None:
    assert list(code.parts("acme.typed")) == ["acme.typed"]


def test_a_function_has_the_fingerprint_of_its_module(package: Path) -> None:
    module = importlib.import_module("acme.task")
    try:
        assert code.fingerprint(module.call) == code.fingerprint("acme.task")
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


# --- Data, and other packages -----------------------------------------------------------------------------------------


def test_a_file_of_data_that_a_module_names_counts(package: Path) -> None:
    before = code.fingerprint("acme.reader")
    assert list(code.parts("acme.reader")) == ["acme.reader", "acme.reader:parts/table.json"]
    edit(package / "parts/table.json", "1", "2")
    assert code.fingerprint("acme.reader") != before


@pytest.mark.parametrize("file", ["entries.yaml", "unread.json"])
def test_data_that_specs_hold_or_that_only_a_docstring_names_does_not(package: Path, file: str) -> None:
    before = code.fingerprint("acme.reader")
    (package / "parts" / file).write_text("other")
    code.forget()
    assert code.fingerprint("acme.reader") == before


def test_a_declaration_that_is_computed_is_refused(package: Path) -> None:
    edit(package / "reader.py", "('parts/entries.yaml',)", "tuple()")
    with pytest.raises(BadTask, match=r"reader.py.*DATA_IN_SPECS must be a literal tuple"):
        code.fingerprint("acme.reader")


def test_other_packages_count_if_the_package_of_the_call_declares_them(package: Path) -> None:
    assert list(code.parts("acme.beside")) == ["acme.beside"]
    (package / "__init__.py").write_text("FIRST_PARTY = ('other',)\n")
    code.forget()
    assert list(code.parts("acme.beside")) == ["acme.beside", "other.inner"]


def test_it_names_no_package_of_its_users() -> None:
    names = ("ocvtp", "pipelines", "params.yaml")
    assert [name for name in names if name in (ROOT / "cluster/fingerprint.py").read_text()] == []


# --- Every Python ----------------------------------------------------------------------------------------------------

SAMPLE = (
    r"""
from __future__ import annotations
from . import a as b
import os.path
def f(x: int, /, y=1, *args: str, z: float = 1e-9, w, **more) -> list[int] | None:
    'doc'
    u"prefixed"; b'bytes\xff'; ...
    global g
    a = f"{x}" "tail" f"{y!r:>{w}.{z}f} {{braces}} \N{BULLET}" 'end'
    b = f'{x=} {x = !s:^10}{y}' rf"\d{x}\n" f"" f"{x:}" f"{x:%H:%M}"
    c = [*args, -0.0, 1_000, 0xff, 1j, 1e400, None, True, ..., 'snow \u2603 \ud800', u'u']
    d = {**more, None: 1, 'k': {1, 2}}
    lambda p, *q, r=2: (yield p) if (n := len(q)) else not r
    return [i async for i in x if i < 3 <= 4 if i is not None] + a[1:2, ..., ::3] @ b
async def g():
    async with a() as b, c: await d
    try: pass
    except* (ValueError, OSError) as e: raise e from None
    else: del b[0], c.d
    finally: assert x, f"no {x}"
@decorated(1)
class C(Base, metaclass=M):
    y: int
    'of an attribute'
    (z): str = ''
    while x: break
    for i in range(3): continue
    else: x += 1; x **= 2
match p:
    case {"a": 1, **rest} | [1, *others] | C(x=None, y=-1.5) as whole if whole: pass
    case None | True | "s" | _: ...
"""
    + f"BIG = 0x{'f' * 5000}\n"
)  # more digits than `int` may be written with


def test_the_form_is_the_stored_one() -> None:
    """Were it another, every result of every store would be made again: this must be meant."""
    tree = ast.parse(SAMPLE)
    assert (
        hashlib.sha256(code.normal_form(tree).encode()).hexdigest()
        == "0a8314e413d383878d113ab78eaac235703e187891db8323edf87dac0e7c946a"
    )


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("x = {**y}", "x = {None: y}"), ("x = 1", "x = 1.0"), ("x = 1", "x = True"), ("x = '1'", "x = 1"),
        ("x = 'a'", "x = b'a'"), ("x = a", "x = 'a'"), ("x = f'{a}'", "x = f'{a!r}'"), ("x = f'{a}b'", "x = f'{a}c'"),
        ("x = f'{a}'", "x = f'{{a}}'"), ("x = f'{a:3}'", "x = f'{a}3'"), ("x = f''", "x = ''"), ("x = None", "x = ()"),
        ("if x: pass\nelse: y", "if x: y"), ("x: int", "(x): int"), ("from . import x", "from .. import x"),
        ("return_ = yield_", "return_ = -yield_"), ("def f(*, a, b=1): pass", "def f(*, a=1, b): pass"),
        ("x = [a, b]", "x = [[a], b]"), ("x = 0.0", "x = -0.0"), ("async def f(): pass", "def f(): pass"),
    ],
)  # fmt: skip
def test_other_code_has_another_form(one: str, other: str) -> None:
    assert code.normal_form(ast.parse(one)) != code.normal_form(ast.parse(other))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("x = 'a' 'b'", "x = 'ab'"), ("x = f'a{b}' 'c' f'd'", "x = f'a{b}cd'"), ("x = 0x10", "x = 16"),
        ("x = u'a'", "x = 'a'"),
        ("x = 1\n'of x'", "x = 1"), ("def f():\n 'doc'", "def f(): pass"), ("x = (1)", "x = 1 # one"),
    ],
)  # fmt: skip
def test_equal_code_has_an_equal_form(one: str, other: str) -> None:
    assert code.normal_form(ast.parse(one)) == code.normal_form(ast.parse(other))


FORMS = """
import ast, hashlib, json, pathlib, sys, types
package = types.ModuleType("cluster")
package.__path__ = [sys.argv[1] + "/cluster"]  # without its `__init__`: another Python lacks the packages
sys.modules["cluster"] = package
from cluster.fingerprint import normal_form
files = [path for name in ("cluster", "ocvtp", "pipelines") for path in pathlib.Path(sys.argv[1], name).rglob("*.py")]
texts = {str(path): path.read_bytes() for path in files} | {"sample": sys.stdin.buffer.read()}
forms = {path: normal_form(ast.parse(text)) for path, text in texts.items()}
print(json.dumps({path: hashlib.sha256(form.encode()).hexdigest() for path, form in forms.items()}))
"""


def pythons() -> dict[str, str]:
    """Interpreters of this machine that run, by version."""
    places = [shutil.which(f"python3.{minor}") for minor in range(11, 15)]
    places += map(
        str, Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions").glob("3.1[1-4].*/bin/python")
    )
    found = {}
    for place in [sys.executable, *filter(None, places)]:
        line = "import sys; print('%d.%d' % sys.version_info[:2])"
        done = subprocess.run([place, "-c", line], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            found.setdefault(done.stdout.strip(), place)
    return found


def test_every_python_sees_the_same_code() -> None:
    """All files of the repository, as each Python of this machine sees them."""
    there = pythons()
    if len(there) < 2:
        pytest.skip("this machine has one Python")
    forms = {
        version: json.loads(
            subprocess.run(
                [place, "-c", FORMS, str(ROOT)], input=SAMPLE.encode(), capture_output=True, check=True
            ).stdout
        )
        for version, place in there.items()
    }
    first = next(iter(forms.values()))
    assert len(first) > 100
    assert {version: [p for p in first if seen[p] != first[p]] for version, seen in forms.items()} == {
        v: [] for v in forms
    }
