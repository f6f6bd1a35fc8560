"""Methods from outside: instances, what they may not return, entry points, and the page that says how."""

import importlib.util
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import ocvtp
from ocvtp.errors import BadInput, Incompatible
from ocvtp.methods import REGISTRY, Encoded, Entry, Kept, Method, register
from ocvtp.methods.fastv import FastV
from ocvtp.methods.inside import Inside, PruneStage
from ocvtp.methods.register import Register

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/your-own-method.md").read_text(encoding="utf-8")


class Given(Method):
    """Keeps what it is told."""

    def __init__(self, kept: Callable[[Encoded], Kept], **says: Any) -> None:
        self.kept = kept
        for name, value in says.items():
            setattr(self, name, value)

    def choose(self, encoded: Encoded) -> Kept:
        return self.kept(encoded)


def first(encoded: Encoded, *numbers: int) -> Tensor:
    return torch.tensor(numbers or range(encoded.keep)).expand(len(encoded.members), -1)


@torch.no_grad()
def test_an_instance_prunes_as_its_entry_does(vlm: Any, picture_of: Any) -> None:
    inputs = vlm.prompt([[picture_of(0, 112, 112)], [picture_of(1, 80, 40)]])
    with ocvtp.prune(vlm.model, Given(lambda encoded: Kept(first(encoded))), 0.5) as handle:
        vlm.model.generate(**inputs, max_new_tokens=2, do_sample=False)
        assert handle.method == "Given"
        assert all(kept == list(range(len(kept))) for kept in handle.last_kept)
    inside = FastV(4, {"budget": "average", "k": 2})
    with ocvtp.prune(vlm.model, inside, 0.75) as handle:
        vlm.model(**inputs)
        kept = handle.last_kept
    with ocvtp.prune(vlm.model, "fastv", 0.75, k=2) as handle:
        vlm.model(**inputs)
        assert handle.last_kept == kept
    for wrong in ({"pruner": "folder"}, {"layer": 3}):
        with pytest.raises(BadInput, match="Given"):
            ocvtp.prune(vlm.model, Given(lambda encoded: Kept(first(encoded))), 0.5, **wrong)


@torch.no_grad()
def test_seeds_and_prompts_reach_an_instance_that_says_so(llava: Any, picture_of: Any) -> None:
    seen: list[Encoded] = []

    def kept(encoded: Encoded) -> Kept:
        seen.append(encoded)
        return Kept(first(encoded))

    inputs = llava.prompt([[picture_of(0)], [picture_of(1)]])
    for says in ({}, {"random": True, "needs_text": True}):
        with ocvtp.prune(llava.model, Given(kept, **says), 4, seed=3):
            llava.model(**inputs)
    assert (seen[0].seeds, seen[0].prompts) == ([0, 0], [[], []])
    assert len({*seen[1].seeds}) == 2
    assert all(len(prompt) > 2 for prompt in seen[1].prompts)
    assert seen[0].projected().shape == (2, 16, 32)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (lambda e: Kept(first(e)[:1]), r"chose torch.int64 of shape \[1, 5\] for 2 images"),
        (lambda e: Kept(first(e).float()), r"chose torch.float32 of shape \[2, 5\] .* whole numbers \[2, 5\]"),
        (lambda e: Kept(first(e)[0]), r"chose torch.int64 of shape \[5\]"),
        (lambda e: Kept([[1]]), "chose list for 2 images"),
        (lambda e: Kept(first(e, 0, 1, 1, 2, 3)), r"chose a token twice: \[0, 1, 1, 2, 3\]"),
        (lambda e: Kept(first(e, 0, 2, 1, 3, 4)), r"chose tokens that do not rise: \[0, 2, 1, 3, 4\]"),
        (lambda e: Kept(first(e, 0, 1, 2, 3)), r"keeps 4 of 16 tokens .* asked for 5 \(it may say `fewer = True`\)"),
        (lambda e: Kept(first(e, 0, 1, 2, 3, 4, 5)), "keeps 6 of 16 tokens of an image, but was asked for 5$"),
        (lambda e: Kept(first(e, 0, 1, 2, 3, 16)), "chose token 16 of an image that has 16: 0 to 15"),
        (lambda e: Kept(first(e, -2, 1, 2, 3, 4)), "chose token -2"),
        (lambda e: Kept(first(e, -1, 1, 2, 3, 4)), "has -1, which stands for none, before other tokens"),
        (lambda e: Kept(first(e), torch.zeros(2, 4, 32)), r"gave values \[2, 4, 32\] for tokens \[2, 5\]"),
        (lambda e: Kept(first(e), None, torch.zeros(2, 4)), r"gave scores \[2, 4\] for tokens \[2, 5\]"),
    ],
)
@torch.no_grad()
def test_what_cannot_be_is_refused_by_name(
    llava: Any, picture_of: Any, kept: Callable[[Encoded], Kept], message: str
) -> None:
    inputs = llava.prompt([[picture_of(0)], [picture_of(1)]])
    with ocvtp.prune(llava.model, Given(kept, name="mine"), 5), pytest.raises(BadInput, match=f"method mine {message}"):
        llava.model(**inputs)
    llava.model(**inputs)


@torch.no_grad()
def test_fewer_may_be_kept_by_who_says_so(llava: Any, picture_of: Any) -> None:
    inputs = llava.prompt([[picture_of(0)]])
    with ocvtp.prune(llava.model, Given(lambda e: Kept(first(e, 3, 5, -1, -1)), fewer=True), 5) as handle:
        llava.model(**inputs)
        assert handle.last_kept == [[3, 5]]


