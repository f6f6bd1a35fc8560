"""Arguments and calls that cannot be honoured are refused, and named."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import StaticCache

import ocvtp
from ocvtp.errors import BadInput

Picture = Callable[..., Image.Image]
NEW = {"max_new_tokens": 6, "do_sample": False}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "randon", "keep": 5}, "no method 'randon'; did you mean 'random'"),
        ({"method": "random"}, "random needs keep"),
        ({"method": "random", "keep": 17}, "keep is 17, but an image has 16 tokens"),
        ({"method": "random", "keep": 0}, "at least 1 token"),
        ({"method": "random", "keep": 1.5}, r"a share outside \(0, 1\]"),
        ({"method": "random", "keep": 5, "sed": 1}, "random has no option 'sed'"),
        ({"method": "random", "keep": 5, "seed": 0.5}, "seed is 0.5: a whole number"),
        ({"method": "random", "keep": 5, "positions": "dense"}, "positions is 'dense': compact or original"),
        ({"method": "random", "keep": 5, "pruner": "x"}, "random uses no pruner"),
        ({"method": "oc-vtp", "keep": 5}, "oc-vtp needs a trained pruner"),
        ({"method": "oc-vtp", "keep": 5, "pruner": 3}, "pruner is a int: an OCPruner, a folder"),
        ({"method": "oc-vtp-untrained", "keep": 5, "topk": 2}, "no option 'topk'; did you mean 'top_k'"),
    ],
)
def test_bad_arguments_are_named(llava: Any, clean: None, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        ocvtp.prune(llava.model, **arguments)


@torch.no_grad()
def test_calls_that_cannot_be_honoured_are_refused(llava: Any, picture_of: Picture, clean: None) -> None:
    model, inputs = llava.model, llava.prompt([[picture_of(0)]])
    with ocvtp.prune(model, "random", 5):
        for argument, message in (
            ({"prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens: prompt lookup takes guesses .* leave it out"),
            ({"assistant_model": model}, "assistant_model: assisted decoding takes guesses .* leave it out"),
            ({"prefill_chunk_size": 4}, "prefill_chunk_size: an image cannot be chosen from in chunks: leave it out"),
            ({"cache_implementation": "static"}, "='static': a static one is laid out .* or say 'dynamic'"),
            (
                {"past_key_values": StaticCache(model.config.text_config, max_cache_len=64)},
                "not a StaticCache: a static",
            ),
        ):
            with pytest.raises(BadInput, match=message):
                model.generate(**inputs, **NEW, **argument)
        cache = model(**inputs, use_cache=True).past_key_values
        length = inputs["input_ids"].shape[1]
        with pytest.raises(
            BadInput, match=rf"cache stands for {length} columns, but the conversation has {length}, and"
        ):
            model.generate(input_ids=inputs["input_ids"], **NEW, past_key_values=cache)
        with pytest.raises(BadInput, match="goes on from a cache by input_ids alone: give the ids of the whole"):
            model.generate(inputs_embeds=torch.zeros(1, length + 1, 32), **NEW, past_key_values=cache)
        with pytest.raises(BadInput, match=r"2 images of 16 tokens need 32 placeholders .* the prompts have 16"):
            model(**{**inputs, "pixel_values": inputs["pixel_values"].repeat(2, 1, 1, 1)})
        with pytest.raises(BadInput, match="needs input_ids beside images"):
            model(pixel_values=inputs["pixel_values"])
        with pytest.raises(BadInput, match="needs a mask of two dimensions"):
            model(**{**inputs, "attention_mask": torch.ones(1, 1, 4, 4)})
        split = inputs["input_ids"].clone()
        split[0, [1, 20]] = split[0, [20, 1]]
        with pytest.raises(BadInput, match="the 16 placeholders of image 0 do not stand in a row"):
            model(**{**inputs, "input_ids": split})
