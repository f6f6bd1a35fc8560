"""Towers: transformers' own hidden states, and attention as transformers computes it, from q and k of one block."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image

from ocvtp.errors import BadInput
from ocvtp.vlms import family_of
from ocvtp.vlms.families.llava import pad_to_square


def test_hidden_states_are_transformers_own_bit_for_bit(llava: Any, picture_of: Callable[..., Image.Image]) -> None:
    family = family_of(llava.model)
    images = family.preprocess(llava.processor, [picture_of(i) for i in range(3)], mode="pad")
    with torch.no_grad():
        whole = llava.model.model.vision_tower(images.pixels, output_hidden_states=True).hidden_states
        vision = family.encode(images, range(6))
    assert len(whole) == 6
    for layer, states in enumerate(whole):
        assert torch.equal(vision.tokens(layer, range(3)), states[:, 1:])
        assert torch.equal(vision.tokens(layer, [2, 0]), states[[2, 0], 1:])
    assert torch.equal(vision.values(range(3)), whole[-2][:, 1:])


def test_projected_values_are_transformers_image_features(llava: Any, picture_of: Callable[..., Image.Image]) -> None:
    family = family_of(llava.model)
    images = family.preprocess(llava.processor, [picture_of(i) for i in range(3)], mode="squash")
    with torch.no_grad():
        whole = llava.model.model.get_image_features(images.pixels, return_dict=True).pooler_output
        projected = family.project(list(family.encode(images, ()).values(range(3))))
    for ours, theirs in zip(projected, whole, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("layers", "values", "blocks"), [([2], False, 2), ([2], True, 4), ([5], True, 5), ([1, 3], False, 3)]
)
def test_the_tower_stops_after_the_deepest_layer(
    llava: Any, picture_of: Callable[..., Image.Image], layers: list[int], values: bool, blocks: int
) -> None:
    family = family_of(llava.model)
    images = family.preprocess(llava.processor, [picture_of(0)], mode="pad")
    ran: list[int] = []
    hooks = [
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
        for i, block in enumerate(llava.model.model.vision_tower.encoder.layers)
    ]
    family.encode(images, layers, values=values)
    for hook in hooks:
        hook.remove()
    assert ran == list(range(blocks))


def test_attention_received_is_what_eager_attention_gives(
    make_vlm: Callable[..., Any], picture_of: Callable[..., Image.Image]
) -> None:
    model, processor, *_ = make_vlm("llava")
    family = family_of(model)
    images = family.preprocess(processor, [picture_of(i) for i in range(3)], mode="pad")
    with torch.no_grad():
        ours = [family.encode(images, [block]).received(block, range(3)) for block in range(5)]
        model.set_attn_implementation({"vision_config": "eager"})
        theirs = model.model.vision_tower(images.pixels, output_attentions=True).attentions
    for block in range(5):
        torch.testing.assert_close(ours[block], theirs[block].mean((1, 2))[:, 1:])


def test_images_are_padded_with_clips_mean_colour() -> None:
    image = Image.new("RGB", (10, 4), (255, 0, 0))
    square = pad_to_square(image, (1, 2, 3))
    assert square.size == (10, 10)
    assert [square.getpixel((5, y)) for y in range(10)] == [(1, 2, 3)] * 3 + [(255, 0, 0)] * 4 + [(1, 2, 3)] * 3
    tall = pad_to_square(Image.new("RGB", (3, 10), (255, 0, 0)), (1, 2, 3))
    assert [tall.getpixel((x, 0)) for x in range(10)] == [(1, 2, 3)] * 3 + [(255, 0, 0)] * 3 + [(1, 2, 3)] * 4


def test_pad_and_squash_are_what_the_processor_makes_of_such_squares(llava: Any) -> None:
    family = family_of(llava.model)
    half = Image.new("RGB", (112, 56), (255, 255, 255))
    padded = family.preprocess(llava.processor, [half], mode="pad").pixels[0]
    mean = torch.tensor(llava.processor.image_processor.image_mean)
    std = torch.tensor(llava.processor.image_processor.image_std)
    white, grey = (1 - mean) / std, ((mean * 255).int() / 255 - mean) / std
    torch.testing.assert_close(padded[:, 28, 28], white, atol=1e-3, rtol=0)
    torch.testing.assert_close(padded[:, 2, 28], grey, atol=1e-3, rtol=0)
    squashed = family.preprocess(llava.processor, [half], mode="squash").pixels[0]
    torch.testing.assert_close(squashed, white[:, None, None].expand(3, 56, 56), atol=1e-3, rtol=0)
    with pytest.raises(BadInput, match="preprocessing 'crop': pad or squash is needed"):
        family.preprocess(llava.processor, [half], mode="crop")


def test_models_that_cannot_be_pruned_are_refused(make_vlm: Callable[..., Any]) -> None:
    with pytest.raises(BadInput, match="this model is a Linear, which cannot be pruned; supported are LlavaFor"):
        family_of(torch.nn.Linear(2, 2))
    model = make_vlm("llava").model
    model.config.vision_feature_select_strategy = "full"
    with pytest.raises(BadInput, match=r"vision_feature_select_strategy is 'full'.*'default' \(no CLS\)"):
        family_of(model)
