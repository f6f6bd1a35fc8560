"""A pruned model is a model that never had the dropped tokens, whatever the batch and however it is called."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import DynamicCache, StaticCache, TextStreamer

import ocvtp
from ocvtp.errors import BadInput

Picture = Callable[..., Image.Image]
NEW = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture
def batch(llava: Any, picture_of: Picture) -> Any:
    """Eight ragged prompts: none, one and two images, of several sizes."""
    images = [
        [picture_of(0)],
        [picture_of(1, 80, 40), picture_of(2)],
        [],
        [picture_of(3, 30, 90)],
        [picture_of(4)],
        [picture_of(5), picture_of(6), picture_of(7)],
        [picture_of(8, 200, 100)],
        [],
    ]
    return images, llava.prompt(images)


@pytest.fixture
def clean(llava: Any) -> Iterator[None]:
    yield
    assert not {"generate", "forward", "_ocvtp_handle"} & set(llava.model.__dict__)


def embeddings(model: Any, ids: Tensor, pixels: Tensor | None, kept: list[list[int]]) -> Tensor:
    """One prompt without the dropped tokens, built token by token from the parts of the unpruned model."""
    words = model.get_input_embeddings()
    features = [] if pixels is None else model.model.get_image_features(pixels, return_dict=True).pooler_output
    rows, image, patch = [], 0, 0
    for token in ids.tolist():
        if token != model.config.image_token_id:
            rows.append(words(torch.tensor(token)))
            continue
        if patch in kept[image]:
            rows.append(features[image][patch])
        patch += 1
        if patch == len(features[image]):
            image, patch = image + 1, 0
    return torch.stack(rows)[None]


# --- What is computed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "options"), [("random", {}), ("oc-vtp-untrained", {"layer": 2})])
@torch.no_grad()
def test_keeping_everything_changes_nothing(
    llava: Any, batch: Any, clean: None, method: str, options: dict[str, Any]
) -> None:
    inputs = batch[1]
    logits, answer = llava.model(**inputs).logits, llava.model.generate(**inputs, **NEW)
    for keep in (16, 1.0, "100%"):
        with ocvtp.prune(llava.model, method, keep, **options) as handle:
            pruned = llava.model(**inputs).logits
            assert handle.last_kept == [list(range(16))] * 9
            real = inputs["attention_mask"].bool()
            torch.testing.assert_close(pruned[real], logits[real], atol=1e-5, rtol=1e-5)
            assert torch.equal(llava.model.generate(**inputs, **NEW), answer)


@pytest.mark.parametrize("positions", ["compact", "original"])
@torch.no_grad()
def test_a_pruned_prompt_is_one_that_never_had_the_tokens(llava: Any, batch: Any, clean: None, positions: str) -> None:
    model, (images, inputs) = llava.model, batch
    length = inputs["input_ids"].shape[1]
    with ocvtp.prune(model, "random", 5, positions=positions) as handle:
        output = model.generate(**inputs, **NEW, return_dict_in_generate=True, output_logits=True)
        kept = iter(handle.last_kept)
    assert torch.equal(output.sequences[:, :length], inputs["input_ids"])
    for row in range(8):
        alone = llava.row(images, row)
        mine = [next(kept) for _ in images[row]]
        prompt = embeddings(model, alone["input_ids"][0], alone.get("pixel_values"), mine)
        answer = output.sequences[row, length:]
        whole = torch.cat([prompt, model.get_input_embeddings()(answer[None, :-1])], 1)
        places = torch.arange(whole.shape[1])[None]
        if positions == "original":
            stays = [i for i, t in enumerate(alone["input_ids"][0].tolist()) if t != 4 or takes(alone, i, mine)]
            places = torch.tensor([stays + [len(alone["input_ids"][0]) + i for i in range(5)]])
        expected = model(inputs_embeds=whole, position_ids=places).logits[0, prompt.shape[1] - 1 :]
        found = torch.stack([step[row] for step in output.logits])
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(expected.argmax(1), answer)


def takes(alone: Any, column: int, kept: list[list[int]]) -> bool:
    number = int((alone["input_ids"][0, :column] == 4).sum())
    return number % 16 in kept[number // 16]


@torch.no_grad()
def test_a_batch_is_what_its_rows_are_alone(llava: Any, batch: Any, clean: None) -> None:
    images, inputs = batch
    length = inputs["input_ids"].shape[1]
    for method, options in (("random", {}), ("oc-vtp-untrained", {"layer": 2})):
        with ocvtp.prune(llava.model, method, 5, **options) as handle:
            together = llava.model.generate(**inputs, **NEW)[:, length:]
            kept = handle.last_kept
            assert [len(row) for row in kept] == [5] * 9
            alone = []
            for row in range(8):
                one = llava.row(images, row)
                answer = llava.model.generate(**one, **NEW)[:, one["input_ids"].shape[1] :]
                assert torch.equal(answer[0], together[row]), (method, row)
                alone += handle.last_kept
            assert alone == kept


@torch.no_grad()
def test_forward_gives_the_logits_of_the_columns_that_stay(llava: Any, batch: Any, clean: None) -> None:
    model, (images, inputs) = llava.model, batch
    with ocvtp.prune(model, "random", 5) as handle:
        output = model(**inputs)
        columns, kept = handle.last_columns, iter(handle.last_kept)
    assert output.logits.shape[:2] == columns.shape
    assert output.image_hidden_states.shape == (45, 32)
    offsets = (inputs["attention_mask"] == 0).sum(1).tolist()
    for row in range(8):
        alone = llava.row(images, row)
        mine = [next(kept) for _ in images[row]]
        prompt = embeddings(model, alone["input_ids"][0], alone.get("pixel_values"), mine)
        expected = model(inputs_embeds=prompt).logits[0]
        there = columns[row] >= 0
        stays = [i for i, t in enumerate(alone["input_ids"][0].tolist()) if t != 4 or takes(alone, i, mine)]
        real = columns[row][there]
        real = real[inputs["attention_mask"][row][real] == 1]
        assert (real - offsets[row]).tolist() == stays
        torch.testing.assert_close(output.logits[row, -len(stays) :], expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_padding_on_the_right_works_in_forward(llava: Any, batch: Any, clean: None) -> None:
    model, (images, left) = llava.model, batch
    llava.processor.tokenizer.padding_side = "right"
    try:
        right = llava.prompt(images)
    finally:
        llava.processor.tokenizer.padding_side = "left"
    with ocvtp.prune(model, "random", 5) as handle:
        first, columns = model(**left).logits, handle.last_columns
        second = model(**right).logits
        assert (handle.last_columns[:, 0] == 0).all()
    for row in range(8):
        count = int((left["attention_mask"][row].gather(0, columns[row].clamp(min=0)) * (columns[row] >= 0)).sum())
        torch.testing.assert_close(second[row, :count], first[row, -count:], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_labels_are_cut_like_the_prompts(llava: Any, picture_of: Picture, clean: None) -> None:
    model, inputs = llava.model, llava.prompt([[picture_of(0)], [picture_of(1)]])
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] < 5, -100)
    with ocvtp.prune(model, "random", 5) as handle:
        loss = model(**inputs, labels=labels).loss
        logits, columns = model(**inputs).logits, handle.last_columns
    total, count = 0.0, 0
    for row in range(2):
        for at in range(1, columns.shape[1]):
            label = int(labels[row, columns[row, at]]) if columns[row, at] >= 0 else -100
            if label >= 0:
                total, count = total - float(logits[row, at - 1].log_softmax(0)[label]), count + 1
    assert count == 4 + 9
    assert float(loss) == pytest.approx(total / count, rel=1e-5)


# --- Ways to generate ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_ways_to_generate_agree(llava: Any, batch: Any, clean: None) -> None:
    model, inputs = llava.model, batch[1]
    length = inputs["input_ids"].shape[1]
    with ocvtp.prune(model, "random", 5):
        greedy = model.generate(**inputs, **NEW)
        assert torch.equal(model.generate(**inputs, **NEW, use_cache=False), greedy)
        assert torch.equal(model.generate(inputs["input_ids"], **without(inputs, "input_ids"), **NEW), greedy)
        assert torch.equal(model.generate(**inputs, max_length=length + 6, do_sample=False), greedy)
        assert torch.equal(model.generate(**inputs, **NEW, num_beams=2, num_return_sequences=1)[:, :length],
                           inputs["input_ids"])  # fmt: skip
        # One beam or answer that is drawn from the single best token is greedy search.
        drawn = model.generate(**inputs, max_new_tokens=6, do_sample=True, top_k=1, num_return_sequences=3)
        assert torch.equal(drawn, greedy.repeat_interleave(3, 0))


@torch.no_grad()
def test_beam_search_finds_what_it_finds_without_the_tokens(llava: Any, batch: Any, clean: None) -> None:
    model, (images, inputs) = llava.model, batch
    length = inputs["input_ids"].shape[1]
    with ocvtp.prune(model, "random", 5) as handle:
        found = model.generate(**inputs, **NEW, num_beams=3, num_return_sequences=2)[:, length:]
        kept = iter(handle.last_kept)
    for row in range(8):
        alone = llava.row(images, row)
        mine = [next(kept) for _ in images[row]]
        prompt = embeddings(model, alone["input_ids"][0], alone.get("pixel_values"), mine)
        expected = model.generate(inputs_embeds=prompt, **NEW, num_beams=3, num_return_sequences=2)
        assert torch.equal(found[2 * row : 2 * row + 2], expected)


@torch.no_grad()
def test_decoding_by_hand_follows_generate(llava: Any, batch: Any, clean: None) -> None:
    model, inputs = llava.model, batch[1]
    mask = inputs["attention_mask"]
    with ocvtp.prune(model, "random", 5):
        expected = model.generate(**inputs, **NEW)[:, mask.shape[1] :]
        for given in (True, False):  # a mask of the whole, or none, for all that follows is there
            output, found = model(**inputs, use_cache=True), list[Tensor]()
            for step in range(6):
                found.append(output.logits[:, -1].argmax(1))
                more = {"attention_mask": torch.nn.functional.pad(mask, (0, step + 1), value=1)} if given else {}
                output = model(input_ids=found[-1][:, None], past_key_values=output.past_key_values, **more)
            assert torch.equal(torch.stack(found, 1), expected)


@torch.no_grad()
def test_two_conversations_and_a_copied_cache_do_not_mix(llava: Any, picture_of: Picture, clean: None) -> None:
    model = llava.model
    first, second = llava.prompt([[picture_of(0)]]), llava.prompt([[picture_of(1), picture_of(2)]])
    word = torch.tensor([[7]])
    with ocvtp.prune(model, "random", 5):
        one = model(**first, use_cache=True).past_key_values
        alone = model(input_ids=word, past_key_values=copy.deepcopy(one)).logits
        two = model(**second, use_cache=True).past_key_values
        model(input_ids=word, past_key_values=two)
        assert torch.equal(model(input_ids=word, past_key_values=one).logits, alone)
        one.crop(-1)
        torch.testing.assert_close(model(input_ids=word, past_key_values=one).logits, alone)
        with pytest.raises(BadInput, match="batch of 1 pruned prompts, but this batch has 2"):
            model(input_ids=word.expand(2, 1), past_key_values=two)


@pytest.mark.parametrize("cut", [17, 1])  # between the images; before both of them
@torch.no_grad()
def test_a_second_image_joins_a_conversation(llava: Any, picture_of: Picture, clean: None, cut: int) -> None:
    model, inputs = llava.model, llava.prompt([[picture_of(0), picture_of(1)]])
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    word = torch.tensor([[7]])
    with ocvtp.prune(model, "random", 5):
        whole = model(**inputs, use_cache=True)
        before = {"pixel_values": pixels[:1]} if cut == 17 else {"past_key_values": DynamicCache()}
        cache = model(input_ids=ids[:, :cut], **before, use_cache=True).past_key_values
        rest = pixels[1:] if cut == 17 else pixels
        parts = model(input_ids=ids[:, cut:], pixel_values=rest, past_key_values=cache)
        after = model(input_ids=word, past_key_values=parts.past_key_values).logits
        expected = model(input_ids=word, past_key_values=whole.past_key_values).logits
    torch.testing.assert_close(parts.logits, whole.logits[:, -parts.logits.shape[1] :], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(after, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_streamers_and_criteria_see_whole_prompts(llava: Any, batch: Any, clean: None) -> None:
    model, inputs = llava.model, batch[1]
    lengths: list[int] = []

    def criterion(ids: Tensor, scores: Any, **_: Any) -> Tensor:
        lengths.append(ids.shape[1])
        return torch.zeros(len(ids), dtype=torch.bool)

    class Tape(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            spoken.append(text)

    spoken: list[str] = []
    with ocvtp.prune(model, "random", 5):
        model.generate(**inputs, **NEW, stopping_criteria=[criterion])
        one = {name: value[:1] for name, value in inputs.items()}
        answer = model.generate(**one, **NEW, streamer=Tape(llava.processor.tokenizer, skip_prompt=True))
    length = inputs["input_ids"].shape[1]
    assert lengths == list(range(length + 1, length + 7))
    assert "".join(spoken).split() == llava.processor.tokenizer.decode(answer[0, length:]).split()


# --- Randomness ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_what_is_kept_follows_seed_and_image_only(llava: Any, picture_of: Picture, clean: None) -> None:
    inputs = llava.prompt([[picture_of(0)], [picture_of(1)], [picture_of(0)]])

    def kept(seed: int = 0, **changed: Any) -> list[list[int]]:
        with ocvtp.prune(llava.model, "random", 5, seed=seed) as handle:
            torch.manual_seed(seed)
            llava.model(**{**inputs, **changed})
            return handle.last_kept

    first = kept()
    assert first[0] == first[2] != first[1]
    torch.manual_seed(99)
    assert kept() == first
    assert kept(1) != first
    assert kept(pixel_values=inputs["pixel_values"].to(torch.bfloat16).float()) == first
    with ocvtp.prune(llava.model, "random", 5) as handle:
        with handle.samples(["a", "b", "c"]):
            llava.model(**inputs)
            named = handle.last_kept
        assert named[0] != named[2]
        with handle.samples(["c", "b", "a"]):
            llava.model(**inputs)
            assert handle.last_kept == named[::-1]
        with handle.samples(["a"]), pytest.raises(BadInput, match="1 names of samples for 3 images"):
            llava.model(**inputs)


def test_random_tokens_are_uniform(llava: Any, picture_of: Picture, clean: None) -> None:
    inputs = llava.prompt([[picture_of(0)]])
    hits = torch.zeros(16)
    with ocvtp.prune(llava.model, "random", 4) as handle:
        for draw in range(400):
            with handle.samples([draw]), torch.no_grad():
                llava.model(**inputs)
            hits[handle.last_kept[0]] += 1
    # Expected 100 a token, standard deviation below 9.
    assert hits.sum() == 1600
    assert (hits - 100).abs().max() < 40


# --- On and off ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_two_pruned_models_and_a_plain_one_live_side_by_side(make_vlm: Callable[..., Any], picture_of: Picture) -> None:
    one, two, plain = (make_vlm("llava", seed) for seed in (1, 2, 1))
    inputs = one.prompt([[picture_of(0)], [picture_of(1)]])
    expected = plain.model.generate(**inputs, **NEW)
    weights = {name: value.clone() for name, value in one.model.state_dict().items()}
    with ocvtp.prune(one.model, "random", 5) as first:
        alone = one.model.generate(**inputs, **NEW)
        kept = first.last_kept
        with ocvtp.prune(two.model, "oc-vtp-untrained", 3, layer=2) as second:
            two.model.generate(**inputs, **NEW)
            assert torch.equal(one.model.generate(**inputs, **NEW), alone)
            assert (first.last_kept, [len(k) for k in second.last_kept]) == (kept, [3, 3])
            assert torch.equal(plain.model.generate(**inputs, **NEW), expected)
    assert not torch.equal(alone, expected)
    assert torch.equal(one.model.generate(**inputs, **NEW), expected)
    assert set(one.model.__dict__) == set(plain.model.__dict__)
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, weights[name])


def test_a_model_is_pruned_once_at_a_time(llava: Any, clean: None) -> None:
    handle = ocvtp.prune(llava.model, "random", 5)
    with pytest.raises(BadInput, match=r"pruned already: call remove\(\) on its handle first"):
        ocvtp.prune(llava.model, "random", 3)
    handle.remove()
    handle.remove()
    other = ocvtp.prune(llava.model, "random", 3)
    handle.remove()
    assert "_ocvtp_handle" in llava.model.__dict__
    other.remove()


def test_what_replaced_the_methods_before_comes_back(llava: Any, clean: None) -> None:
    def before(*args: Any, **kwargs: Any) -> Any:
        return type(llava.model).generate(llava.model, *args, **kwargs)

    llava.model.generate = before
    with ocvtp.prune(llava.model, "random", 5):
        assert llava.model.generate is not before
    assert llava.model.generate is before
    del llava.model.generate


@torch.no_grad()
def test_an_exception_inside_leaves_the_handle_usable(llava: Any, picture_of: Picture, clean: None) -> None:
    inputs = llava.prompt([[picture_of(0)]])

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("stop here")

    with ocvtp.prune(llava.model, "random", 5) as handle:
        expected = llava.model.generate(**inputs, **NEW)
        with pytest.raises(RuntimeError, match="stop here"):
            llava.model.generate(**inputs, **NEW, stopping_criteria=[fail])
        text = {"input_ids": torch.tensor([[1, 5, 6]])}
        llava.model(**text)
        assert handle.last_kept == []
        assert torch.equal(llava.model.generate(**inputs, **NEW), expected)


@torch.no_grad()
def test_vanilla_is_the_model_itself(llava: Any, batch: Any, clean: None) -> None:
    inputs = batch[1]
    logits, answer = llava.model(**inputs).logits, llava.model.generate(**inputs, **NEW)
    with ocvtp.prune(llava.model, "vanilla") as handle:
        assert torch.equal(llava.model(**inputs).logits, logits)
        assert torch.equal(llava.model.generate(**inputs, **NEW), answer)
        assert handle.last_kept == [list(range(16))] * 9


@torch.no_grad()
def test_prompts_without_images_are_left_alone(llava: Any, clean: None) -> None:
    inputs = llava.prompt([[], []])
    logits, answer = llava.model(**inputs).logits, llava.model.generate(**inputs, **NEW)
    with ocvtp.prune(llava.model, "random", 5) as handle:
        assert torch.equal(llava.model(**inputs).logits, logits)
        assert torch.equal(llava.model.generate(**inputs, **NEW), answer)
        assert handle.last_kept == []


@torch.no_grad()
def test_the_language_model_reads_the_kept_tokens_only(llava: Any, picture_of: Picture, clean: None) -> None:
    inputs = llava.prompt([[picture_of(0)], [picture_of(1)]])
    lengths: list[list[int]] = []
    hook = llava.model.model.language_model.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(list((args[0] if args else kwargs["hidden_states"]).shape[:2])),
        with_kwargs=True,
    )
    with ocvtp.prune(llava.model, "random", 5):
        llava.model.generate(**inputs, **NEW)
    hook.remove()
    assert lengths[0] == [2, inputs["input_ids"].shape[1] - 11]
    assert lengths[1:] == [[2, 1]] * 5


# --- What is refused -------------------------------------------------------------------------------------------------


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


def without(inputs: Any, name: str) -> dict[str, Any]:
    return {key: value for key, value in inputs.items() if key != name}
