"""Choices without training as methods: the functions of `ocvtp.selection`, on the layer asked for, tile by tile."""

from typing import Any

import pytest
import torch

import ocvtp
from ocvtp.errors import BadInput
from ocvtp.methods import entry_of
from ocvtp.methods.selections import ENTRIES, Selection
from ocvtp.methods.tiles import share_evenly
from ocvtp.selection import CHOICES, css

NAMES = [entry.name for entry in ENTRIES]


def test_every_choice_is_a_method() -> None:
    assert list(CHOICES) == NAMES
    assert [entry_of(name) for name in NAMES] == list(ENTRIES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("where", ["square", "wide", "tiles", "cut"])
def test_each_tile_has_its_share(tools: Any, name: str, where: str) -> None:
    layout = tools.layouts[where]
    vision, tiles = tools.numbers(layout), tools.owners(layout)
    for keep in (1, 3, 7, vision.count // 2, vision.count):
        found, _ = tools.choose(Selection(name, tools.facts, 2, "even"), vision, keep)
        tokens = vision.tokens(2, [0, 1, 2])
        for image, row in enumerate(found.tolist()):
            expected = []
            for tile, share in zip(tiles, share_evenly(keep, [len(tile) for tile in tiles]), strict=True):
                if share:
                    expected += [tile[n] for n in CHOICES[name](tokens[image, tile][None], share)[0].tolist()]
            assert row == sorted(expected)
            assert len({*row}) == keep


@pytest.mark.parametrize("name", NAMES)
def test_how_tiles_share(tools: Any, name: str) -> None:
    vision = tools.numbers(tools.layouts["tiles"])
    tokens = vision.tokens(2, [0, 1, 2])
    together, _ = tools.choose(Selection(name, tools.facts, 2, "together"), vision, 8)
    assert torch.equal(together, CHOICES[name](tokens, 8))
    floor, _ = tools.choose(Selection(name, tools.facts, 2, "floor"), vision, 9)
    assert (floor >= 0).sum(1).tolist() == [5] * 3  # one for each of five tiles
    none, _ = tools.choose(Selection(name, tools.facts, 2, "floor"), vision, 3)
    assert none.shape == (3, 0)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_the_layer_asked_for_chooses(llava: Any, picture_of: Any, name: str) -> None:
    inputs = llava.prompt([[picture_of(3)], [picture_of(4)]])
    for layer in (2, 4, -1):
        with ocvtp.prune(llava.model, name, 5, layer=layer) as handle:
            llava.model(**inputs)
            found = handle.last_kept
        states = llava.model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
        assert found == CHOICES[name](states[layer][:, 1:], 5).tolist()
    assert entry_of(name).options["layer"] == (-2 if name in ("qr", "css") else 9)
    with pytest.raises(BadInput, match="layer 9 is outside"):
        ocvtp.prune(llava.model, name, 5, layer=9)
    with pytest.raises(BadInput, match=f"{name} uses no pruner"):
        ocvtp.prune(llava.model, name, 5, pruner="there")
    with pytest.raises(BadInput, match=f"{name} has no tiles='odd'"):
        ocvtp.prune(llava.model, name, 5, layer=2, tiles="odd")


@torch.no_grad()
def test_css_keeps_its_distance_in_another_layer(llava: Any, picture_of: Any) -> None:
    inputs = llava.prompt([[picture_of(3)], [picture_of(4)]])
    with ocvtp.prune(llava.model, "css", 5, layer=-1, spread=2, spread_layer=2) as handle:
        llava.model(**inputs)
        found = handle.last_kept
    states = llava.model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
    assert found == css(states[-1][:, 1:], 5, spread=2, apart=states[2][:, 1:]).tolist()
    assert found != css(states[-1][:, 1:], 5).tolist()
    with pytest.raises(BadInput, match="layer 9 is outside"):
        ocvtp.prune(llava.model, "css", 5, layer=2, spread=1)
    with pytest.raises(BadInput, match="css has no spread=-1"):
        ocvtp.prune(llava.model, "css", 5, layer=2, spread=-1)