@pytest.mark.parametrize("name", ["dart", "autoprune", "sparsevlm-plus", "vscan", "css+pyramiddrop"])
def test_a_model_whose_layers_have_no_full_attention_is_refused(make_vlm: Any, name: str) -> None:
    vlm = make_vlm("gemma3")
    inside = name.replace("vscan", "fastv").rpartition("+")[2]
    with pytest.raises(Incompatible, match=rf"^{inside} drops tokens inside the language .*not all of full attention"):
        ocvtp.prune(vlm.model, name, 0.5)


def test_a_model_with_layers_without_attention_is_refused() -> None:
    """Qwen3.5: three layers of four are linear."""
    config = SimpleNamespace(layer_types=["linear_attention"] * 3 + ["full_attention"], num_hidden_layers=4)
    family = SimpleNamespace(model=SimpleNamespace(get_decoder=lambda: SimpleNamespace(config=config)))
    with pytest.raises(Incompatible, match=r"^dart drops tokens inside .*full_attention', 'linear_attention'"):
        REGISTRY["dart"].build(family, None, REGISTRY["dart"].options)  # type: ignore[arg-type]


# --- Entry points ----------------------------------------------------------------------------------------------------


@pytest.fixture
def points(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[str, str], None]]:
    """Adds an entry point to the group, with the source of its module."""
    found: list[EntryPoint] = []
    monkeypatch.setattr(register, "entry_points", lambda group: found)
    monkeypatch.syspath_prepend(str(tmp_path))

    def add(value: str, source: str) -> None:
        module = value.partition(":")[0]
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(source))
        found.append(EntryPoint(module, value, "ocvtp.methods"))

    yield add
    for point in found:
        sys.modules.pop(point.module, None)


ONE = """
    from ocvtp.methods import Entry
    ENTRY = Entry(name={name!r}, build=lambda family, pruner, options: None, source="a test")
    BOTH = (ENTRY, Entry(name="second", build=ENTRY.build, source="a test"))
"""


def test_other_packages_add_methods(points: Callable[[str, str], None]) -> None:
    points("added_a:BOTH", ONE.format(name="first-one"))
    there = Register()
    assert there.modules("first-one") == {"first-one": "added_a"}
    assert isinstance(there["second"], Entry)
    assert {"first-one", "second", "css"} <= {*there}
    assert "second+fastv" in there
    assert there.modules("second+fastv") == {
        "second": "added_a", "fastv": "ocvtp.methods.fastv", "+": "ocvtp.methods.combined"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("value", "source", "message"),
    [
        ("added_b:ENTRY", ONE.format(name="css"), "two methods have the name 'css': that of ocvtp and that of added_b"),
        ("added_c:ENTRY", ONE.format(name="a+b"), "has the name 'a.b': it may neither be empty nor have a . in it"),
        ("added_d:NOTHING", ONE.format(name="x"), "added_d = added_d:NOTHING of added_d .* cannot be loaded: Attr"),
        ("added_e:ENTRY", "import nowhere_at_all", "cannot be loaded: ModuleNotFoundError"),
        ("added_f:ENTRY", "ENTRY = 3", "is a int: an ocvtp.methods.Entry, or a tuple, is needed"),
    ],
)
def test_what_is_wrong_with_an_entry_point_is_said(
    points: Callable[[str, str], None], value: str, source: str, message: str
) -> None:
    points(value, source)
    with pytest.raises(BadInput, match=message):
        list(Register())


def test_two_packages_with_one_name_are_both_named(points: Callable[[str, str], None]) -> None:
    points("added_g:ENTRY", ONE.format(name="same"))
    points("added_h:ENTRY", ONE.format(name="same"))
    with pytest.raises(BadInput, match="the name 'same': that of added_g and that of added_h; uninstall one"):
        list(Register())


# --- The page --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_page_runs(llava: Any, picture_of: Any) -> None:
    code, use = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(code.strip().splitlines()) <= 30
    there: dict[str, Any] = {}
    exec(code, there)
    inputs = llava.prompt([[picture_of(0)], [picture_of(1)]])
    use = use.replace("layer=11", "layer=4").replace("keep=16", "keep=5").replace("print(", "kept.append(")
    use = use.replace("**inputs", "**inputs, max_new_tokens=1, do_sample=False")
    kept: list[Any] = []
    exec(use, {**there, "ocvtp": ocvtp, "model": llava.model, "inputs": inputs, "kept": kept})
    states = llava.model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
    expected = states[4][:, 1:].norm(dim=2).topk(5).indices.sort().values.tolist()
    assert kept == [expected]
    assert there["ENTRY"].name == "longest"


def test_paths_are_there() -> None:
    for path in re.findall(r"`((?:ocvtp|tests|docs)/[\w./-]+)`", PAGE):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"`(ocvtp(?:\.\w+)+)`", PAGE):
        module, _, last = name.rpartition(".")
        assert importlib.util.find_spec(name if last.islower() and last != "prune" else module), name


@pytest.mark.parametrize("missing", ["information", "adapted"])
def test_a_method_that_adapts_must_say_how(missing: str) -> None:
    given = {"information": lambda *_: None, "adapted": lambda *_: [], "steps": lambda *_: []}
    del given[missing]
    halved = type("Halved", (Inside,), {"name": "halved", "adapts_at": 0, **given})
    with pytest.raises(BadInput, match=f"halved adapts to each image .adapts_at is 0.: write `{missing}`"):
        halved(4, "average", [PruneStage(0, 1)])
