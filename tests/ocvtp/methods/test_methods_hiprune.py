"""HiPrune against its description in plain loops, ties included, and against transformers' own attention."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ocvtp.errors import BadInput
from ocvtp.methods import entry_of, options_of
from ocvtp.methods.hiprune import HiPrune
from ocvtp.vlms.images import Facts, Layout, Part


def method(facts: Facts, merge: int = 1, **options: Any) -> HiPrune:
    entry = entry_of("hiprune")
    config = SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=merge))
    family = SimpleNamespace(facts=facts, model=SimpleNamespace(config=config), index=lambda layer: layer)
    made = entry.build(family, None, options_of(entry, options))  # type: ignore[arg-type]
    assert isinstance(made, HiPrune)
    return made


def best(scores: dict[int, float], number: int) -> list[int]:
    return sorted(scores, key=lambda i: (-scores[i], i))[: max(0, number)]


def around(layout: Layout, number: int) -> set[int]:
    for part in layout:
        rows, columns = part.grid
        row, column = divmod(number - part.start, columns)
        if 0 <= number - part.start < rows * columns:
            places = [(row, column - 1), (row, column + 1), (row - 1, column), (row + 1, column)]
            return {part.start + y * columns + x for y, x in places if 0 <= y < rows and 0 <= x < columns}
    raise AssertionError(number)


def by_default(
    layout: Layout, owners: list[list[int]], keep: int, shallow_N: Tensor, deep_N: Tensor, alpha: float = 0.1
) -> list[int]:
    """Tile by tile, the first with what is left over; a tile that is too small leaves its share to the others."""
    shares = [0] * len(owners)
    while sum(shares) < keep:
        room = [tile for tile in range(len(owners)) if shares[tile] < len(owners[tile])]
        least = min(shares[tile] for tile in room)
        shares[next(tile for tile in room if shares[tile] == least)] += 1
    found: list[int] = []
    for tile, width, share in zip(owners, widths(layout, owners), shares, strict=True):
        part = (Part(0, (len(tile) // width, width)),)
        found += [tile[place] for place in together(part, share, shallow_N[tile], deep_N[tile], alpha)]
    return sorted(found)


def together(layout: Layout, keep: int, shallow_N: Tensor, deep_N: Tensor, alpha: float = 0.1) -> list[int]:
    shallow, deep = dict(enumerate(shallow_N.tolist())), dict(enumerate(deep_N.tolist()))
    anchors = best(shallow, round(keep * alpha / 5))
    buffers = {near for anchor in anchors for near in around(layout, anchor)} - set(anchors)
    chosen = anchors + best({i: deep[i] for i in buffers}, len(buffers))
    chosen += best({i: deep[i] for i in deep if i not in chosen}, keep - len(chosen))
    return sorted(chosen[:keep])


def as_released(
    owners: list[list[int]], columns: list[int], keep: int, shallow_N: Tensor, deep_N: Tensor, alpha: float = 0.1,
    queries: int = 1,
) -> list[int]:  # fmt: skip
    """Tile by tile; `queries` is what deep scores are summed over in the release for Qwen2.5-VL."""
    found: list[int] = []
    for tile, width in zip(owners, columns, strict=True):
        share = keep // len(owners)
        shallow = {place: float(shallow_N[i]) for place, i in enumerate(tile)}
        deep = {place: float(deep_N[i]) * queries for place, i in enumerate(tile)}
        anchors = best(shallow, round(share * alpha / 5))
        taken = set(anchors)
        for anchor in anchors:
            for step in (-1, 1, -width, width):
                taken.add(min(max(anchor + step, 0), len(tile) - 1))
        for place in taken:
            deep[place] -= 1
        taken |= set(best(deep, share - len(taken)))
        found += [tile[place] for place in taken]
    return sorted(found)


def widths(layout: Layout, owners: list[list[int]]) -> list[int]:
    """Columns of each tile."""
    starts = [part.start for part in layout] + [10**9]
    parts = [next(part for part, end in zip(layout, starts[1:], strict=True) if tile[0] < end) for tile in owners]
    return [(part.tile or part.grid)[1] for part in parts]


@pytest.mark.parametrize("behaviour", ["default", "together", "reference"])
@pytest.mark.parametrize("name", ["square", "wide", "tiles", "cut"])
@pytest.mark.parametrize("alpha", [0.1, 0.4, 0.6])
def test_ties_and_all(tools: Any, name: str, behaviour: str, alpha: float) -> None:
    layout = tools.layouts[name]
    how = {"tiles": "together"} if behaviour == "together" else {"behaviour": behaviour}
    owners, made = tools.owners(layout), method(tools.facts, **how, alpha=alpha, object_layer=3)
    assert set(made.layers()) == {2, 4}
    for seed in range(5):
        vision = tools.numbers(layout, seed=seed)
        shallow, deep = vision.received(2, [0, 1, 2]), vision.received(4, [0, 1, 2])
        for keep in {len(owners), 10, vision.count * 3 // 4, vision.count}:
            if behaviour == "reference" and keep // len(owners) > min(map(len, owners)):
                continue
            indices, _ = tools.choose(made, vision, keep)
            for image in range(3):
                if behaviour == "default":
                    expected = by_default(layout, owners, keep, shallow[image], deep[image], alpha)
                    assert len(expected) == keep
                elif behaviour == "together":
                    expected = together(layout, keep, shallow[image], deep[image], alpha)
                    assert len(expected) == keep
                else:
                    columns = widths(layout, owners)
                    expected = as_released(owners, columns, keep, shallow[image], deep[image], alpha)
                    if len(expected) > keep // len(owners) * len(owners):
                        continue  # buffers alone exceed the budget, for which the release has no rule
                assert indices[image].tolist() == expected


def test_at_an_edge_only_the_release_takes_a_token_of_the_next_row(tools: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    vision = tools.numbers((Part(0, (8, 8)),), images=1)
    shallow, deep = torch.zeros(1, 64), torch.arange(64, 0, -1)[None] / 128
    shallow[0, 39] = 1.0  # the last of the fifth row
    monkeypatch.setattr(vision, "received", lambda block, members: shallow if block == 2 else deep)
    for behaviour, wrapped in (("default", []), ("reference", [40])):
        indices, _ = tools.choose(method(tools.facts, object_layer=3, behaviour=behaviour), vision, 30)
        assert indices[0].tolist() == [*range(26 - len(wrapped)), 31, 38, 39, *wrapped, 47]


def test_sums_let_the_release_for_qwen_keep_fewer(tools: Any) -> None:
    layout = tools.layouts["wide"]
    fewer = 0
    for seed in range(8):
        vision = tools.numbers(layout, seed=seed)
        shallow, deep = vision.received(2, [0, 1, 2]), vision.received(5, [0, 1, 2])
        options = {"object_layer": 3, "alpha": 0.5, "behaviour": "reference"}
        indices, _ = tools.choose(method(tools.without_cls, 2, **options), vision, 12)
        for image in range(3):
            expected = as_released([list(range(21))], [7], 12, shallow[image], deep[image], 0.5, queries=84)
            fewer += len(expected) < 12
            assert indices[image].tolist() == expected + [-1] * (12 - len(expected))
        for exclude in ("always", "minus one"):
            whole = tools.choose(method(tools.facts, object_layer=3, alpha=0.5, exclude=exclude), vision, 12)[0]
            assert bool((whole >= 0).all())
    assert fewer


@pytest.mark.parametrize("behaviour", ["default", "reference"])
@pytest.mark.parametrize(("keep", "alpha"), [(1, 0.1), (4, 1.0), (7, 0.7), (10, 0.5), (13, 0.4), (16, 0.4)])
def test_on_models(vlm: Any, pictures: Any, tools: Any, keep: int, alpha: float, behaviour: str) -> None:
    family = tools.family(vlm)
    blocks = (2, family.facts.feature_layer - 1)
    seen = tools.prune(vlm, pictures, "hiprune", keep, behaviour=behaviour, object_layer=3, alpha=alpha)
    vision = family.encode(family.images(pictures), blocks)
    for image in range(8):
        layout = vision.layout(image)
        shallow, deep = (vision.received(block, [image])[0] for block in blocks)
        if behaviour == "default":
            assert seen.kept[image] == by_default(layout, tools.owners(layout), keep, shallow, deep, alpha)
        else:
            owners = tools.owners(layout)
            merge = getattr(vlm.model.config.vision_config, "spatial_merge_size", 1)
            queries = 1 if family.facts.cls else merge * merge * len(deep)
            expected = as_released(owners, widths(layout, owners), keep, shallow, deep, alpha, queries)
            if len(expected) <= keep // len(owners) * len(owners):
                assert seen.kept[image] == expected
        given = vision.values([image])[0][seen.kept[image]]
        torch.testing.assert_close(seen.values[image], given, atol=1e-6, rtol=0)


@torch.no_grad()
def test_attention_is_that_of_transformers(
    make_vlm: Callable[..., Any], picture_of: Callable[..., Any], tools: Any
) -> None:
    llava = make_vlm("llava")
    inputs = llava.prompt([[picture_of(seed)] for seed in range(6)])
    seen = {keep: tools.prune(llava, inputs, "hiprune", keep, object_layer=2, alpha=0.6) for keep in (6, 9)}
    llava.model.set_attn_implementation({"vision_config": "eager"})
    attentions = llava.model.model.vision_tower(inputs["pixel_values"], output_attentions=True).attentions
    for keep, found in seen.items():
        for image in range(6):
            shallow, deep = (attentions[block][image].mean((0, 1))[1:] for block in (1, -2))
            assert found.kept[image] == together((Part(0, (4, 4)),), keep, shallow, deep, 0.6)


@pytest.mark.parametrize(
    ("depth", "cls", "block"), [(24, True, 8), (32, False, 15), (12, True, 4), (5, True, 1), (2, True, 0)]
)
def test_the_layer_follows_the_depth_of_the_tower(depth: int, cls: bool, block: int) -> None:
    assert block in set(method(Facts(16, (4, 4), 8, depth, depth, cls)).layers())


def test_options(tools: Any) -> None:
    for wrong in (
        {"edges": "torus"},
        {"alpha": 2},
        {"alpha": True},
        {"object_layer": 0},
        {"exclude": 1},
        {"tiles": "apart"},
    ):
        with pytest.raises(BadInput, match=f"hiprune has no {next(iter(wrong))}="):
            method(tools.facts, **wrong)
