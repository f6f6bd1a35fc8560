"""ToMe against its description in plain loops, ties included, and its schedule against the numbers known for CLIP-L."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import ocvtp
from ocvtp.errors import BadInput, Incompatible
from ocvtp.methods.tome import merge, schedule
from ocvtp.vlms.families.llava_next import paper_mode

SIZES = [(56, 56), (80, 40), (30, 90), (56, 56), (200, 100), (64, 64), (56, 112), (90, 90)]


def slowly_merge(
    rows: list[Tensor], sizes: list[float], seeds: list[int], keys: list[Tensor], pairs: int
) -> tuple[list[Tensor], list[float], list[int]]:
    """One step: even places go into odd ones; CLS, at place 0, stays."""
    if pairs == 0:
        return rows, sizes, seeds
    even, odd = list(range(0, len(rows), 2)), list(range(1, len(rows), 2))
    unit = [key / key.norm() for key in keys]
    found = []
    for a in even[1:]:
        likeness = [float(unit[a] @ unit[b]) for b in odd]
        best = max(range(len(odd)), key=lambda place: (likeness[place], -place))
        found.append((-likeness[best], a, odd[best]))
    gone = {a: b for _, a, b in sorted(found)[:pairs]}
    merged = {b: rows[b] * sizes[b] for b in odd}
    grown = {b: sizes[b] for b in odd}
    for a, b in sorted(gone.items()):
        merged[b] = merged[b] + rows[a] * sizes[a]
        grown[b] += sizes[a]
    stays = [a for a in even if a not in gone]
    return (
        [rows[a] for a in stays] + [merged[b] / grown[b] for b in odd],
        [sizes[a] for a in stays] + [grown[b] for b in odd],
        [seeds[a] for a in stays] + [seeds[b] for b in odd],
    )


@torch.no_grad()
def slowly(tower: Any, pixels_3HW: Tensor, merges: list[int]) -> tuple[list[Tensor], list[int]]:
    """What is left of one tile, and the patches it is listed by, as the last block leaves them."""
    x_LC = tower.pre_layrnorm(tower.embeddings(pixels_3HW[None]))[0]
    sizes, seeds = [1.0] * len(x_LC), list(range(-1, len(x_LC) - 1))
    for block, pairs in zip(tower.encoder.layers, merges, strict=False):
        attention, normed_LC = block.self_attn, block.layer_norm1(x_LC)
        width, heads = attention.head_dim, attention.num_heads
        q, k, v = (p(normed_LC) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
        mixed = []
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            logits_LL = q[:, part] @ k[:, part].T / width**0.5 + torch.tensor(sizes).log()
            mixed.append(logits_LL.softmax(1) @ v[:, part])
        x_LC = x_LC + attention.out_proj(torch.cat(mixed, 1))
        keys_LE = torch.stack([k[:, head * width : (head + 1) * width] for head in range(heads)]).mean(0)
        rows, sizes, seeds = slowly_merge(list(x_LC), sizes, seeds, list(keys_LE), pairs)
        x_LC = torch.stack(rows)
        x_LC = x_LC + block.mlp(block.layer_norm2(x_LC))
    return list(x_LC[1:]), seeds[1:]


@pytest.fixture(params=["llava", "llava_next"])
def merging(request: pytest.FixtureRequest, make_vlm: Callable[..., Any]) -> Any:
    """A VLM in whose tower tokens can be merged: LLaVA-NeXT in the mode of the papers, without padding cut off."""
    vlm = make_vlm(request.param)
    if request.param == "llava_next":
        paper_mode(vlm.model, vlm.processor)
    return vlm


def eight(vlm: Any, picture_of: Callable[..., Any]) -> Any:
    return vlm.prompt([[picture_of(seed, *size)] for seed, size in enumerate(SIZES)])


def test_where_it_has_no_meaning_it_says_so(vlm: Any, pictures: Any, tools: Any) -> None:
    family = tools.family(vlm)
    if not family.facts.cls:
        with pytest.raises(Incompatible, match="tome merges tokens inside a CLIP tower"):
            ocvtp.prune(vlm.model, "tome", 5)
    elif family.facts.tokens is None:
        with ocvtp.prune(vlm.model, "tome", 5), pytest.raises(Incompatible, match="padding is cut off"):
            vlm.model(**pictures)


@pytest.mark.parametrize("behaviour", ["default", "reference"])
@pytest.mark.parametrize("keep", [3, 7, 12, 16])
def test_on_models(merging: Any, picture_of: Any, tools: Any, keep: int, behaviour: str) -> None:
    vlm, pictures = merging, eight(merging, picture_of)
    family = tools.family(vlm)
    seen = tools.prune(vlm, pictures, "tome", keep, behaviour=behaviour)
    images = family.images(pictures)
    numbers = family.numbers(images)
    pixels = iter(torch.cat(family.tiles(images)))
    blocks = family.facts.feature_layer
    for image, numbers_tp in enumerate(numbers):
        tile_count = len(numbers_tp)
        shares = [keep // tile_count + (place < keep % tile_count) for place in range(tile_count)]
        found: list[tuple[int, Tensor]] = []
        for numbers_p, share in zip(numbers_tp, shares, strict=True):
            tile = next(pixels)
            if share:
                rows, seeds = slowly(family.tower, tile, schedule(numbers_tp.shape[1], share, blocks))
                found += [(int(numbers_p[seed]), row) for seed, row in zip(seeds, rows, strict=True)]
        assert seen.kept[image] == sorted(number for number, _ in found)
        if behaviour == "default":
            found.sort(key=lambda pair: pair[0])
        torch.testing.assert_close(seen.values[image], torch.stack([row for _, row in found]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("pairs", [1, 3, 5])
def test_a_step_equals_plain_loops_ties_included(seed: int, pairs: int) -> None:
    """Keys along one of three axes: nearly all likenesses are 0 or 1."""
    draws = torch.Generator().manual_seed(seed)
    keys_TLE = torch.nn.functional.one_hot(torch.randint(3, (4, 13), generator=draws), 3).float()
    tokens_TLC = torch.randint(-4, 5, (4, 13, 6), generator=draws).float()
    sizes_TL = torch.randint(1, 4, (4, 13), generator=draws).float()
    seeds_TL = torch.arange(-1, 12).repeat(4, 1)
    made = merge(tokens_TLC, sizes_TL, seeds_TL, keys_TLE, pairs)
    for tile in range(4):
        rows, sizes, seeds = slowly_merge(
            list(tokens_TLC[tile]), sizes_TL[tile].tolist(), seeds_TL[tile].tolist(), list(keys_TLE[tile]), pairs
        )
        torch.testing.assert_close(made[0][tile], torch.stack(rows), atol=1e-6, rtol=1e-6)
        assert (made[1][tile].tolist(), made[2][tile].tolist()) == (sizes, seeds)
        assert sum(sizes) == float(sizes_TL[tile].sum())  # every patch counts once
        assert seeds[0] == -1  # CLS


def test_the_schedule_of_clip_l() -> None:
    assert schedule(576, 192, 23) == [17] * 16 + [16] * 7
    assert schedule(576, 128, 23) == [20] * 11 + [19] * 12
    assert schedule(576, 64, 23) == [23] * 6 + [22] * 17
    assert schedule(576, 576, 23) == [0] * 23
    for keep in range(1, 17):
        left = 16
        for pairs in schedule(16, keep, 4):
            assert 0 <= pairs <= left // 2
            left -= pairs
        assert left == keep
    with pytest.raises(BadInput, match="cannot merge 16 tokens into 1 in 3 blocks: at least 2 are left"):
        schedule(16, 1, 3)


def test_one_by_one_it_keeps_the_same(merging: Any, picture_of: Any, tools: Any) -> None:
    together = tools.prune(merging, eight(merging, picture_of), "tome", 5)
    for seed, size in enumerate(SIZES):
        alone = tools.prune(merging, merging.prompt([[picture_of(seed, *size)]]), "tome", 5)
        assert alone.kept == together.kept[seed : seed + 1]
        torch.testing.assert_close(alone.values[0], together.values[seed], atol=1e-5, rtol=1e-5)


def test_all_tokens_are_those_of_the_model(picture_of: Any, make_vlm: Callable[..., Any]) -> None:
    vlm = make_vlm("llava")
    pictures = eight(vlm, picture_of)
    with torch.no_grad():
        expected = vlm.model(**pictures).logits
        with ocvtp.prune(vlm.model, "tome", "100%"):
            found = vlm.model(**pictures).logits
    real = pictures["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], atol=1e-5, rtol=1e-5)
