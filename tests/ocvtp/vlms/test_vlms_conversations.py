"""Every family: decoding by hand, and conversations that go on from a cache of pruned prompts."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vlms_expected import (
    KEEP,
    NEW,
    Picture,
    prune,
)

from ocvtp.vlms import family_of

pytestmark = pytest.mark.usefixtures("clean")


@torch.no_grad()
def test_decoding_by_hand_follows_generate(vlm: Any, batch: Any) -> None:
    mask = batch["attention_mask"]
    with prune(vlm, "random", KEEP):
        expected = vlm.model.generate(**batch, **NEW)[:, mask.shape[1] :]
        uncached = vlm.model.generate(**batch, **NEW, use_cache=False)[:, mask.shape[1] :]
        output, found = vlm.model(**batch, use_cache=True), list[Tensor]()
        for step in range(6):
            output.logits[:, -1, vlm.model.generation_config.suppress_tokens] = -torch.inf
            found.append(output.logits[:, -1].argmax(1))
            more = torch.nn.functional.pad(mask, (0, step + 1), value=1)
            cache = output.past_key_values
            output = vlm.model(input_ids=found[-1][:, None], past_key_values=cache, attention_mask=more)
    assert torch.equal(torch.stack(found, 1), expected)
    assert torch.equal(uncached, expected)


# Not Gemma 3, where transformers itself reads a second image otherwise after a cache than in one prompt; not OneVision,
# which cuts an image into tiles by whether it is alone, as a later turn cannot tell.
@pytest.mark.parametrize("vlm", ["llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "internvl", "smolvlm"], indirect=True)
@pytest.mark.parametrize("positions", ["compact", "original"])
@torch.no_grad()
def test_a_second_image_joins_a_conversation(vlm: Any, picture_of: Picture, positions: str) -> None:
    """In a later call, on the cache of the first: as if both had been there from the start."""
    inputs = vlm.prompt([[picture_of(0, 130, 70), picture_of(1, 60, 110)]])
    family, word = family_of(vlm.model), torch.tensor([[7]])
    both = family.images(inputs)
    (_, start, length), _ = family.find(inputs["input_ids"], both)
    cut = start + length
    turns = []
    for number, columns in enumerate((slice(0, cut), slice(cut, None))):
        turn = {name: inputs[name][:, columns] for name in ("input_ids", *family.column_inputs) if name in inputs}
        for name in ("image_sizes", "image_grid_thw"):
            if name in inputs:
                turn[name] = inputs[name][number : number + 1]
        pixels = family.pixels_of(both, number)
        turns.append(turn | {"pixel_values": pixels if pixels.ndim == inputs["pixel_values"].ndim else pixels[None]})
    with prune(vlm, "random", KEEP, positions=positions) as handle:
        whole = vlm.model(**inputs, use_cache=True)
        kept = handle.last_kept
        cache = vlm.model(**turns[0], use_cache=True).past_key_values
        first = handle.last_kept
        parts = vlm.model(**turns[1], past_key_values=cache)
        assert [*first, *handle.last_kept] == kept
        after = vlm.model(input_ids=word, past_key_values=parts.past_key_values).logits
        expected = vlm.model(input_ids=word, past_key_values=whole.past_key_values).logits
    torch.testing.assert_close(parts.logits, whole.logits[:, -parts.logits.shape[1] :], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(after, expected, atol=1e-4, rtol=1e-4)


def said_next(vlm: Any, so_far: Tensor, mask: Tensor, words: Tensor) -> dict[str, Tensor]:
    """Ids and mask of a conversation after what was answered, and then these words."""
    answered = so_far.shape[1] - mask.shape[1]
    more = torch.ones(len(mask), answered + len(words), dtype=mask.dtype)
    ids = torch.cat([so_far, words.expand(len(mask), -1)], 1)
    return {"input_ids": ids, "attention_mask": torch.cat([mask, more], 1)}


def padded(vlm: Any, inputs: Any, length: int) -> dict[str, Tensor]:
    """What of a prompt has an entry a column, for one that has become longer by words."""
    columns = family_of(vlm.model).column_inputs
    return {
        name: nn.functional.pad(inputs[name], (0, length - inputs[name].shape[1]), value=filler)
        for name, filler in columns.items()
        if name in inputs
    }


@torch.no_grad()
def test_a_conversation_goes_on_by_generate(vlm: Any, picture_of: Picture) -> None:
    """Three turns on one cache say what the same conversation says anew each time."""
    inputs = vlm.prompt([[picture_of(0, 130, 70), picture_of(1, 60, 110)], [picture_of(2, 90, 90)], []])
    words = [torch.tensor([9, 12, 8]), torch.tensor([11, 7])]
    with prune(vlm, "random", KEEP) as handle:
        out = vlm.model.generate(**inputs, **NEW, return_dict_in_generate=True)
        kept, turn = handle.last_kept, inputs
        for said in words:
            turn = said_next(vlm, out.sequences, turn["attention_mask"], said)
            out = vlm.model.generate(
                **turn, **NEW, past_key_values=out.past_key_values, return_dict_in_generate=True, output_logits=True
            )
            length = turn["input_ids"].shape[1]
            anew = vlm.model.generate(
                **{**inputs, **padded(vlm, inputs, length), **turn}, **NEW, return_dict_in_generate=True,
                output_logits=True,
            )  # fmt: skip
            assert handle.last_kept == kept
            assert torch.equal(out.sequences, anew.sequences)
            torch.testing.assert_close(torch.stack(out.logits), torch.stack(anew.logits), atol=1e-4, rtol=1e-4)
        # Given the new columns alone, beside the mask of all of them, the answer is the same.
        turn = said_next(vlm, out.sequences, turn["attention_mask"], words[0])
        cache, new = copy.deepcopy(out.past_key_values), 1 + len(words[0])
        whole = vlm.model.generate(**turn, **NEW, past_key_values=out.past_key_values)
        short = vlm.model.generate(**{**turn, "input_ids": turn["input_ids"][:, -new:]}, **NEW, past_key_values=cache)
        assert torch.equal(short[:, new:], whole[:, turn["input_ids"].shape[1] :])


@pytest.mark.parametrize("vlm", ["llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "internvl", "smolvlm"], indirect=True)
@pytest.mark.parametrize("first", ["an image", "words"])
@torch.no_grad()
def test_an_image_joins_a_conversation_by_generate(vlm: Any, picture_of: Picture, first: str) -> None:
    """The image and the ids of the whole conversation, on a cache that was filled by a prompt with an image, or by
    words alone."""
    pictures = [[picture_of(0, 130, 70)] if first == "an image" else []]
    opening, next_one = vlm.prompt(pictures, ["what is this ?"]), vlm.prompt([[picture_of(1, 60, 110)]], ["red"])
    with prune(vlm, "random", KEEP) as handle:
        out = vlm.model.generate(**opening, **NEW, return_dict_in_generate=True)
        before, kept = opening["input_ids"].shape[1], handle.last_kept
        turn = said_next(vlm, out.sequences, opening["attention_mask"], next_one["input_ids"][0])
        columns = {
            name: torch.cat([padded(vlm, opening, out.sequences.shape[1])[name], next_one[name]], 1)
            for name in family_of(vlm.model).column_inputs
        }
        new = {name: value for name, value in next_one.items() if name not in ("input_ids", "attention_mask", *columns)}
        found = vlm.model.generate(**turn, **columns, **new, **NEW, past_key_values=out.past_key_values)
        kept = [*kept, *handle.last_kept]
        both = {
            name: torch.cat([opening[name], value], 1 if vlm.kind == "smolvlm" else 0) if name in opening else value
            for name, value in new.items()
        }
        expected = vlm.model.generate(**turn, **columns, **both, **NEW)
        assert handle.last_kept == kept
    assert before < len(out.sequences[0]) < len(found[0])
    assert torch.equal(found, expected)
