"""Prompts that grow shorter inside the language model: in any batch, in every way to generate, and off again."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import DynamicCache

import ocvtp
from ocvtp.errors import BadInput, Incompatible

Picture = Callable[..., Image.Image]
METHODS = ("fastv", "sparsevlm", "sparsevlm-plus", "pyramiddrop", "dart", "autoprune", "vscan", "random+pyramiddrop")
NEW = {"max_new_tokens": 5, "do_sample": False}


@pytest.fixture
def images(picture_of: Picture) -> list[list[Image.Image]]:
    """Eight ragged prompts: none, one, two and three images, of several sizes."""
    sizes = [
        [(112, 112)], [(140, 84), (112, 112)], [], [(84, 168)], [(120, 120)], [(112, 112), (90, 200), (168, 84)],
        [(200, 100)], [],
    ]  # fmt: skip
    return [[picture_of(5 * row + i, *size) for i, size in enumerate(each)] for row, each in enumerate(sizes)]


@pytest.fixture
def short(picture_of: Picture) -> list[list[Image.Image]]:
    return [[picture_of(0, 112, 112)], [], [picture_of(1, 140, 84), picture_of(2, 112, 112)]]


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# --- What is computed ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_keeping_everything_changes_nothing(vlm: Any, images: Any, method: str) -> None:
    model, inputs = vlm.model, vlm.prompt(images)
    logits, answer = model(**inputs).logits, model.generate(**inputs, **NEW)
    real = inputs["attention_mask"].bool()
    for keep in (1.0, "100%"):
        with ocvtp.prune(model, method, keep) as handle:
            pruned = model(**inputs).logits
            torch.testing.assert_close(pruned[real], logits[real], atol=1e-5, rtol=1e-5)
            assert torch.equal(model.generate(**inputs, **NEW), answer)
            counts = [len(kept) for kept in handle.last_kept]
            assert handle.last_kept == [list(range(count)) for count in counts]
            assert len(counts) == 9


@torch.no_grad()
def test_a_batch_is_what_its_rows_are_alone(vlm: Any, images: Any, method: str) -> None:
    model, inputs = vlm.model, vlm.prompt(images)
    length = inputs["input_ids"].shape[1]
    with ocvtp.prune(model, method, 0.5) as handle:
        together = model.generate(**inputs, **NEW)[:, length:]
        kept, layers = handle.last_kept, handle.last_layers
        alone, alone_layers = [], [list[int]() for _ in layers]
        for row in range(8):
            one = vlm.row(images, row)
            answer = model.generate(**one, **NEW)[:, one["input_ids"].shape[1] :]
            assert torch.equal(answer[0], together[row]), row
            alone += handle.last_kept
            for found, layer in zip(alone_layers, handle.last_layers, strict=True):
                found += layer
        assert (alone, alone_layers) == (kept, layers)
    assert all(layers[0][i] > layers[-1][i] for i in range(9))


@torch.no_grad()
def test_attention_implementations_keep_the_same(make_vlm: Any, images: Any, method: str) -> None:
    vlm = make_vlm("llava")
    inputs, kept, answers = vlm.prompt(images), [], []
    for name in ("sdpa", "eager"):
        vlm.model.set_attn_implementation(name)
        assert vlm.model.get_decoder().config._attn_implementation == name
        with ocvtp.prune(vlm.model, method, 8) as handle:
            answers.append(vlm.model.generate(**inputs, **NEW))
            kept.append(handle.last_kept)
    assert kept[0] == kept[1]
    assert torch.equal(answers[0], answers[1])


@torch.no_grad()
def test_bfloat16_works(make_vlm: Any, images: Any, method: str) -> None:
    vlm = make_vlm("llava")
    inputs, model = vlm.prompt(images), vlm.model.to(torch.bfloat16)
    with ocvtp.prune(model, method, 8) as handle:
        logits = model(**inputs).logits
        assert logits.dtype == torch.bfloat16
        assert bool(logits.isfinite().all())
        assert all(len(kept) < 16 for kept in handle.last_kept)
        assert all(0 < count < 16 for count in handle.last_layers[-1])


@torch.no_grad()
def test_padding_on_the_right_works_in_forward(vlm: Any, images: Any, method: str) -> None:
    model, left, tokenizer = vlm.model, vlm.prompt(images), vlm.processor.tokenizer
    tokenizer.padding_side = "right"
    try:
        right = vlm.prompt(images)
    finally:
        tokenizer.padding_side = "left"
    with ocvtp.prune(model, method, 0.5) as handle:
        first, kept, columns = model(**left).logits, handle.last_kept, handle.last_columns
        second = model(**right).logits
        assert handle.last_kept == kept
        assert bool((handle.last_columns[:, 0] == 0).all())
    for row, real_S in enumerate(columns >= 0):
        count = int((real_S & (left["attention_mask"][row].gather(0, columns[row].clamp(min=0)) == 1)).sum())
        torch.testing.assert_close(second[row, :count], first[row, -count:], atol=1e-4, rtol=1e-4)


def test_labels_are_cut_like_the_prompts_and_teach(llava: Any, picture_of: Picture, method: str) -> None:
    model, inputs = llava.model, llava.prompt([[picture_of(0)], [picture_of(1)]])
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] < 5, -100)
    with ocvtp.prune(model, method, 8) as handle:
        output = model(**inputs, labels=labels)
        columns = handle.last_columns
    total, count = torch.zeros(()), 0
    for row in range(2):
        for at in range(1, columns.shape[1]):
            label = int(labels[row, columns[row, at]]) if columns[row, at] >= 0 else -100
            if label >= 0:
                total, count = total - output.logits[row, at - 1].log_softmax(0)[label], count + 1
    assert count == 4 + 9
    torch.testing.assert_close(output.loss, total / count)
    output.loss.backward()
    assert float(model.get_decoder().layers[-1].mlp.up_proj.weight.grad.abs().sum()) > 0
    model.zero_grad(set_to_none=True)


@torch.no_grad()
def test_answers_in_a_prompt_do_not_ask(llava: Any, picture_of: Picture) -> None:
    """With labels, tokens are ranked by those right before the answers, so that answers are no help."""
    model, kept = llava.model, []
    start = llava.prompt([[picture_of(0)]])
    length = start["input_ids"].shape[1]
    with ocvtp.prune(model, "pyramiddrop", 8) as handle:
        model(**start)
        kept.append(handle.last_kept)
        for answer in ([6, 7], [14, 9]):
            ids = torch.cat([start["input_ids"], torch.tensor([answer])], 1)
            labels = ids.clone()
            labels[:, :length] = -100
            model(input_ids=ids, pixel_values=start["pixel_values"], labels=labels)
            kept.append(handle.last_kept)
    assert kept[0] == kept[1] == kept[2]


# --- Ways to generate ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_ways_to_generate_agree(vlm: Any, images: Any, method: str) -> None:
    """Without a cache everything is computed anew at each step, so that masks and positions of the cache are tested."""
    model, inputs = vlm.model, vlm.prompt(images)
    length = inputs["input_ids"].shape[1]
    beams = {**NEW, "num_beams": 3, "num_return_sequences": 2}
    with ocvtp.prune(model, method, 0.5) as handle:
        greedy, kept = model.generate(**inputs, **NEW), handle.last_kept
        assert torch.equal(model.generate(**inputs, **NEW, use_cache=False), greedy)
        drawn = model.generate(**inputs, max_new_tokens=5, do_sample=True, top_k=1, num_return_sequences=2)
        assert torch.equal(drawn, greedy.repeat_interleave(2, 0))
        found = model.generate(**inputs, **beams)
        assert handle.last_kept == kept
        assert torch.equal(model.generate(**inputs, **beams, use_cache=False), found)
        one = vlm.row(images, 5)
        alone = model.generate(**one, **beams)[:, one["input_ids"].shape[1] :]
    assert torch.equal(alone, found[10:12, length:])
    assert len({tuple(row) for row in found[:, length:].tolist()}) > 8


@torch.no_grad()
def test_decoding_by_hand_follows_generate(vlm: Any, short: Any, method: str) -> None:
    model, inputs = vlm.model, vlm.prompt(short)
    mask = inputs["attention_mask"]
    with ocvtp.prune(model, method, 0.5):
        expected = model.generate(**inputs, **NEW)[:, mask.shape[1] :]
        for given in (True, False):  # a mask of the whole, or none, for all that follows is there
            output, found = model(**inputs, use_cache=True), list[Tensor]()
            for step in range(5):
                output.logits[:, -1, vlm.model.generation_config.suppress_tokens] = -torch.inf
                found.append(output.logits[:, -1].argmax(1))
                more = {"attention_mask": torch.nn.functional.pad(mask, (0, step + 1), value=1)} if given else {}
                output = model(input_ids=found[-1][:, None], past_key_values=output.past_key_values, **more)
            assert torch.equal(torch.stack(found, 1), expected)


@pytest.mark.parametrize("method", ["fastv", "random+pyramiddrop"])
@torch.no_grad()
def test_a_conversation_goes_on_by_generate(vlm: Any, short: Any, method: str) -> None:
    """As by hand, one word after the other."""
    model, inputs = vlm.model, vlm.prompt(short)
    mask, words = inputs["attention_mask"], torch.tensor([[9, 12, 8]]).expand(3, -1)
    with ocvtp.prune(model, method, 0.5):
        out = model.generate(**inputs, **NEW, return_dict_in_generate=True)
        cache, said = copy.deepcopy(out.past_key_values), torch.cat([out.sequences, words], 1)
        turn = {"input_ids": said, "attention_mask": torch.nn.functional.pad(mask, (0, 8), value=1)}
        answer = model.generate(**turn, **NEW, past_key_values=out.past_key_values)[:, said.shape[1] :]
        found, new = list[Tensor](), said[:, -4:]  # the last word of an answer is not in the cache yet
        for _ in range(5):
            logits = model(input_ids=new, past_key_values=cache).logits[:, -1]
            logits[:, vlm.model.generation_config.suppress_tokens] = -torch.inf
            new = logits.argmax(1)[:, None]
            found.append(new)
    assert torch.equal(answer, torch.cat(found, 1))


@torch.no_grad()
def test_several_tokens_at_once_are_as_one_by_one(vlm: Any, short: Any, method: str) -> None:
    model, inputs = vlm.model, vlm.prompt(short)
    words = torch.tensor([[7, 8, 9], [10, 5, 6], [12, 13, 7]])
    with ocvtp.prune(model, method, 0.5):
        cache = model(**inputs, use_cache=True).past_key_values
        copied = copy.deepcopy(cache)
        together = model(input_ids=words, past_key_values=cache).logits
        single = [model(input_ids=words[:, i : i + 1], past_key_values=copied).logits for i in range(3)]
    torch.testing.assert_close(together, torch.cat(single, 1), atol=1e-4, rtol=1e-4)
    assert [cache.get_seq_length(layer) for layer in range(4)] == [copied.get_seq_length(layer) for layer in range(4)]


@torch.no_grad()
def test_a_cache_can_be_cropped_by_tokens_only(llava: Any, short: Any, method: str) -> None:
    model, inputs = llava.model, llava.prompt(short)
    word = torch.tensor([[7], [8], [9]])
    with ocvtp.prune(model, method, 8):
        cache = model(**inputs, use_cache=True).past_key_values
        whole = cache.get_seq_length()
        first = model(input_ids=word, past_key_values=cache).logits
        cache.crop(-1)
        torch.testing.assert_close(model(input_ids=word, past_key_values=cache).logits, first)
        for layer in cache.layers[:1]:  # as if cropped to the length of the first layer
            layer.crop(-1)
        assert cache.get_seq_length() == whole
        with pytest.raises(BadInput, match="layers hold different numbers of tokens"):
            model(input_ids=word, past_key_values=cache)


@torch.no_grad()
def test_a_second_image_joins_a_conversation(vlm: Any, picture_of: Picture, method: str) -> None:
    """The second part is ranked with the first in the cache; keeping all, nothing changes."""
    model = vlm.model
    one, two = vlm.prompt([[picture_of(0, 112, 112)]]), vlm.prompt([[picture_of(1, 112, 112)]])
    word = torch.tensor([[7]])

    def talk(mask: bool) -> tuple[Tensor, Tensor, Any]:
        cache = model(**one, use_cache=True).past_key_values
        masks = {} if not mask else {"attention_mask": torch.cat([one["attention_mask"], two["attention_mask"]], 1)}
        more = {**two, **masks}
        if not mask:
            del more["attention_mask"]
        second = model(**more, past_key_values=cache)
        return second.logits, model(input_ids=word, past_key_values=cache).logits, cache

    if "image_grid_thw" not in one:  # a stock Qwen2.5-VL takes images at the start of a cache only
        plain = talk(mask=True)
        with ocvtp.prune(model, method, 1.0):
            for found, expected in zip(talk(mask=True)[:2], plain[:2], strict=True):
                torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    with ocvtp.prune(model, method, 0.5) as handle:
        first = talk(mask=True)
        kept = handle.last_kept
        second = talk(mask=False)
        assert handle.last_kept == kept
    torch.testing.assert_close(first[:2], second[:2], atol=1e-5, rtol=1e-5)
    lengths = [first[2].get_seq_length(layer) for layer in range(4)]
    assert lengths == sorted(lengths, reverse=True) != [lengths[0]] * 4


# --- On, off and beside each other -----------------------------------------------------------------------------------


@torch.no_grad()
def test_two_pruned_models_and_a_plain_one_live_side_by_side(make_vlm: Callable[..., Any], short: Any) -> None:
    one, two, plain = (make_vlm("llava", seed) for seed in (1, 2, 1))
    inputs = one.prompt(short)
    expected = plain.model.generate(**inputs, **NEW)
    weights = {name: value.clone() for name, value in one.model.state_dict().items()}
    with ocvtp.prune(one.model, "sparsevlm", 8) as first:
        alone = one.model.generate(**inputs, **NEW)
        kept = first.last_kept
        with ocvtp.prune(two.model, "pyramiddrop", 6) as second:
            two.model.generate(**inputs, **NEW)
            assert torch.equal(one.model.generate(**inputs, **NEW), alone)
            assert first.last_kept == kept != second.last_kept
            assert torch.equal(plain.model.generate(**inputs, **NEW), expected)
    assert not torch.equal(alone, expected)
    assert torch.equal(one.model.generate(**inputs, **NEW), expected)
    assert set(one.model.__dict__) == set(plain.model.__dict__)
    assert hooks_of(one.model) == hooks_of(plain.model)
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, weights[name])


def hooks_of(model: Any) -> list[tuple[str, int, int]]:
    """Of each module. Some are transformers' own."""
    return [(name, len(m._forward_pre_hooks), len(m._forward_hooks)) for name, m in model.named_modules()]


