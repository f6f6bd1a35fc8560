"""docs/your-own-vlm.md shows the code that is there."""

import ast
import inspect
import re
import textwrap
from pathlib import Path

from ocvtp.vlms import tower
from ocvtp.vlms.families import gemma3

FAMILIES = Path(gemma3.__file__).parent
ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/your-own-vlm.md").read_text(encoding="utf-8")


def bare(tree: ast.AST) -> str:
    """Code without docstrings, annotations and decorators' order."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            node.body = body[1:]  # type: ignore[attr-defined]
        if isinstance(node, ast.FunctionDef):
            node.returns = None
        if isinstance(node, ast.arg):
            node.annotation = None
    return re.sub(r"(\w+): [^=\n]+ =", r"\1 =", ast.unparse(tree))


def test_gemma_3_is_as_the_page_has_it() -> None:
    (shown,) = re.findall(r"```python\n(class Gemma3Family.*?)```", TEXT, re.DOTALL)
    assert bare(ast.parse(shown)) == bare(ast.parse(textwrap.dedent(inspect.getsource(gemma3.Gemma3Family))))


def test_families_are_as_long_as_the_page_says_and_small() -> None:
    lines = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in FAMILIES.glob("*.py")}
    said = re.findall(r"`(\w+\.py)` has (\d+) lines", re.sub(r"\s+", " ", TEXT))
    assert len(said) == 3
    assert {name: int(number) for name, number in said}.items() <= lines.items()
    assert {name: number for name, number in lines.items() if number > 250} == {}


def test_parts_are_as_the_page_has_them() -> None:
    (shown,) = re.findall(r'```python\n("siglip.*?)```', TEXT, re.DOTALL)
    parts = eval("{" + shown + "}", {"Parts": tower.Parts})
    assert parts.items() <= tower.PARTS.items()


def test_paths_are_there() -> None:
    for path in re.findall(r"`((?:ocvtp|tests)/[\w./]+)`", TEXT):
        assert (ROOT / path).exists(), path
