"""Every family: a pruned model is a model that never had the dropped tokens, whatever the batch.

What a pruned prompt should be is built from the unpruned model: the embeddings that its language model reads, without
the columns that go. Which go, and what positions the others get, is counted here in plain loops.
"""

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import ocvtp
from ocvtp.errors import BadInput
from ocvtp.pruner import OCPruner, PrunerConfig
from ocvtp.vlms import family_of

Picture = Callable[..., Image.Image]
NEW = {"max_new_tokens": 6, "do_sample": False}
KEEP = 3
METHODS = ["random", "oc-vtp"]


@pytest.fixture(scope="module")
def images(picture_of: Picture) -> list[list[Image.Image]]:
    """Eight prompts: none, one, two and three images, of several sizes."""
    return [
        [picture_of(0)],
        [picture_of(1, 80, 40), picture_of(2)],
        [],
        [picture_of(3, 30, 90)],
        [picture_of(4, 130, 120)],
        [picture_of(5), picture_of(6, 90, 90), picture_of(7)],
        [picture_of(8, 200, 100)],
        [],
    ]


@pytest.fixture
def batch(vlm: Any, images: Any) -> Any:
    return vlm.prompt(images)


@pytest.fixture(autouse=True)
def clean(vlm: Any) -> Iterator[None]:
    yield
    assert not {"generate", "forward", "_ocvtp_handle"} & set(vlm.model.__dict__)


def untrained(vlm: Any, seed: int = 0) -> OCPruner:
    """A pruner for layer 2 with random weights."""
    torch.manual_seed(seed)
    return OCPruner(PrunerConfig(family_of(vlm.model).facts.width, grid=(4, 4))).eval()


def prune(vlm: Any, method: str, keep: Any, **options: Any) -> Any:
    if method == "oc-vtp":
        options |= {"pruner": untrained(vlm), "layer": 2}
    return ocvtp.prune(vlm.model, method, keep, **options)


# --- What should be --------------------------------------------------------------------------------------------------


def read_by(vlm: Any, one: Any) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Embeddings [1, L, D] and positions [P, L] of one unpruned prompt in front of the language model, and the rest."""
    seen: dict[str, Any] = {}
    hook = vlm.model.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    vlm.model(**one)
    hook.remove()
    embeddings, places = seen["inputs_embeds"], seen.get("position_ids")
    return embeddings, torch.arange(embeddings.shape[1])[None] if places is None else places[-3:, 0], seen


ALWAYS = -1000
"""The newline after an image of OneVision in one tile."""


def places_of(vlm: Any, one: Any) -> list[list[int]]:
    """For each image of a prompt the number of the token that each placeholder stands for; -row - 1 for newlines."""
    kind = vlm.model.config.model_type
    if kind in ("llava", "gemma3"):
        return [list(range(16)) for _ in one.get("pixel_values", [])]
    if kind == "smolvlm":
        return [list(range(4)) for _ in (one["pixel_values"][0] if "pixel_values" in one else [])]
    if kind == "internvl":
        runs = "".join("x" if token == vlm.model.config.image_token_id else " " for token in one["input_ids"][0])
        return [list(range(len(run))) for run in runs.split()]
    if kind in ("qwen2_5_vl", "qwen3_vl"):
        return [list(range(int(h * w) // 4)) for _, h, w in one.get("image_grid_thw", [])]
    found = []
    for height, width in one["image_sizes"].tolist() if "image_sizes" in one else []:
        if kind == "llava_onevision" and int(one["batch_num_images"][0]) > 1:
            found.append([*range(16), ALWAYS])
            continue
        best = max(vlm.model.config.image_grid_pinpoints, key=lambda p: fits(p, height, width))
        rows, columns = best[0] // 14, best[1] // 14
        if width / height > columns / rows:
            rows -= 2 * ((rows - int(round(height * columns / width, 7))) // 2)
        else:
            columns -= 2 * ((columns - int(round(width * rows / height, 7))) // 2)
        ratio = (rows * columns / (2 * 16)) ** 0.5  # `anyres_max_2`
        if kind == "llava_onevision" and ratio > 1.1:
            rows, columns = int(rows // ratio), int(columns // ratio)
        numbers = list(range(16))
        for row in range(rows):
            numbers += [*range(16 + row * columns, 16 + (row + 1) * columns), -row - 1]
        found.append(numbers)
    return found


def fits(pinpoint: list[int], height: int, width: int) -> tuple[int, int]:
    """How much of an image's resolution is there, then how little is wasted."""
    scale = min(pinpoint[1] / width, pinpoint[0] / height)
    used = min(int(width * scale) * int(height * scale), width * height)
    return used, -(pinpoint[0] * pinpoint[1] - used)


