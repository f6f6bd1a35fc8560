"""A pruned model is a model that never had the dropped tokens, whatever the batch and however it is called."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import DynamicCache, TextStreamer

import ocvtp
from ocvtp.errors import BadInput

Picture = Callable[..., Image.Image]
NEW = {"max_new_tokens": 6, "do_sample": False}


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


def without(inputs: Any, name: str) -> dict[str, Any]:
    return {key: value for key, value in inputs.items() if key != name}