@torch.no_grad()
def test_an_exception_inside_leaves_the_handle_usable(llava: Any, short: Any, method: str) -> None:
    model, inputs = llava.model, llava.prompt(short)

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("stop here")

    with ocvtp.prune(model, method, 8) as handle:
        expected = model.generate(**inputs, **NEW)
        layer = model.get_decoder().layers[2]
        hook = layer.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="stop here"):
            model.generate(**inputs, **NEW)
        hook.remove()
        text = {"input_ids": torch.tensor([[1, 5, 6]])}
        assert model(**text).logits.shape[1] == 3
        assert (handle.last_kept, handle.last_layers) == ([], [[]] * 4)
        assert torch.equal(model.generate(**inputs, **NEW), expected)


@torch.no_grad()
def test_a_cache_goes_on_with_the_same_kind_of_method_only(llava: Any, picture_of: Picture) -> None:
    model, inputs, word = llava.model, llava.prompt([[picture_of(0)]]), torch.tensor([[7]])
    with ocvtp.prune(model, "fastv", 8):
        cache = model(**inputs, use_cache=True).past_key_values
    with ocvtp.prune(model, "random", 8), pytest.raises(BadInput, match="filled by a method inside the LLM"):
        model(input_ids=word, past_key_values=cache)


# --- What is refused -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_calls_that_cannot_be_honoured_are_refused(llava: Any, picture_of: Picture, method: str) -> None:
    model, inputs = llava.model, llava.prompt([[picture_of(0)]])
    with ocvtp.prune(model, method, 8):
        for argument, message in (
            ({"prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens: prompt lookup"),
            ({"assistant_model": model}, "assistant_model"),
            ({"prefill_chunk_size": 4}, "prefill_chunk_size: an image cannot be chosen from in chunks"),
            ({"cache_implementation": "static"}, "needs a dynamic cache, not cache_implementation='static'"),
        ):
            with pytest.raises(BadInput, match=message):
                model.generate(**inputs, **NEW, **argument)
        model.train()
        model.gradient_checkpointing_enable()
        try:
            with pytest.raises(BadInput, match=r"call gradient_checkpointing_disable\(\)"):
                model(**inputs)
        finally:
            model.gradient_checkpointing_disable()
            model.eval()
        cache = model(**inputs, use_cache=True).past_key_values
        with pytest.raises(BadInput, match=r"the cache stands for (\d+) columns, but the conversation has \1"):
            model.generate(**inputs, **NEW, past_key_values=cache)
    assert not {"generate", "forward", "_ocvtp_handle"} & set(model.__dict__)


def test_nothing_is_computed_before_a_refusal(make_vlm: Callable[..., Any], picture_of: Picture) -> None:
    vlm = make_vlm("qwen2_5_vl")
    inputs, ran = vlm.prompt([[picture_of(0, 112, 112)], [picture_of(1, 56, 56)]]), list[int]()
    vlm.model.model.visual.register_forward_pre_hook(lambda *_: ran.append(1))
    vlm.model.model.visual.patch_embed.register_forward_pre_hook(lambda *_: ran.append(1))
    message = (
        r"fastv cannot keep \d+ of \d+ tokens an image on average over 4 layers: the first layer reads all of them"
    )
    with ocvtp.prune(vlm.model, "fastv", "26%"), pytest.raises(BadInput, match=message):
        vlm.model.generate(**inputs, **NEW)
    assert ran == []


def test_what_cannot_be_pruned_inside_is_refused(make_vlm: Callable[..., Any]) -> None:
    llava, qwen = make_vlm("llava"), make_vlm("qwen2_5_vl")
    plain = set(llava.model.__dict__)
    with pytest.raises(BadInput, match=r"fastv cannot keep 2 of 16 tokens .* at least 5 are needed; budget="):
        ocvtp.prune(llava.model, "fastv", 2)
    with pytest.raises(BadInput, match="positions='compact' cannot be had with sparsevlm and M-RoPE"):
        ocvtp.prune(qwen.model, "sparsevlm", 0.5, positions="compact")
    with pytest.raises(BadInput, match="pyramiddrop uses no pruner"):
        ocvtp.prune(llava.model, "pyramiddrop", 8, pruner="x")
    config = llava.model.get_decoder().config
    config.sliding_window = 4
    with pytest.raises(Incompatible, match=r"fastv drops .* not all of full attention \(sliding_window=4"):
        ocvtp.prune(llava.model, "fastv", 8)
    config.sliding_window = None
    attention = llava.model.get_decoder().layers[0].self_attn
    attention.qkv_proj = attention.k_proj
    del attention.k_proj
    with pytest.raises(Incompatible, match="LlamaDecoderLayer has no k_proj: Llama, Mistral and Qwen2 have them"):
        ocvtp.prune(llava.model, "fastv", 8)
    assert set(llava.model.__dict__) == plain
    assert DynamicCache().get_seq_length() == 0