def stays(numbers: list[int], kept: list[int]) -> list[bool]:
    """Which placeholders of an image stay: those of kept tokens, and newlines of rows with a kept token."""
    answer, row_has = [], False
    for number in numbers:
        if number == ALWAYS:
            answer.append(True)
        elif number < 0:
            answer.append(row_has)
            row_has = False
        else:
            answer.append(number in kept)
            # Rows of LLaVA-NeXT begin after the 16 tokens of the whole image.
            row_has = (row_has or number in kept) and number >= 16
    return answer


def columns_and_positions(
    vlm: Any, one: Any, kept: list[list[int]], places: Tensor, mode: str
) -> tuple[list[int], Tensor, int]:
    """Columns that stay of one prompt, their positions, and the next one."""
    ids, token = one["input_ids"][0].tolist(), vlm.model.config.image_token_id
    flags = [stays(numbers, mine) for numbers, mine in zip(places_of(vlm, one), kept, strict=True)]
    image, inside, columns, owner = 0, 0, list[int](), list[int]()
    for column, each in enumerate(ids):
        if each != token:
            columns.append(column)
            owner.append(-1)
            continue
        if flags[image][inside]:
            columns.append(column)
            owner.append(image)
        inside += 1
        if inside == len(flags[image]):
            image, inside = image + 1, 0
    assert image == len(kept)
    if mode == "original":
        return columns, places[:, columns], int(places.max()) + 1
    if len(places) == 1:
        return columns, torch.arange(len(columns))[None], len(columns)
    made, at, done = list[list[int]](), 0, 0
    while done < len(columns):
        if owner[done] < 0:
            made.append([at] * 3)
            at, done = at + 1, done + 1
            continue
        members = [i for i in range(done, len(columns)) if owner[i] == owner[done]]
        lines = [sorted({int(places[axis, columns[i]]) for i in members}) for axis in range(3)]
        made += [[at + lines[axis].index(int(places[axis, columns[i]])) for axis in range(3)] for i in members]
        at, done = at + max(map(len, lines)), done + len(members)
    return columns, torch.tensor(made).T, at


def taught(vlm: Any, one: Any, kept: list[list[int]], answer: Tensor, mode: str) -> Tensor:
    """Logits of each token of an answer after a prompt that never had the dropped tokens, in one pass."""
    embeddings, places, seen = read_by(vlm, one)
    columns, positions, following = columns_and_positions(vlm, one, kept, places, mode)
    whole = torch.cat([embeddings[:, columns], vlm.model.get_input_embeddings()(answer[None, :-1])], 1)
    more = torch.arange(following, following + len(answer) - 1).expand(len(positions), -1)
    positions = torch.cat([positions, more], 1)[:, None]
    images = (one["input_ids"][0] == vlm.model.config.image_token_id).tolist()
    extra: dict[str, Any] = {"attention_mask": torch.ones(whole.shape[:2], dtype=torch.long)}
    if seen.get("deepstack_visual_embeds") is not None:
        numbers = [sum(images[:column]) for column in columns if images[column]]
        flags = [images[column] for column in columns] + [False] * (len(answer) - 1)
        extra |= {
            "visual_pos_masks": torch.tensor([flags]),
            "deepstack_visual_embeds": [plane[numbers] for plane in seen["deepstack_visual_embeds"]],
        }
    if vlm.model.config.model_type == "gemma3":
        blocks = [sum(images[i] and not images[i - 1] for i in range(1, c + 1)) if images[c] else 0 for c in columns]
        extra["attention_mask"] = both_ways(blocks + [0] * (len(answer) - 1))
    hidden = vlm.model.get_decoder()(
        inputs_embeds=whole, position_ids=positions[0] if len(positions) == 1 else positions, **extra
    ).last_hidden_state
    return vlm.model.lm_head(hidden)[0, len(columns) - 1 :]


