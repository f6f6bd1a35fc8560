"""Qwen2.5-VL: windows undone, patches merged, attention within what sees each other, places of three numbers."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import ocvtp
from ocvtp.errors import BadInput, Incompatible
from ocvtp.vlms import family_of
from ocvtp.vlms.images import Images

Picture = Callable[..., Image.Image]
SIZES = [(112, 112), (196, 84), (84, 168)]
"""Width and height. In tokens of 28 x 28 pixels, which the tower sees in windows of 2 x 2:"""
GRIDS = [(4, 4), (3, 7), (6, 3)]
STARTS = [0, 64, 148, 220]
"""Of the patches of each image, four a token."""


@pytest.fixture(scope="module")
def qwen(make_vlm: Callable[..., Any]) -> Any:
    return make_vlm("qwen2_5_vl")


@pytest.fixture(scope="module")
def images(qwen: Any, picture_of: Picture) -> Images:
    pictures = [picture_of(i, *size) for i, size in enumerate(SIZES)]
    return family_of(qwen.model).preprocess(qwen.processor, pictures, mode="pad")


def in_windows() -> list[tuple[int, int, int]]:
    """Image, row and column of the tokens in the order of the tower: window after window, each row by row."""
    found = []
    for image, (rows, columns) in enumerate(GRIDS):
        for top in range(0, rows, 2):
            for left in range(0, columns, 2):
                found += [
                    (image, row, column)
                    for row in range(top, min(top + 2, rows))
                    for column in range(left, min(left + 2, columns))
                ]
    return found


def in_grids(patches_PX: Tensor) -> list[Tensor]:
    """Means over the four patches of each token, of each image in rows and columns."""
    out = [torch.zeros(rows, columns, *patches_PX.shape[1:], dtype=patches_PX.dtype) for rows, columns in GRIDS]
    for place, (image, row, column) in enumerate(in_windows()):
        out[image][row, column] = sum(patches_PX[4 * place + i] for i in range(4)) / 4
    return [each.flatten(0, 1) for each in out]


@pytest.fixture(scope="module")
@torch.no_grad()
def stock(qwen: Any, images: Images) -> dict[str, Any]:
    """What transformers' own tower computes on its way: the input and output, q, k, v and spans of each block."""
    seen: dict[str, Any] = {"in": [], "out": [], "qkv": [], "rotation": [], "spans": []}

    def before(_: Any, args: Any, kwargs: Any) -> None:
        seen["in"].append(args[0])
        seen["rotation"].append(kwargs["position_embeddings"])
        seen["spans"].append(kwargs["cu_seqlens"].tolist())

    tower = qwen.model.model.visual
    hooks = []
    for block in tower.blocks:
        hooks.append(block.register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(block.register_forward_hook(lambda _, __, out: seen["out"].append(out)))
        hooks.append(block.attn.qkv.register_forward_hook(lambda _, __, out: seen["qkv"].append(out)))
    seen["merged"] = tower(images.pixels, grid_thw=images.sizes).pooler_output
    for hook in hooks:
        hook.remove()
    return seen


@torch.no_grad()
def test_tokens_are_means_over_patches_in_rows_and_columns(qwen: Any, images: Images, stock: Any) -> None:
    family = family_of(qwen.model)
    assert family.grids(images) == GRIDS
    vision = family.encode(images, range(6))
    for layer in range(6):
        states = stock["in"][0] if layer == 0 else stock["out"][layer - 1]
        for image, expected in enumerate(in_grids(states)):
            torch.testing.assert_close(vision.tokens(layer, [image])[0], expected)
    for image, expected in enumerate(stock["merged"].split([16, 21, 18])):
        assert torch.equal(vision.values([image])[0], expected)


@torch.no_grad()
def test_windows_are_undone_for_merged_tokens_too(qwen: Any, images: Images) -> None:
    """Merged tokens stand in the order of the picture: swapping two tokens' patches swaps them, if nothing mixes."""
    family, (rows, columns) = family_of(qwen.model), GRIDS[1]
    one = Images(images.pixels[64:148], images.sizes[1:2])
    before = [block.attn.proj.weight.clone() for block in family.tower.blocks]
    biases = [block.attn.proj.bias.clone() for block in family.tower.blocks]
    for block in family.tower.blocks:
        block.attn.proj.weight.zero_()
        block.attn.proj.bias.zero_()
    try:
        values = family.encode(one, ()).values([0])[0]
        # The processor puts the patches of a token together, and tokens row by row.
        swapped = one.pixels.clone().unflatten(0, (rows * columns, 4))
        swapped[[1, 19]] = swapped[[19, 1]]
        changed = family.encode(Images(swapped.flatten(0, 1), one.sizes), ()).values([0])[0]
    finally:
        for block, weight, bias in zip(family.tower.blocks, before, biases, strict=True):
            block.attn.proj.weight.copy_(weight)
            block.attn.proj.bias.copy_(bias)
    torch.testing.assert_close(changed[[19, 1]], values[[1, 19]])
    others = [i for i in range(21) if i not in (1, 19)]
    torch.testing.assert_close(changed[others], values[others])
    assert not torch.allclose(values[1], values[19])


@torch.no_grad()
def test_attention_is_received_from_what_sees_a_token(qwen: Any, images: Images, stock: Any) -> None:
    """In plain loops over spans and heads from transformers' own q and k. Blocks 2 and 4 see whole images."""
    family = family_of(qwen.model)
    for block in range(5):
        q, k, _ = stock["qkv"][block].unflatten(1, (3, 2, 16)).unbind(1)
        cos, sin = (each[:, None].double() for each in stock["rotation"][block])
        q, k_turned = (x.double() * cos + torch.cat([-x[..., 8:], x[..., :8]], -1).double() * sin for x in (q, k))
        sums, ends = torch.zeros(220, dtype=torch.float64), stock["spans"][block]
        assert (ends == STARTS) == (block in (2, 4))
        for start, end in itertools.pairwise(ends):
            for head in range(2):
                scores = q[start:end, head] @ k_turned[start:end, head].T / 4
                sums[start:end] += scores.softmax(1).sum(0) / 2
        vision = family.encode(images, [block])
        for image, expected in enumerate(in_grids(sums)):
            number = 4 * len(expected)
            found = vision.received(block, [image])[0]
            torch.testing.assert_close(found.double(), expected / number, atol=1e-6, rtol=1e-4)
            assert float(found.sum() * 4) == pytest.approx(1, abs=1e-4)
        for image, expected in enumerate(in_grids(k.mean(1))):
            torch.testing.assert_close(vision.keys(block, [image])[0], expected)


@torch.no_grad()
def test_images_do_not_see_each_other(qwen: Any, images: Images) -> None:
    family = family_of(qwen.model)
    together = family.encode(images, [2, 3])
    for image, (first, last) in enumerate(itertools.pairwise(STARTS)):
        alone = family.encode(Images(images.pixels[first:last], images.sizes[image : image + 1]), [2, 3])
        torch.testing.assert_close(together.values([image]), alone.values([0]))
        torch.testing.assert_close(together.received(2, [image]), alone.received(2, [0]))
        torch.testing.assert_close(together.tokens(3, [image]), alone.tokens(3, [0]))
        assert torch.equal(family.pixels_of(images, image), images.pixels[first:last])


def test_there_is_no_cls(qwen: Any, images: Images) -> None:
    vision = family_of(qwen.model).encode(images, [2])
    for ask in (lambda: vision.from_cls(2, [0]), lambda: vision.cls_values([0])):
        with pytest.raises(Incompatible, match="no CLS"):
            ask()


@torch.no_grad()
def test_what_does_not_fit_is_refused(qwen: Any, picture_of: Picture) -> None:
    inputs = qwen.prompt([[picture_of(0, 112, 112)]])
    with ocvtp.prune(qwen.model, "random", 3):
        for change, message in (
            ({"image_grid_thw": None}, "this model needs image_grid_thw beside pixel_values"),
            ({"pixel_values": inputs["pixel_values"][:-1]}, r"asks for \[64\] patches, but pixel_values has 63"),
            (
                {"image_grid_thw": torch.tensor([[2, 8, 4]])},
                r"image_grid_thw has images of \[2\] frames: those of a video are needed",
            ),
            ({"pixel_values_videos": inputs["pixel_values"]}, "needs video_grid_thw beside pixel_values_videos"),
        ):
            with pytest.raises(BadInput, match=message):
                qwen.model(**{**inputs, **change})


@torch.no_grad()
def test_places_are_original_unless_asked_otherwise(qwen: Any, picture_of: Picture) -> None:
    """M-RoPE's numbers are places in a picture: the ids of the whole prompt are sliced."""
    inputs, seen = qwen.prompt([[picture_of(0, 140, 84)]]), list[Tensor]()
    hook = qwen.model.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["position_ids"][-3:, 0]), with_kwargs=True
    )
    qwen.model(**inputs)
    for positions in (None, "original", "compact"):
        with ocvtp.prune(qwen.model, "random", 3, positions=positions) as handle:
            qwen.model(**inputs)
            assert handle.last_columns is not None
            columns = handle.last_columns[0]
    hook.remove()
    whole, default, original, compact = seen
    assert torch.equal(default, whole[:, columns])
    assert torch.equal(original, default)
    assert not torch.equal(compact, original)
    # Each of the three numbers of the kept tokens goes up from 2, which is where the picture begins, without gaps.
    for row in compact[:, 2:5].tolist():
        assert sorted(set(row)) == list(range(2, 2 + len(set(row))))
