"""What fits a VLM, and which budgets can be reached on it: tiny-llava has 4 layers and 144 tokens."""

import logging
from dataclasses import replace

import pytest

from ocvtp.methods import REGISTRY
from ocvtp.methods.budget import Budget
from ocvtp.vlms import CatalogEntry, resolve
from pipelines.inputs import wanted_settings
from pipelines.params.fitting import lacking, unreachable
from pipelines.params.model import Params


@pytest.fixture(scope="module")
def tiny() -> CatalogEntry:
    return resolve("tiny-llava")


def test_tokens_by_layer(tiny: CatalogEntry) -> None:
    assert tiny.llm_layers == 4
    assert REGISTRY["random"].by_layer(144, 16, 4, {}) == [16] * 4
    # One layer of the four reads all: (144 + 3 n) / 4 = 48.
    assert REGISTRY["fastv"].by_layer(144, 48, 4, {}) == [144, 16, 16, 16]
    assert REGISTRY["fastv"].by_layer(144, 16, 4, {"budget": "reference"}) == [144, 16, 16, 16]


def test_what_cannot_be_reached_is_said_with_what_can(tiny: CatalogEntry) -> None:
    assert unreachable(REGISTRY["fastv"], tiny, Budget.parse(48), {}) is None
    why = unreachable(REGISTRY["fastv"], tiny, Budget.parse(32), {})
    assert why is not None
    assert "37" in why  # (144 + 3) / 4, rounded up
    assert unreachable(REGISTRY["fastv"], tiny, Budget.parse(32), {"budget": "reference"}) is None
    assert unreachable(REGISTRY["visionzip"], tiny, Budget.parse(1), {}) is None
    varying = replace(tiny, facts=replace(tiny.facts, tokens=None))
    assert unreachable(REGISTRY["fastv"], varying, Budget.parse(1), {}) is None, "it depends on the image"
    assert unreachable(REGISTRY["fastv"], varying, Budget.parse("33.3%"), {}) is None
    assert "least" in str(unreachable(REGISTRY["fastv"], varying, Budget.parse("22.2%"), {}))


def test_what_a_method_needs(tiny: CatalogEntry) -> None:
    assert lacking(REGISTRY["tome"], tiny, {}) is None
    windows = replace(tiny, name="windows", facts=replace(tiny.facts, cls=False))
    assert lacking(REGISTRY["tome"], windows, {}) == "needs a CLIP tower, and windows has another"
    assert "the catalogue names none" in str(lacking(REGISTRY["trim"], tiny, {}))
    assert lacking(REGISTRY["trim"], tiny, {"clip": "folder"}) is None
    assert lacking(REGISTRY["trim"], replace(tiny, name="llava-1.5-7b"), {}) is None


def test_who_can_be_pruned_inside_the_tower(tiny: CatalogEntry) -> None:
    inside = {"inside_tower": True, "layer": 9}
    assert lacking(REGISTRY["css"], tiny, inside) is None
    assert lacking(REGISTRY["css"], resolve("tiny-qwen"), {"inside_tower": False}) is None
    assert "with inside_tower needs a tower of CLIP or SigLIP" in str(
        lacking(REGISTRY["css"], resolve("tiny-qwen"), inside)
    )


def test_nothing_is_dropped_before_deepstacks_last_addition(tiny: CatalogEntry) -> None:
    """tiny-qwen adds features of its tower to the first two layers of four."""
    qwen = resolve("tiny-qwen")
    assert qwen.facts.added == 2
    for name in ("fastv", "sparsevlm", "pyramiddrop"):
        assert lacking(REGISTRY[name], tiny, {}) is None
        assert "drops tokens before layer 1 (from 0)" in str(lacking(REGISTRY[name], qwen, {})), name
    assert lacking(REGISTRY["fastv"], qwen, {"k": 2}) is None
    assert lacking(REGISTRY["css"], qwen, {}) is None


def test_a_method_runs_on_the_vlms_of_a_grid_that_it_fits(caplog: pytest.LogCaptureFixture) -> None:
    grid = {"vlm": ("tiny-llava", "tiny-qwen"), "method": ("css", "tome", "fastv"), "keep": (Budget.parse("33.3%"),)}
    vlms = {name: resolve(name) for name in grid["vlm"]}
    with caplog.at_level(logging.WARNING):
        found = wanted_settings(Params().model_copy(update=grid), vlms)
    assert [(one.vlm, one.method) for one in found] == [
        ("tiny-llava", "vanilla"), ("tiny-llava", "css"), ("tiny-llava", "tome"), ("tiny-llava", "fastv"),
        ("tiny-qwen", "vanilla"), ("tiny-qwen", "css"),
    ]  # fmt: skip
    assert "tome-33.3pct is left out on tiny-qwen: needs a CLIP tower" in caplog.text


def test_evaluate_leaves_out_what_cannot_be_reached(tiny: CatalogEntry, caplog: pytest.LogCaptureFixture) -> None:
    grid = {"method": ("random", "fastv"), "keep": (Budget.parse(48), Budget.parse(16)), "seed": (0,)}
    with caplog.at_level(logging.WARNING):
        vanilla, *kept = wanted_settings(Params().model_copy(update=grid), {"tiny-llava": tiny})
    assert vanilla.method == "vanilla"
    assert [(one.method, one.tokens) for one in kept] == [("random", 48), ("random", 16), ("fastv", 48)]
    assert "fastv-16 is left out on tiny-llava" in caplog.text