def both_ways(blocks: list[int]) -> dict[str, Tensor]:
    """Gemma 3's masks, [1, 1, S, S]: what comes before, and all of one's own image; some layers see eight columns."""
    size = len(blocks)
    full, near = torch.zeros(size, size, dtype=torch.bool), torch.zeros(size, size, dtype=torch.bool)
    for query in range(size):
        for key in range(size):
            full[query, key] = key <= query or blocks[query] == blocks[key] > 0
            near[query, key] = full[query, key] and key > query - 8
    return {"full_attention": full[None, None], "sliding_attention": near[None, None]}


# --- What is computed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["vanilla", *METHODS])
@torch.no_grad()
def test_keeping_everything_changes_nothing(vlm: Any, batch: Any, method: str) -> None:
    logits, answer = vlm.model(**batch).logits, vlm.model.generate(**batch, **NEW)
    real = batch["attention_mask"].bool()
    for keep in (None,) if method == "vanilla" else (1.0, "100%"):
        for positions in ("compact", "original"):
            with prune(vlm, method, keep, positions=positions) as handle:
                pruned = vlm.model(**batch).logits
                torch.testing.assert_close(pruned[real], logits[real], atol=1e-5, rtol=1e-5)
                assert torch.equal(vlm.model.generate(**batch, **NEW), answer)
                family = family_of(vlm.model)
                assert handle.last_kept == [list(range(n)) for n in family.counts(family.images(batch))]


@pytest.mark.parametrize("positions", ["compact", "original"])
@torch.no_grad()
def test_a_pruned_prompt_is_one_that_never_had_the_tokens(vlm: Any, images: Any, batch: Any, positions: str) -> None:
    length = batch["input_ids"].shape[1]
    with prune(vlm, "random", KEEP, positions=positions) as handle:
        output = vlm.model.generate(**batch, **NEW, return_dict_in_generate=True, output_logits=True)
        kept = iter(handle.last_kept)
    assert torch.equal(output.sequences[:, :length], batch["input_ids"])
    for row in range(8):
        mine, answer = [next(kept) for _ in images[row]], output.sequences[row, length:]
        expected = taught(vlm, vlm.row(images, row), mine, answer, positions)
        found = torch.stack([step[row] for step in output.logits])
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        expected[:, vlm.model.generation_config.suppress_tokens] = -torch.inf
        assert torch.equal(expected.argmax(1), answer)


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_a_batch_is_what_its_rows_are_alone(vlm: Any, images: Any, batch: Any, method: str) -> None:
    length = batch["input_ids"].shape[1]
    with prune(vlm, method, KEEP) as handle:
        together, beams = (vlm.model.generate(**batch, **NEW, num_beams=n)[:, length:] for n in (1, 3))
        kept, alone = handle.last_kept, []
        assert [len(row) for row in kept] == [KEEP] * 9
        for row in range(8):
            one = vlm.row(images, row)
            for wanted, count in ((together, 1), (beams, 3)):
                answer = vlm.model.generate(**one, **NEW, num_beams=count)[:, one["input_ids"].shape[1] :]
                assert torch.equal(answer[0], wanted[row]), (row, count)
            alone += handle.last_kept
        assert alone == kept


