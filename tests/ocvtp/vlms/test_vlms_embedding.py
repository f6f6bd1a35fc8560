"""`handle.embed`: rows and positions are those that the language model of a pruned model really reads."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import ocvtp
from ocvtp.errors import BadInput
from ocvtp.methods import Kept, Method
from ocvtp.vlms import family_of

Picture = Callable[..., Image.Image]
KEEP = 3


@pytest.fixture(scope="module")
def images(picture_of: Picture) -> list[list[Image.Image]]:
    return [[picture_of(1, 80, 40), picture_of(2)], [picture_of(3, 30, 90)], [picture_of(8, 200, 100)]]


def read_of(vlm: Any, one: Any, handle: Any) -> tuple[list[bool], Tensor, Tensor, list[Tensor]]:
    """Of one pruned prompt in front of the language model: which columns are images', embeddings [S, D], positions
    [P, S], and DeepStack's planes."""
    seen: dict[str, Any] = {}
    hook = vlm.model.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    vlm.model(**one)
    hook.remove()
    marks = family_of(vlm.model).stands_for(one["input_ids"])[0]
    flags = marks[handle.last_columns[0]].tolist()
    places = seen["position_ids"]
    places_PS = places[-3:, 0] if places.ndim == 3 else places[:1]
    return flags, seen["inputs_embeds"][0], places_PS, seen.get("deepstack_visual_embeds") or []


@pytest.mark.parametrize("positions", ["compact", "original"])
@torch.no_grad()
def test_it_is_what_the_language_model_reads(vlm: Any, images: Any, positions: str) -> None:
    batch = vlm.prompt(images)
    with ocvtp.prune(vlm.model, "random", KEEP, positions=positions) as handle:
        together = iter(handle.embed(batch))
        for row in range(len(images)):
            one = vlm.row(images, row)
            flags, embeddings_SD, places_PS, planes = read_of(vlm, one, handle)
            found = handle.embed(one)
            assert [each.kept for each in found] == handle.last_kept
            assert all(len(each.kept) == KEEP and each.numbers_X.device.type == "cpu" for each in found)
            marks = torch.tensor(flags)
            assert torch.equal(torch.cat([each.features_XD for each in found]), embeddings_SD[marks])
            if planes:
                assert torch.equal(torch.cat([each.planes_SXD for each in found], 1), torch.stack(planes))
            else:
                assert all(len(each.planes_SXD) == 0 for each in found)
            assert torch.equal(numbered(flags, found), places_PS)
            for each in found:
                batched = next(together)
                assert batched.kept == each.kept
                assert torch.equal(batched.positions_PX, each.positions_PX)
                torch.testing.assert_close(batched.features_XD, each.features_XD, atol=1e-5, rtol=1e-5)
    assert next(together, None) is None


def numbered(flags: list[bool], found: list[Any]) -> Tensor:
    """Positions of a prompt, from what is said of its images alone."""
    columns, at, images = list[Tensor](), 0, iter(found)
    column = 0
    while column < len(flags):
        if not flags[column]:
            columns.append(torch.full((len(found[0].positions_PX), 1), at))
            at, column = at + 1, column + 1
            continue
        image = next(images)
        columns.append(image.positions_PX + at)
        at, column = at + image.span, column + image.positions_PX.shape[1]
    return torch.cat(columns, 1)


@torch.no_grad()
def test_methods_that_read_the_prompt_get_it(llava: Any, picture_of: Picture) -> None:
    inputs = llava.prompt([[picture_of(0)], [picture_of(1)]])
    prompts = [row[row != 0].tolist() for row in inputs["input_ids"]]
    texts = [[token for token in row if token != 4] for row in prompts]

    class Reading(Method):
        needs_text = True
        seen: list[list[int]]

        def choose(self, encoded: Any) -> Any:
            self.seen = encoded.prompts
            return Kept(torch.arange(encoded.keep).expand(len(encoded.members), -1))

    reading = Reading()
    with ocvtp.prune(llava.model, reading, KEEP) as handle:
        whole = handle.embed(inputs)
        assert reading.seen == texts
        again = handle.embed(inputs["pixel_values"], prompts)
        assert reading.seen == texts
        assert torch.equal(whole[1].features_XD, again[1].features_XD)
        with pytest.raises(BadInput, match="reads the prompt"):
            handle.embed(inputs["pixel_values"])
        with pytest.raises(BadInput, match="1 entries for 2 images"):
            handle.embed(inputs, texts[:1])
        with pytest.raises(BadInput, match="no list of token ids"):
            handle.embed(inputs, ["what is this", "and this"])


