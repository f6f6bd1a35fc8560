"""VisionZip against its description in plain loops, ties included, and against transformers' own attention."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ocvtp.errors import BadInput, Incompatible
from ocvtp.methods import entry_of, options_of
from ocvtp.methods.visionzip import VisionZip
from ocvtp.vlms.images import Facts, Layout, Part

Rows = list[tuple[int, Tensor]]


def method(facts: Facts, **options: Any) -> VisionZip:
    entry, family = entry_of("visionzip"), SimpleNamespace(facts=facts)
    made = entry.build(family, None, options_of(entry, options))  # type: ignore[arg-type]
    assert isinstance(made, VisionZip)
    return made


def cosine(one: Tensor, other: Tensor) -> float:
    return float(one.double() @ other.double()) / float(one.double().norm() * other.double().norm())


def zipped(
    members: list[int], keep: int, scores_N: Tensor, keys_NE: Tensor, values_NV: Tensor, *, cls: bool, merge: str
) -> tuple[list[int], Rows, list[int]]:
    """Dominant tokens, contextual ones with their values, and what CLS is listed by."""
    contextual = (keep * 10 + 32) // 64
    cls = cls and keep > contextual
    best = sorted(members, key=lambda i: (-float(scores_N[i]), i))
    dominant = sorted(best[: keep - contextual - cls])
    left = [i for i in members if i not in dominant]
    targets = [left[place * max(1, len(left) // contextual)] for place in range(contextual)]
    others = [i for i in left if i not in targets]
    merged: dict[int, list[Tensor]] = {target: [] for target in targets}
    for other in others if targets else []:
        nearest = targets[0]
        for target in targets[1:]:
            if cosine(keys_NE[other], keys_NE[target]) > cosine(keys_NE[other], keys_NE[nearest]) + 1e-9:
                nearest = target
        merged[nearest].append(values_NV[other])
    rows = []
    for target, joined in merged.items():
        if merge == "mean":
            rows.append((target, torch.stack([values_NV[target], *joined]).mean(0)))
        else:
            rows.append((target, values_NV[target] + (torch.stack(joined).mean(0) if joined else 0)))
    return dominant, rows, others[:1] if cls else []


def slowly(
    layout: Layout, owners: list[list[int]], keep: int, scores_N: Tensor, keys_NE: Tensor, values_NV: Tensor,
    cls_TV: Tensor | None, *, how: str, merge: str = "sum",
) -> tuple[list[int], Tensor]:  # fmt: skip
    if how != "reference":
        if how == "together":
            owners = [sorted(i for tile in owners for i in tile)]
        shares = [0] * len(owners)  # the first have what is left over, and what a small one cannot hold goes to others
        while sum(shares) < keep:
            room = [tile for tile in range(len(owners)) if shares[tile] < len(owners[tile])]
            least = min(shares[tile] for tile in room)
            shares[next(tile for tile in room if shares[tile] == least)] += 1
        pairs: Rows = []
        for tile, share in zip(owners, shares, strict=True):
            dominant, rows, _ = zipped(tile, share, scores_N, keys_NE, values_NV, cls=False, merge=merge)
            pairs += [*((i, values_NV[i]) for i in dominant), *rows]
        pairs.sort(key=lambda pair: pair[0])
        return [i for i, _ in pairs], torch.stack([value for _, value in pairs])
    parts = [
        zipped(tile, keep // len(owners), scores_N, keys_NE, values_NV, cls=cls_TV is not None, merge="sum")
        for tile in owners
    ]
    values: list[Tensor] = []

    def add_cls(tile: int) -> None:
        if cls_TV is not None:
            values.extend([cls_TV[tile]] * len(parts[tile][2]))

    add_cls(0)
    values += [values_NV[i] for i in parts[0][0]] + [value for _, value in parts[0][1]]
    values += [values_NV[i] for i in sorted(i for dominant, _, _ in parts[1:] for i in dominant)]
    for tile in range(1, len(parts)):
        add_cls(tile)
    for _, rows, _ in parts[1:]:
        values += [value for _, value in rows]
    numbers = [i for dominant, rows, cls in parts for i in [*dominant, *(target for target, _ in rows), *cls]]
    return sorted(numbers), torch.stack(values)


@pytest.mark.parametrize("behaviour", ["default", "together", "reference"])
@pytest.mark.parametrize("name", ["square", "wide", "tiles", "cut"])
@pytest.mark.parametrize("has_cls", [True, False])
def test_ties_and_all(tools: Any, name: str, behaviour: str, has_cls: bool) -> None:
    layout, owners = tools.layouts[name], tools.owners(tools.layouts[name])
    facts, reference = tools.facts if has_cls else tools.without_cls, behaviour == "reference"
    block = facts.feature_layer - 1
    for seed in range(5):
        vision = tools.numbers(layout, seed=seed)
        for keep in {len(owners), 8, 12, vision.count * 3 // 4, vision.count}:
            if reference and keep // len(owners) > min(map(len, owners)):
                continue
            how = {"tiles": "together", "merge": "mean"} if behaviour == "together" else {"behaviour": behaviour}
            indices, values = tools.choose(method(facts, **how), vision, keep)
            scores = (vision.from_cls if has_cls else vision.received)(block, [0, 1, 2])
            keys, given, cls = vision.keys(block, [0, 1, 2]), vision.values([0, 1, 2]), vision.cls_values([0, 1, 2])
            for image in range(3):
                expected, rows = slowly(
                    layout, owners, keep, scores[image], keys[image], given[image],
                    cls[image] if has_cls else None, how=behaviour, merge=how.get("merge", "sum"),
                )  # fmt: skip
                assert indices[image].tolist() == expected
                assert len(set(expected)) == len(expected) == (keep // len(owners) * len(owners) if reference else keep)
                torch.testing.assert_close(values[image], rows, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("behaviour", ["default", "reference"])
@pytest.mark.parametrize("keep", [1, 4, 7, 11, 15, 16])
def test_on_models(vlm: Any, pictures: Any, tools: Any, keep: int, behaviour: str) -> None:
    seen, family = tools.prune(vlm, pictures, "visionzip", keep, behaviour=behaviour), tools.family(vlm)
    block = family.facts.feature_layer - 1
    vision = family.encode(family.images(pictures), {block})
    for image in range(8):
        owners, reference = tools.owners(vision.layout(image)), behaviour == "reference"
        if reference and keep < len(owners):
            continue
        scores = (vision.from_cls if family.facts.cls else vision.received)(block, [image])[0]
        cls = vision.cls_values([image])[0] if family.facts.cls else None
        expected, rows = slowly(
            vision.layout(image), owners, keep, scores, vision.keys(block, [image])[0], vision.values([image])[0], cls,
            how=behaviour,
        )  # fmt: skip
        assert seen.kept[image] == expected
        torch.testing.assert_close(seen.values[image], rows, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_attention_and_keys_are_those_of_transformers(
    make_vlm: Callable[..., Any], picture_of: Callable[..., Any], tools: Any
) -> None:
    llava = make_vlm("llava")
    inputs = llava.prompt([[picture_of(seed)] for seed in range(5)])
    seen = tools.prune(llava, inputs, "visionzip", 7, behaviour="reference")
    tower = llava.model.model.vision_tower
    projected: list[Tensor] = []
    tower.encoder.layers[3].self_attn.k_proj.register_forward_hook(lambda *args: projected.append(args[2]))
    llava.model.set_attn_implementation({"vision_config": "eager"})
    output = tower(inputs["pixel_values"], output_hidden_states=True, output_attentions=True)
    for image in range(5):
        scores = output.attentions[-2][image, :, 0, 1:].sum(0)
        keys = projected[0][image, 1:].view(16, 2, 16).mean(1)
        features = output.hidden_states[-2][image]
        expected, rows = slowly((), [list(range(16))], 7, scores, keys, features[1:], features[:1], how="reference")
        assert seen.kept[image] == expected
        torch.testing.assert_close(seen.values[image], rows, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("keep", "contextual"), [(64, 10), (128, 20), (192, 30), (32, 5), (48, 8), (16, 3), (3, 0)])
def test_split_of_the_budget(tools: Any, keep: int, contextual: int) -> None:
    """Each target's key is near that of the tokens behind it, so that each has something merged into it."""

    class Runs(tools.numbers):  # type: ignore[name-defined,misc]
        def keys(self, block: int, members: Any) -> Tensor:
            angle = torch.linspace(0, 3, 576)
            return torch.stack([angle.cos(), angle.sin()], 1).expand(len(members), -1, -1)

    vision = Runs((Part(0, (24, 24)),), width=40)
    given = vision.values([0, 1, 2])
    for options, expected in (({}, contextual), ({"contextual": 2}, 2)):
        indices, values = tools.choose(method(tools.facts, **options), vision, keep)
        changed = (values != given.gather(1, indices[..., None].expand(-1, -1, 40))).any(2)
        assert changed.sum(1).tolist() == [expected] * 3


def test_options(vlm: Any, tools: Any) -> None:
    for wrong in ({"merge": "max"}, {"order": "random"}, {"cls": 1}, {"behaviour": "old"}, {"contextual": -1}):
        with pytest.raises(BadInput, match=f"visionzip has no {next(iter(wrong))}="):
            method(tools.facts, **wrong)
    with pytest.raises(Incompatible, match="vision tower has none"):
        method(tools.without_cls, cls=True)
    method(tools.without_cls, behaviour="reference")
