"""LLaVA-NeXT: tiles, padding, newlines, and the papers' 2880 tokens (here 80)."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers.image_processing_utils import select_best_resolution

import ocvtp
from ocvtp.errors import BadInput, Incompatible
from ocvtp.pruning.splice import Spot
from ocvtp.vlms import family_of
from ocvtp.vlms.anyres import MERGES, shape_of
from ocvtp.vlms.families.llava_next import Merge, paper_mode
from ocvtp.vlms.images import Images

Picture = Callable[..., Image.Image]
MERGE: Merge = "spatial_unpad"
NEW = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(scope="module")
def stock(make_vlm: Callable[..., Any]) -> Any:
    return make_vlm("llava_next")


@pytest.fixture(params=["flat", "spatial"])
def paper(make_vlm: Callable[..., Any], request: pytest.FixtureRequest) -> Any:
    vlm = make_vlm("llava_next")
    paper_mode(vlm.model, vlm.processor, request.param)
    return vlm


def features_of(vlm: Any, pixels_T3HW: Tensor) -> Tensor:
    """What transformers' own tower and projector make of tiles, [T, 4, 4, D]."""
    states = vlm.model.model.vision_tower(pixels_T3HW, output_hidden_states=True).hidden_states[-2]
    return vlm.model.model.multi_modal_projector(states[:, 1:]).unflatten(1, (4, 4))


def test_numbers_of_tokens_and_placeholders_are_the_processors(stock: Any) -> None:
    family, generator = family_of(stock.model), torch.Generator().manual_seed(0)
    sizes = torch.randint(20, 400, (80, 2), generator=generator)
    sizes = torch.cat([sizes, torch.tensor([[56, 56], [112, 112], [56, 168], [400, 20], [20, 400]])])
    spans = family.spans(Images(torch.empty(0), sizes))
    counts = family.counts(Images(torch.empty(0), sizes))
    for (height, width), span, count in zip(sizes.tolist(), spans, counts, strict=True):
        assert span == stock.processor._get_number_of_features(height, width, 56, 56) - 1
        rows = span - count  # a newline each
        assert (count - 16) % rows == 0 if rows else count == 16
    assert len(set(counts)) > 5