@torch.no_grad()
def test_what_cannot_be_handed_over_is_refused(llava: Any, picture_of: Picture) -> None:
    inputs = llava.prompt([[picture_of(0)]])
    for method, why in (("fastv", "inside the LLM"), ("visionzip+fastv", "inside the LLM"), ("vanilla", "get_image_f")):
        with ocvtp.prune(llava.model, method, 8) as handle, pytest.raises(BadInput, match=why):
            handle.embed(inputs)
    with ocvtp.prune(llava.model, "random", 8) as handle:
        for wrong, why in (
            ([picture_of(0)], "what the model's processor made"),
            ({"input_ids": inputs["input_ids"]}, "no pixel_values"),
            ({**inputs, "pixel_values_videos": inputs["pixel_values"]}, "pixel_values_videos"),
        ):
            with pytest.raises(BadInput, match=why):
                handle.embed(wrong)


@torch.no_grad()
def test_pixels_that_no_processor_makes_are_refused(vlm: Any, picture_of: Picture) -> None:
    inputs = dict(vlm.prompt([[picture_of(0)]]))
    pixels = inputs["pixel_values"]
    shape = family_of(vlm.model).pixel_shape
    assert shape is not None
    assert len(shape) == pixels.ndim
    with ocvtp.prune(vlm.model, "random", 3) as handle:
        for wrong, why in (
            (pixels[:0], r"is of shape \[0, .*: one image at least is needed"),
            (pixels[0], r"is of shape \[.*: \[any, .*\] is needed"),
            (pixels[..., :-1], r"is of shape \[.*: \[any, .*\] is needed"),
            (pixels.numpy(), r"is a numpy.ndarray: a tensor is needed"),
            (pixels.to(torch.uint8), r"is of torch.uint8: the numbers .* are floating"),
        ):
            with pytest.raises(BadInput, match=f"pixel_values {why}"):
                handle.embed({**inputs, "pixel_values": wrong})
        handle.embed(inputs)


@torch.no_grad()
def test_four_channels_and_what_are_no_prompts_are_refused(llava: Any, picture_of: Picture) -> None:
    inputs = llava.prompt([[picture_of(0)], [picture_of(1)], [picture_of(2)]])
    pixels = inputs["pixel_values"]
    ids = [1, 2]
    with ocvtp.prune(llava.model, "random", 8) as handle:
        with pytest.raises(BadInput, match=r"is of shape \[3, 4, .*: \[any, 3, "):
            handle.embed(torch.cat([pixels, pixels[:, :1]], 1))
        for prompts, why in (
            (5, "prompts is a int: token ids for each of 3 images are needed"),
            ("abc", "prompts is a str: token ids"),
            (torch.tensor(5), "prompts is a Tensor: token ids"),
            ([None] * 3, "prompt 0 is no list of token ids"),
            ([ids, ids, [1.0]], "prompt 2 is no list of token ids"),
            ([ids, ids, [True]], "prompt 2 is no list of token ids"),
            ([ids, [1, -1], ids], "prompt 1 has token ids outside 0 to "),
            ([ids, [1, 10**6], ids], "prompt 1 has token ids outside 0 to "),
        ):
            with pytest.raises(BadInput, match=why):
                handle.embed(pixels, prompts)
        assert len(handle.embed(pixels, torch.tensor([ids] * 3))) == 3
