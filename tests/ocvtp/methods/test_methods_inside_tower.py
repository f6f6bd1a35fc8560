"""Pruned inside the tower: what is kept goes on alone, against a rewrite that runs single tiles of single images."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration

import ocvtp
from ocvtp.efficiency.latency import timed
from ocvtp.errors import BadInput, Incompatible
from ocvtp.vlms import family_of
from ocvtp.vlms.families.llava_next import paper_mode

LAYER, LAST = 2, 4
"""Of five blocks; the LLM is fed from the last but one."""
METHODS: dict[str, dict[str, Any]] = {
    "css": {"layer": LAYER},
    "fps": {"layer": LAYER, "tiles": "together"},
    "oc-vtp-untrained": {"layer": LAYER, "slots": 3},
}
MODES = ["llava", "siglip", "spatial_unpad", "flat", "spatial"]


@pytest.fixture(scope="module", params=MODES)
def case(request: pytest.FixtureRequest, make_vlm: Any, picture_of: Any) -> tuple[Any, list[Any]]:
    """A VLM, and inputs of single images, of several shapes where it has tiles."""
    if request.param == "siglip":
        return siglip(), [{"pixel_values": torch.randn(1, 3, 56, 56)} for _ in range(3)]
    vlm = make_vlm("llava" if request.param == "llava" else "llava_next")
    if request.param in ("flat", "spatial"):
        paper_mode(vlm.model, vlm.processor, request.param)
    pictures = [picture_of(seed, *size) for seed, size in enumerate([(112, 112), (150, 60), (112, 112)])]
    images = [vlm.processor.image_processor(images=[picture], return_tensors="pt") for picture in pictures]
    return vlm.model, [dict(each) for each in images]


def siglip() -> Any:
    """A LLaVA with a tower without CLS."""
    vision = {"model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 5,
              "num_attention_heads": 2, "image_size": 56, "patch_size": 14, "vision_use_head": False}  # fmt: skip
    text = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "vocab_size": 60}  # fmt: skip
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=4, image_seq_length=16,
                         vision_feature_layer=-2, vision_feature_select_strategy="full")  # fmt: skip
    return LlavaForConditionalGeneration(config).eval()


def slowly(model: Any, image: Any, kept: list[int]) -> Tensor:
    """What the LLM reads of the tokens that stay of one image, without newlines, [k, D]."""
    family = family_of(model)
    images = family.images(image)
    (shape,), (tiles_T3HW,) = family.shapes(images), family.tiles(images)
    tower, first = model.model.vision_tower, int(family.facts.cls)
    rows = {}
    for tile, pixels_3HW in enumerate(tiles_T3HW):
        hidden_LC = tower(pixels_3HW[None], output_hidden_states=True).hidden_states[LAYER][0]
        patches = len(hidden_LC) - first
        patches_N = shape.arranged(torch.arange(len(tiles_T3HW) * patches).view(-1, patches)).tolist()
        mine = [number for number in kept if patches_N[number] // patches == tile]
        alone_1lC = hidden_LC[[*range(first), *(first + patches_N[number] % patches for number in mine)]][None]
        for block in tower.encoder.layers[LAYER:LAST]:
            alone_1lC = block(alone_1lC, attention_mask=None)
        rows |= dict(zip(mine, alone_1lC[0, first:], strict=True))
    return model.model.multi_modal_projector(torch.stack([rows[number] for number in kept]))


def together(images: list[Any]) -> dict[str, Tensor]:
    """Images in one batch."""
    if "image_sizes" not in images[0]:
        return {"pixel_values": torch.cat([image["pixel_values"] for image in images])}
    tiles = [image["pixel_values"][0] for image in images]
    pixels = torch.nn.utils.rnn.pad_sequence(tiles, batch_first=True)
    return {"pixel_values": pixels, "image_sizes": torch.cat([image["image_sizes"] for image in images])}


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_kept_tokens_go_on_alone(case: tuple[Any, list[Any]], method: str) -> None:
    model, images = case
    with ocvtp.prune(model, method, 7, **METHODS[method]) as handle:
        after = [handle.embed(image)[0] for image in images]
    with ocvtp.prune(model, method, 7, **METHODS[method], inside_tower=True) as handle:
        inside = [handle.embed(image)[0] for image in images]
        batch = handle.embed(together(images))
    for image, each, whole, row in zip(images, inside, after, batch, strict=True):
        assert each.kept == whole.kept == row.kept
        assert len(each.kept) == 7
        tokens_X = each.numbers_X >= 0
        torch.testing.assert_close(each.features_XD[tokens_X], slowly(model, image, each.kept), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(each.features_XD, row.features_XD, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(each.features_XD, whole.features_XD, atol=1e-3), "they have seen less"
        assert torch.equal(each.positions_PX, whole.positions_PX)


@torch.no_grad()
def test_with_all_tokens_nothing_changes(case: tuple[Any, list[Any]]) -> None:
    model, images = case
    rows = []
    for inside_tower in (False, True):
        with ocvtp.prune(model, "css", 1.0, layer=LAYER, inside_tower=inside_tower) as handle:
            rows.append(handle.embed(together(images)))
    family = family_of(model)
    for image, before, after in zip(images, *rows, strict=True):
        (shape,) = family.shapes(family.images(image))
        if shape.count == shape.tiles * 16:
            torch.testing.assert_close(before.features_XD, after.features_XD, rtol=1e-4, atol=1e-5)
        else:  # padding that is cut off is no token, and does not go on
            assert (shape.count, family.facts.tokens) == (56, None)
            assert not torch.allclose(before.features_XD, after.features_XD, atol=1e-3)


@torch.no_grad()
def test_fewer_than_asked(llava: Any, picture_of: Any) -> None:
    """Slots that choose the same token leave a gap, which is no token."""
    inputs = llava.prompt([[picture_of(seed)] for seed in range(3)])
    with ocvtp.prune(
        llava.model, "oc-vtp-untrained", 9, layer=LAYER, slots=9, fill="none", inside_tower=True
    ) as handle:
        llava.model.generate(**inputs, do_sample=False, max_new_tokens=2)
        kept, rows = handle.last_kept, handle.embed(inputs)
    assert min(map(len, kept)) < 9
    assert [each.kept for each in rows] == kept
    for number, each in enumerate(rows):
        slow_kD = slowly(llava.model, {"pixel_values": inputs["pixel_values"][number : number + 1]}, kept[number])
        torch.testing.assert_close(each.features_XD, slow_kD, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_answers_and_phases(llava: Any, picture_of: Any) -> None:
    """The blocks that follow are time of the tower."""
    inputs = llava.prompt([[picture_of(seed)] for seed in range(2)])
    seen = []
    block = llava.model.model.vision_tower.encoder.layers[LAYER]
    hook = block.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    try:
        with (
            ocvtp.prune(llava.model, "css", 3, layer=LAYER, inside_tower=True) as handle,
            timed(llava.model, torch.device("cpu")) as seconds,
        ):
            answers = llava.model.generate(**inputs, do_sample=False, max_new_tokens=3)
    finally:
        hook.remove()
    assert seen == [(2, 1 + 3, 32)]
    assert [len(kept) for kept in handle.last_kept] == [3, 3]
    assert answers.shape[1] == inputs["input_ids"].shape[1] + 3
    assert all(value > 0 for value in seconds.values())


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "internvl", "llava_onevision", "gemma3"])
def test_other_towers_are_refused(make_vlm: Any, family: str) -> None:
    with pytest.raises(Incompatible, match="css with inside_tower=True needs a tower of CLIP or SigLIP"):
        ocvtp.prune(make_vlm(family).model, "css", 4, layer=LAYER, inside_tower=True)


def test_what_leaves_nothing_to_save_is_refused(llava: Any) -> None:
    with pytest.raises(BadInput, match="qr looks at layer 4 of the tower, and the LLM is fed from layer 4"):
        ocvtp.prune(llava.model, "qr", 4, inside_tower=True)
    with pytest.raises(BadInput, match="css has no inside_tower='yes'"):
        ocvtp.prune(llava.model, "css", 4, layer=LAYER, inside_tower="yes")  # type: ignore[arg-type]