def test_tokens_stand_where_the_layout_says(stock: Any) -> None:
    """Tile, row and column in it of each token, counted from the grids and offsets alone."""
    offsets = set()
    for height, width in ((56, 112), (30, 112), (112, 30), (112, 112), (90, 112), (56, 168), (40, 168), (60, 110)):
        best = select_best_resolution((height, width), stock.model.config.image_grid_pinpoints)
        shape = shape_of((height, width), tuple(map(tuple, stock.model.config.image_grid_pinpoints)), 56, 4, MERGE)
        whole, tiled = shape.layout
        assert shape.patches_N[:16].tolist() == list(range(16))
        assert (whole.grid, tiled.start, tiled.tile) == ((4, 4), 16, (4, 4))
        # As much is cut off on both sides.
        assert [best[i] // 14 - tiled.grid[i] for i in (0, 1)] == [2 * offset for offset in tiled.offset]
        expected = []
        for row in range(tiled.offset[0], tiled.offset[0] + tiled.grid[0]):
            for column in range(tiled.offset[1], tiled.offset[1] + tiled.grid[1]):
                tile = 1 + (row // 4) * (best[1] // 56) + column // 4
                expected.append(16 * tile + 4 * (row % 4) + column % 4)
        assert shape.patches_N[16:].tolist() == expected
        offsets.add(tiled.offset)
    assert len(offsets) >= 3


@torch.no_grad()
def test_very_narrow_images_have_no_tokens_in_tiles(stock: Any, picture_of: Picture) -> None:
    for size in ((8, 300), (300, 8)):
        inputs = stock.prompt([[picture_of(0, *size)]])
        answer = stock.model.generate(**inputs, **NEW)
        with ocvtp.prune(stock.model, "random", 16) as handle:
            assert torch.equal(stock.model.generate(**inputs, **NEW), answer)
            assert handle.last_kept == [list(range(16))]
        with ocvtp.prune(stock.model, "random", 3) as handle:
            stock.model.generate(**inputs, **NEW)
            assert handle.last_layers == [[3]] * 4


@torch.no_grad()
def test_paper_mode_has_as_many_tokens_for_every_image(paper: Any, picture_of: Picture) -> None:
    family = family_of(paper.model)
    assert family.facts.tokens == 80
    pictures = [picture_of(0), picture_of(1, 200, 60), picture_of(2, 50, 90)]
    images = family.preprocess(paper.processor, pictures, mode="pad")
    assert family.counts(images) == [80, 80, 80]
    vision = family.encode(images, [2])
    assert vision.tokens(2, [0, 1, 2]).shape == (3, 80, 32)
    for number in range(3):
        tiles = features_of(paper, images.pixels[number])
        expected = list(tiles[0].flatten(0, 1))
        if paper.model.config.mm_patch_merge_type == "flat":
            expected += [token for tile in tiles[1:] for row in tile for token in row]
        else:
            for row in range(8):
                for column in range(8):
                    expected.append(tiles[1 + 2 * (row // 4) + column // 4][row % 4, column % 4])
        (ours,) = family.project([vision.values([number])[0]])
        torch.testing.assert_close(ours, torch.stack(expected))


@pytest.mark.parametrize("positions", ["compact", "original"])
@torch.no_grad()
def test_the_language_model_reads_tokens_without_newlines_in_paper_mode(
    paper: Any, picture_of: Picture, positions: str
) -> None:
    """Against a prompt put together by hand: text, the kept of 80 tokens in the order of the mode, text."""
    pictures = [[picture_of(0, 100, 40)], [picture_of(1), picture_of(2, 40, 100)]]
    inputs, length = paper.prompt(pictures), paper.prompt(pictures)["input_ids"].shape[1]
    with ocvtp.prune(paper.model, "random", 7, positions=positions) as handle:
        output = paper.model.generate(**inputs, **NEW, return_dict_in_generate=True, output_logits=True)
        kept = iter(handle.last_kept)
        assert [len(mine) for mine in handle.last_kept] == [7, 7, 7]
        assert handle.last_layers == [[7, 7, 7]] * 4
    family, words = family_of(paper.model), paper.model.get_input_embeddings()
    token = paper.model.config.image_token_id
    for row in range(2):
        one = paper.row(pictures, row)
        images = family.images(one)
        whole = family.project([family.encode(images, ()).values([i])[0] for i in range(len(images))])
        ids, image, at, parts, places = one["input_ids"][0].tolist(), 0, 0, list[Tensor](), list[int]()
        spans, column = iter(family.spans(images)), 0
        while column < len(ids):
            if ids[column] != token:
                parts.append(words(torch.tensor(ids[column])))
                places.append(at)
                column, at = column + 1, at + 1
                continue
            for number in next(kept):
                parts.append(whole[image][number])
                places.append(at + number)
            column, at, image = column + next(spans), at + 80, image + 1
        answer = output.sequences[row, length:]
        prompt = torch.cat([torch.stack(parts)[None], words(answer[None, :-1])], 1)
        places += range(at, at + 5)
        chosen = torch.arange(prompt.shape[1]) if positions == "compact" else torch.tensor(places)
        found = torch.stack([step[row] for step in output.logits])
        logits = paper.model(
            inputs_embeds=prompt, position_ids=chosen[None], attention_mask=torch.ones(prompt.shape[:2]).long()
        ).logits[0, len(parts) - 1 :]
        torch.testing.assert_close(found, logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_newlines_stay_with_a_token_of_their_row(stock: Any, picture_of: Picture) -> None:
    """Of 16 + 4 x 8 tokens in rows of eight and a newline: token 16 is the first of row 0, 47 the last of row 3."""
    family = family_of(stock.model)
    images = family.preprocess(stock.processor, [picture_of(0, 112, 56)], mode="pad")
    assert (family.counts(images), family.spans(images)) == ([48], [52])
    for kept, places in (
        ([0, 15], [0, 15]),
        ([16], [16, 24]),
        ([3, 23, 24], [3, 23, 24, 25, 33]),
        ([16, 17, 47], [16, 17, 24, 50, 51]),
    ):
        placed = family.place(images, 0, torch.tensor(kept), torch.zeros(len(kept), 32))
        assert placed.places_X.tolist() == places
        assert [n for n in placed.numbers_X.tolist() if n >= 0] == kept
        newlines = placed.numbers_X == -1
        assert (placed.features_XD[newlines] == stock.model.model.image_newline).all()
        assert not placed.features_XD[~newlines].any()
        spot = Spot(placed.features_XD, placed.places_X, placed.numbers_X, placed.whole, row=0, start=5, length=52)
        assert spot.columns_X.tolist() == [5 + place for place in places]


@torch.no_grad()
def test_what_pruners_are_trained_on_is_tile_upon_tile(stock: Any, picture_of: Picture) -> None:
    family = family_of(stock.model)
    seen = family.untrimmed()
    images = family.preprocess(stock.processor, [picture_of(0, 112, 56), picture_of(1, 100, 100)], mode="pad")
    assert (seen.grids(images), seen.facts.grid) == ([(12, 4), (20, 4)], None)
    states = stock.model.model.vision_tower(images.pixels[1], output_hidden_states=True).hidden_states[2]
    assert torch.equal(seen.encode(images, [2], values=False).tokens(2, [1])[0], states[:, 1:].flatten(0, 1))


def test_images_that_do_not_fit_are_refused(stock: Any, picture_of: Picture) -> None:
    inputs = stock.prompt([[picture_of(0, 100, 100)]])
    with ocvtp.prune(stock.model, "random", 3), torch.no_grad():
        with pytest.raises(BadInput, match="LLaVA-NeXT needs image_sizes beside pixel_values"):
            stock.model(**{**inputs, "image_sizes": None})
        with pytest.raises(BadInput, match=r"pixel_values of shape \[1, 4, 3, 56, 56\] for 1 images of \[5\] tiles"):
            stock.model(**{**inputs, "pixel_values": inputs["pixel_values"][:, :4]})
        with pytest.raises(BadInput, match=r"pruned already: call remove\(\)"):
            paper_mode(stock.model, stock.processor)
    with ocvtp.prune(stock.model, "random", 99) as handle:
        stock.model(**inputs)
    assert [len(kept) for kept in handle.last_kept] == [80]  # all of an image that has fewer
    family = family_of(stock.model)
    cut = family.preprocess(stock.processor, [picture_of(0, 112, 30)], mode="pad")
    with pytest.raises(Incompatible, match="padding is cut off"):
        family.numbers(cut)


def test_modes_that_do_not_exist_are_refused(make_vlm: Callable[..., Any]) -> None:
    vlm = make_vlm("llava_next")
    with pytest.raises(BadInput, match="order is 'rows': flat or spatial is needed"):
        paper_mode(vlm.model, vlm.processor, "rows")  # type: ignore[arg-type]
    vlm.model.config.mm_patch_merge_type = "anyres"
    with pytest.raises(BadInput, match="mm_patch_merge_type is 'anyres': spatial_unpad, spatial, flat are supported"):
        family_of(vlm.model)


def test_maps_say_where_tokens_lie_over_the_image() -> None:
    """In every order of the tokens the patch at a place of the picture is the same."""
    pinpoints = ((12, 24), (24, 12), (24, 24))
    for size in ((24, 24), (10, 24), (30, 13)):
        shapes = {merge: shape_of(size, pinpoints, 12, 3, merge) for merge in MERGES}
        patches = {
            merge: [shape.patches_N[map_.numbers_hw] for map_ in shape.maps()] for merge, shape in shapes.items()
        }
        for maps in patches.values():
            assert maps[0].tolist() == torch.arange(9).view(3, 3).tolist()
        assert torch.equal(patches["flat"][1], patches["spatial"][1])
        tiles, (top, left) = patches["spatial"][1], shapes["spatial_unpad"].layout[1].offset
        height, width = patches["spatial_unpad"][1].shape
        assert torch.equal(patches["spatial_unpad"][1], tiles[top : top + height, left : left + width])
        # Down the left edge of the picture are the first columns of tiles, one below the other.
        assert tiles[:4, 0].tolist() == [9, 12, 15, *([9 + 9 * shapes["flat"].across] if len(tiles) > 3 else [])]
        assert shapes["flat"].maps()[1].ratio == tiles.shape[1] / tiles.shape[0]
        assert shapes["spatial_unpad"].maps()[1].ratio is None