@torch.no_grad()
def test_beams_and_samples_are_those_of_the_whole_model_if_everything_stays(
    vlm: Any, images: Any, picture_of: Picture
) -> None:
    # At most one image a prompt, and of InternVL at most one tile: transformers 5.17 mixes up those of prompts that it
    # repeats.
    rows = [row[:1] for row in images]
    if vlm.kind == "internvl":
        rows = [[picture_of(number)] * len(row) for number, row in enumerate(rows)]
    batch = vlm.prompt(rows)
    ways: list[dict[str, Any]] = [{"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "temperature": 1.5}]
    for way in ways:
        found = []
        for keep in (None, 1.0, 1.0):
            torch.manual_seed(5)
            if keep is None:
                found.append(vlm.model.generate(**batch, **{**NEW, **way}))
                continue
            with prune(vlm, "random", keep):
                found.append(vlm.model.generate(**batch, **{**NEW, **way}))
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])


@torch.no_grad()
def test_several_answers_a_prompt_follow_the_seed(vlm: Any, batch: Any) -> None:
    answers = []
    with prune(vlm, "random", KEEP):
        greedy = vlm.model.generate(**batch, **NEW)
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            answers.append(vlm.model.generate(**batch, max_new_tokens=6, do_sample=True, num_return_sequences=2))
        best = vlm.model.generate(**batch, max_new_tokens=6, do_sample=True, top_k=1, num_return_sequences=2)
    assert torch.equal(answers[0], answers[1])
    assert not torch.equal(answers[0], answers[2])
    assert torch.equal(best, greedy.repeat_interleave(2, 0))


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


@torch.no_grad()
def test_padding_on_the_right_works_in_forward(vlm: Any, images: Any, batch: Any) -> None:
    vlm.processor.tokenizer.padding_side = "right"
    try:
        right = vlm.prompt(images)
    finally:
        vlm.processor.tokenizer.padding_side = "left"
    with prune(vlm, "random", KEEP) as handle:
        first, kept = vlm.model(**batch).logits, handle.last_kept
        second = vlm.model(**right).logits
        assert handle.last_kept == kept
        assert (handle.last_columns[:, 0] == 0).all()
        for row in range(8):
            alone = vlm.model(**vlm.row(images, row)).logits[0]
            torch.testing.assert_close(first[row, -len(alone) :], alone, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(second[row, : len(alone)], alone, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_eager_attention_keeps_and_says_the_same(vlm: Any, make_vlm: Callable[..., Any], batch: Any) -> None:
    eager = make_vlm(vlm.kind)
    eager.model.set_attn_implementation("eager")
    found = []
    for each in (vlm, eager):
        with prune(each, "oc-vtp", KEEP, fill="attention") as handle:
            found.append((each.model(**batch).logits, handle.last_kept, handle.last_columns))
    (logits, kept, columns), (others, same, _) = found
    assert kept == same
    real = batch["attention_mask"].gather(1, columns.clamp(min=0)).bool() & (columns >= 0)
    torch.testing.assert_close(others[real], logits[real], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_language_model_reads_what_stays_and_nothing_else(vlm: Any, picture_of: Picture) -> None:
    pictures = [[picture_of(0, 120, 60)], [picture_of(1, 70, 110)]]
    inputs, lengths = vlm.prompt(pictures), list[int]()
    hook = (
        vlm.model.get_decoder()
        .layers[0]
        .register_forward_pre_hook(
            lambda _, args, kwargs: lengths.append((args[0] if args else kwargs["hidden_states"]).shape[1]),
            with_kwargs=True,
        )
    )
    with prune(vlm, "random", KEEP) as handle:
        vlm.model.generate(**inputs, **NEW)
        kept = handle.last_kept
    hook.remove()
    rows = []
    for row, mine in enumerate(kept):
        one = vlm.row(pictures, row)
        (numbers,) = places_of(vlm, one)
        rows.append(one["input_ids"].shape[1] - stays(numbers, mine).count(False))
        assert stays(numbers, mine).count(True) >= KEEP
    assert lengths == [max(rows), 1, 1, 1, 1, 1]


# --- The tower --------------------------------------------------------------------------------------------------------


def blocks_of(vlm: Any) -> Any:
    family = family_of(vlm.model)
    return family.eye.blocks if hasattr(family, "eye") else family.tower.blocks


def test_the_tower_stops_after_the_layer_it_needs(vlm: Any, batch: Any) -> None:
    family, ran = family_of(vlm.model), list[int]()
    inputs = family.images(batch)
    hooks = [
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
        for number, block in enumerate(blocks_of(vlm))
    ]
    for layers, values, blocks in (([2], False, 2), ([1, 3], False, 3), ([2], True, family.facts.feature_layer)):
        ran.clear()
        family.encode(inputs, layers, values=values)
        assert ran == list(range(blocks))
    ran.clear()
    with torch.no_grad(), prune(vlm, "oc-vtp", KEEP):
        vlm.model(**batch)
    assert ran == list(range(family.facts.feature_layer))
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def test_what_is_projected_of_all_tokens_is_what_transformers_makes_of_the_images(vlm: Any, batch: Any) -> None:
    family = family_of(vlm.model)
    inputs = family.images(batch)
    vision = family.encode(inputs, ())
    features = family.project([vision.values([i])[0] for i in range(len(inputs))])
    more = {n: batch[n] for n in ("image_sizes", "image_grid_thw", "batch_num_images") if n in batch}
    made = vlm.model.model.get_image_features(batch["pixel_values"], **more, return_dict=True)
    theirs = torch.cat([each.flatten(0, -2) for each in made.pooler_output])
    theirs = torch.cat(
        [
            theirs,
            *(
                torch.cat(list(plane)) if isinstance(plane, tuple) else plane
                for plane in getattr(made, "deepstack_features", [])
            ),
        ],
        1,
    )
    mine = list[Tensor]()
    for number, ours in enumerate(features):
        placed = family.place(inputs, number, torch.arange(len(ours)), ours)
        assert placed.places_X.tolist() == list(range(placed.whole))
        mine.append(placed.features_XD)
    torch.testing.assert_close(torch.cat(mine), theirs)


# --- On and off, and side by side ------------------------------------------------------------------------------------


@torch.no_grad()
def test_two_families_are_pruned_side_by_side_and_given_back(
    vlm: Any, make_vlm: Callable[..., Any], picture_of: Picture
) -> None:
    other = make_vlm("llava" if vlm.tokens is None else "qwen2_5_vl", 1)
    pictures = [[picture_of(0)], [picture_of(1, 90, 60)]]
    mine, theirs = vlm.prompt(pictures), other.prompt(pictures)
    before, logits = vlm.model.generate(**mine, **NEW), vlm.model(**mine).logits[:, -1]
    weights = {name: value.clone() for name, value in vlm.model.state_dict().items()}
    names = set(vlm.model.__dict__)
    unpruned = other.model.generate(**theirs, **NEW)
    with prune(vlm, "random", KEEP) as handle:
        alone = vlm.model.generate(**mine, **NEW)
        kept, pruned = handle.last_kept, vlm.model(**mine).logits[:, -1]
        assert torch.equal(other.model.generate(**theirs, **NEW), unpruned)
        with prune(other, "oc-vtp", 2) as second:
            other.model.generate(**theirs, **NEW)
            assert torch.equal(vlm.model.generate(**mine, **NEW), alone)
            assert (handle.last_kept, [len(each) for each in second.last_kept]) == (kept, [2, 2])
    assert not torch.allclose(pruned, logits, atol=1e-3)
    assert torch.equal(vlm.model.generate(**mine, **NEW), before)
    assert set(vlm.model.__dict__) == names
    for name, value in vlm.model.state_dict().items():
        assert torch.equal(value, weights[name])


@torch.no_grad()
def test_an_exception_inside_leaves_the_handle_usable(vlm: Any, batch: Any) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("stop here")

    with prune(vlm, "random", KEEP):
        expected = vlm.model.generate(**batch, **NEW)
        with pytest.raises(RuntimeError, match="stop here"):
            vlm.model.generate(**batch, **NEW, stopping_criteria=[fail])
        hook = blocks_of(vlm)[1].register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="stop here"):
            vlm.model.generate(**batch, **NEW)
        hook.remove()
        assert torch.equal(vlm.model.generate(**batch, **NEW), expected)


# --- Models that are not as they were loaded -------------------------------------------------------------------------


class Packed(nn.Module):
    """A linear map from eight bits, as quantisers leave it: it has no `weight`."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("packed", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.packed * self.scale, self.bias)


@torch.no_grad()
def test_quantised_models_are_pruned_as_others(make_vlm: Callable[..., Any], vlm: Any, picture_of: Picture) -> None:
    packed = make_vlm(vlm.kind)
    for module in list(packed.model.modules()):
        for child, linear in list(module.named_children()):
            if type(linear) is nn.Linear and child != "lm_head":
                setattr(module, child, Packed(linear))
    inputs = packed.prompt([[picture_of(0)], [picture_of(1, 90, 60)]])
    answer = packed.model.generate(**inputs, **NEW)
    for method in METHODS:
        with prune(packed, method, 1.0):
            assert torch.equal(packed.model.generate(**inputs, **NEW), answer)
        with prune(packed, method, KEEP) as handle:
            packed.model.generate(**inputs, **NEW)
            assert [len(kept) for kept in handle.last_kept] == [KEEP, KEEP]


def test_gradients_are_the_same_with_gradient_checkpointing(
    make_vlm: Callable[..., Any], vlm: Any, picture_of: Picture
) -> None:
    trained = make_vlm(vlm.kind)
    inputs = trained.prompt([[picture_of(0)], [picture_of(1, 90, 60)]])
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            trained.model.gradient_checkpointing_enable({"use_reentrant": False})
        trained.model.train()
        trained.model.zero_grad()
        with prune(trained, "oc-vtp", KEEP):
            trained.model(
                **inputs, labels=inputs["input_ids"].masked_fill(inputs["input_ids"] < 5, -100)
            ).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in trained.model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for each, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][each], gradient, msg=each)
    first_block = next(
        name for name, p in trained.model.named_parameters() if p is next(blocks_of(trained)[0].parameters())
    )
    assert gradients[0][first_block].abs().max() > 0


@torch.no_grad()
def test_half_precision_keeps_what_a_batch_keeps(vlm: Any, make_vlm: Callable[..., Any], images: Any) -> None:
    half = make_vlm(vlm.kind)
    half.model.to(torch.bfloat16)
    inputs = half.prompt(images)
    with prune(half, "random", KEEP) as handle:
        half.model.generate(**inputs, **NEW)
        kept = handle.last_kept
        half.model.generate(**inputs.to(torch.bfloat16), **NEW)
        assert handle.last_kept == kept
    with prune(vlm, "random", KEEP) as handle:
        vlm.model.generate(**inputs.to(torch.float32), **NEW)
        assert handle.last_kept == kept


def test_other_classes_are_refused_with_what_is_supported() -> None:
    with pytest.raises(BadInput, match="a Linear, which cannot be pruned; supported are") as refused:
        family_of(nn.Linear(2, 2))
    for name in ("LlavaFor", "LlavaNextFor", "Qwen2_5_VLFor"):
        assert f"{name}ConditionalGeneration" in str(refused.value)


def test_a_folder_is_described_by_its_config_alone(vlm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoConfig

    vlm.model.config.architectures = [type(vlm.model).__name__]
    vlm.model.config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    expected = family_of(vlm.model).facts_of(AutoConfig.from_pretrained(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(AutoConfig, "from_pretrained", None)
        assert ocvtp.vlms.resolve(tmp_path).facts == expected
    # What a file leaves out is what transformers has by default.
    config = json.loads((tmp_path / "config.json").read_text())
    config["vision_config"].pop("hidden_size")
    (tmp_path / "config.json").write_text(json.dumps(config))
    defaults = family_of(vlm.model).facts_of(AutoConfig.from_pretrained(tmp_path))
    assert ocvtp.vlms.resolve(tmp_path).facts == defaults != expected
